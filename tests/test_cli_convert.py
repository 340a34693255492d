"""``mhabridge convert``, ``inspect`` and ``fingerprint``: what they print, their exit codes, and how they end."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import mhabridge as mb

pytest.importorskip("click", reason="click is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from mhabridge.checkpoint.formats import torch_writer
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.planning import verifying
from mhabridge.checkpoint.planning.plan import Entry
from mhabridge.checkpoint.storage.stored import StoredObject
from mhabridge.cli import main, plans, rules
from tests.checkpoint_files import outgoing, written

COMMAND = [sys.executable, "-c", "from mhabridge.cli.main import main; main()"]
SPEC = mb.MHASpec(8, 2)
FORMATS = ["safetensors", "safetensors.index.json", "pth", "ckpt", "pkl", "npz"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small model in it: two layers, as PyTorch names them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    np.savez(tmp_path / "model.npz", **model())
    return tmp_path


@pytest.fixture
def mhabridge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process, as its ``main`` runs it."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["mhabridge", *arguments])
        with pytest.raises(SystemExit) as raised:
            main.main()
        assert isinstance(raised.value.code, int)
        done = Done(raised.value.code, *capsys.readouterr())
        assert "Traceback" not in done.out + done.err
        assert "bug in mhabridge" not in done.err
        return done

    return run


def model(layers: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    named = {"embed.weight": rng.random((5, 8), "float32"), "head.weight": rng.random((5, 8), "float32")}
    for i in range(layers):
        weights = mb.MHAWeights.random(SPEC, seed=i)
        named.update(weights.to_layout("torch", SPEC, prefix=f"encoder.layers.{i}.self_attn"))
        named[f"encoder.layers.{i}.norm1.weight"] = rng.random(8, "float32")
        named[f"encoder.layers.{i}.norm1.bias"] = rng.random(8, "float32")
    return named


def tensors(path: str | Path) -> dict[str, tuple[int, ...]]:
    with open_checkpoint(path) as file:
        return {name: tensor.shape for name, tensor in file.items()}


# -- names that are not what they seem ---------------------------------------------------------------------------------


def test_no_name_of_a_file_reaches_the_terminal_as_it_is(mhabridge: Callable[..., Done]) -> None:
    evil = "\x1b[2J\nmhabridge: all is well\r"
    Path(evil + ".npz").write_bytes(b"neither")
    np.savez("evil.npz", **{f"{evil}.weight": np.ones((3, 2), "f4")})
    for done in (
        mhabridge("convert", "evil.npz", "b.npz", "--to", "mindspore"),  # two readings: the error has the name
        mhabridge("convert", evil + ".npz", "model.npz", ".", "--format", "npz", "--force"),
        mhabridge("convert", "evil.npz", "b.npz", "--drop", "evil"),
        mhabridge("fingerprint", evil + ".npz"),
        mhabridge("inspect", evil + ".npz"),
    ):
        assert done.code == 2
        assert not any(line.startswith("mhabridge: all is well") for line in done.err.splitlines())
        assert not set("\x1b\r") & set(done.err + done.out), done
    shown = mhabridge("fingerprint", "evil.npz")
    Path(evil).write_bytes(Path("evil.npz").read_bytes())
    assert mhabridge("fingerprint", evil).out == shown.out.replace(
        "evil.npz", "\\x1b[2J\\nmhabridge: all is well\\r", 1
    )


def test_a_spec_file_that_is_none_is_named(mhabridge: Callable[..., Done]) -> None:
    for content in ('{"embed_dim": 8}', '{"a": {"embed_dim": -1, "num_heads": 1}}', "[]", "{"):
        Path("spec.json").write_text(content)
        for command in (["inspect", "model.npz"], ["convert", "model.npz", "b.npz", "--to", "megengine"]):
            done = mhabridge(*command, "--spec", "spec.json")
            assert (done.code, done.err.startswith("mhabridge: spec.json: ")) == (2, True), done.err


def test_a_broken_config_does_not_stand_in_the_way_of_given_heads(mhabridge: Callable[..., Done]) -> None:
    Path("config.json").write_text("{")
    for command in (["convert", "model.npz", "b.npz", "--to", "megengine"], ["fingerprint", "model.npz"]):
        refused = mhabridge(*command)
        assert (refused.code, "config.json: given no JSON" in refused.err) == (2, True)
        done = mhabridge(*command, "--num-heads", "2")
        assert done.code == 0
    assert "note:" in mhabridge("inspect", "model.npz", "--num-heads", "2").out


# -- converting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("to", ["torch", "mindspore", "megengine"])
def test_every_format_and_framework_and_back(mhabridge: Callable[..., Done], ending: str, to: str) -> None:
    done = mhabridge("convert", "model.npz", f"there.{ending}", "--to", to, "--num-heads", "2")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1].endswith("verified: every bit")
    back = mhabridge("convert", f"there.{ending}", "back.npz", "--to", "torch")
    assert back.code == 0
    with open_checkpoint("back.npz") as file:
        assert sorted(file) == sorted(model())
        for name, array in model().items():
            assert np.array_equal(file.read(name), array), name
    equal = mhabridge("fingerprint", "model.npz", f"there.{ending}", "back.npz", "--equal")
    assert (equal.code, equal.out.splitlines()[-1]) == (0, "all weights are equal")


def test_without_a_framework_names_and_layouts_stay(mhabridge: Callable[..., Done]) -> None:
    done = mhabridge("convert", "model.npz", "there.pkl")
    assert done.code == 0
    assert tensors("there.pkl") == {name: array.shape for name, array in model().items()}
    assert not Path("there.pkl.mhabridge.json").exists()


def test_the_plan_says_what_happens_to_every_tensor(mhabridge: Callable[..., Done]) -> None:
    done = mhabridge("convert", "model.npz", "there.pkl", "--to", "megengine", "--dry-run")
    assert done.code == 0
    assert not Path("there.pkl").exists()
    rows = [line.split("  ") for line in done.out.splitlines()]
    attention = [
        [cell.strip() for cell in row if cell] for row in rows if any("io_weight_bias" in cell for cell in row)
    ]
    assert [row[-4:] for row in attention] == [
        [f"encoder.layers.{i}.self_attn.io_weight_bias", "(1, 288)", "float32", "attention: torch -> megengine"]
        for i in range(2)
    ]
    assert all(f"encoder.layers.{i}.norm1.weight" in done.out for i in range(2))
    assert "       2  attention: torch -> megengine" in done.out.splitlines()
    last = done.out.splitlines()[-1]
    assert last == "dry run: 8 tensors made of 14, 2.8 kB would be written; nothing was"


def test_json_has_the_whole_plan(mhabridge: Callable[..., Done]) -> None:
    done = mhabridge("convert", "model.npz", "there.ckpt", "--to", "mindspore", "--json")
    report = json.loads(done.out)
    assert (done.code, report["ok"], report["verified"]) == (0, True, True)
    assert sorted(name for entry in report["entries"] for name in entry["sources"]) == sorted(model())
    assert sorted(entry["target"] for entry in report["entries"]) == sorted(tensors("there.ckpt"))
    assert sum(report["counts"].values()) == len(report["entries"])


def test_quiet_says_nothing(mhabridge: Callable[..., Done]) -> None:
    assert mhabridge("convert", "model.npz", "there.pth", "--quiet") == (0, "", "")
    assert mhabridge("convert", "model.npz", "there.pth", "--quiet").err.startswith("mhabridge: ")


def test_a_long_plan_is_grouped_unless_all_is_asked_for(mhabridge: Callable[..., Done], folder: Path) -> None:
    np.savez(folder / "long.npz", **model(20))
    arguments = ("convert", "long.npz", "there.ckpt", "--to", "mindspore", "--dry-run")
    grouped, verbose = mhabridge(*arguments).out, mhabridge(*arguments, "--verbose").out
    (row,) = [line for line in grouped.splitlines() if "norm1.weight" in line]
    assert row.split()[:2] == ["20", "encoder.layers.*.norm1.weight"]
    assert "encoder.layers.*.norm1.gamma" in row
    assert "layers.7." not in grouped
    assert all(f"encoder.layers.{i}.norm1.gamma" in verbose for i in range(20))


def test_an_existing_target_is_replaced_by_force_only(mhabridge: Callable[..., Done], folder: Path) -> None:
    (folder / "there.pth").write_text("old", encoding="utf-8")
    done = mhabridge("convert", "model.npz", "there.pth")
    assert done.code == 2
    assert "--force" in done.err
    assert (folder / "there.pth").read_text(encoding="utf-8") == "old"
    assert mhabridge("convert", "model.npz", "there.pth", "--force").code == 0
    assert len(tensors("there.pth")) == len(model())


def test_a_wrong_result_is_exit_code_1_and_no_file(
    mhabridge: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "same_bits", lambda *given: False)
    done = mhabridge("convert", "model.npz", "there.pth")
    assert done.code == 1
    assert "NOT verified" in done.out
    assert not Path("there.pth").exists()
    unseen = mhabridge("convert", "model.npz", "there.pth", "--no-verify")
    assert unseen.code == 0
    assert unseen.out.splitlines()[-1].endswith("; not verified")


# -- what people say ---------------------------------------------------------------------------------------------------


def test_a_lost_tensor_is_exit_code_1(mhabridge: Callable[..., Done]) -> None:
    np.savez("other.npz", **{name: array for name, array in model().items() if name != "head.weight"})
    done = mhabridge("convert", "model.npz", "there.npz", "--to", "torch", "--names-of", "other.npz")
    assert (done.code, done.out) == (1, "")
    assert "head.weight" in done.err
    dropped = mhabridge(
        "convert", "model.npz", "there.npz", "--to", "torch", "--names-of", "other.npz", "--drop", "head*"
    )
    assert dropped.code == 0
    assert "left out: head.weight (dropped by --drop head*)" in dropped.out.splitlines()
    assert mhabridge("convert", "other.npz", "a.npz", "--to", "torch", "--names-of", "model.npz").code == 1
    allowed = ("--names-of", "model.npz", "--allow-missing", "head.*")
    done = mhabridge("convert", "other.npz", "a.npz", "--to", "torch", *allowed)
    assert done.code == 0
    assert "head.weight" in done.out


def test_rules_come_from_options_and_a_file(mhabridge: Callable[..., Done], folder: Path) -> None:
    (folder / "spec.json").write_text(SPEC.to_json(), encoding="utf-8")
    (folder / "rules.toml").write_text(
        'rename = ["encoder.*=from_file.*", "embed.*=from_file.*"]\ndrop = ["*norm1*"]\nspec = "spec.json"\n'
        '[kinds]\nhead = "embedding"\n',
        encoding="utf-8",
    )
    done = mhabridge(
        "convert", "model.npz", "there.ckpt", "--to", "mindspore",
        "--rules", "rules.toml", "--rename", "embed.*=mine.*", "--kind", "mine=linear",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = tensors("there.ckpt")
    assert "mine.weight" in found
    assert "head.embedding_table" in found
    assert not any("norm1" in name for name in found)
    assert mb.inspect_checkpoint("there.ckpt").blocks[0].spec.num_heads == 2


def test_a_kind_decides_between_readings(mhabridge: Callable[..., Done]) -> None:
    np.savez("odd.npz", **{"odd.weight": np.ones((3, 2), "float32")})
    done = mhabridge("convert", "odd.npz", "there.ckpt", "--from", "torch", "--to", "mindspore")
    assert done.code == 2
    assert "--kind" in done.err
    kind = ("--kind", "odd=embedding")
    assert mhabridge("convert", "odd.npz", "there.ckpt", "--from", "torch", "--to", "mindspore", *kind).code == 0
    assert tensors("there.ckpt") == {"odd.embedding_table": (3, 2)}


def test_another_layout_for_attention(mhabridge: Callable[..., Done]) -> None:
    assert mhabridge("convert", "model.npz", "there.safetensors", "--to", "torch", "--layout", "hf-bert").code == 0
    assert "encoder.layers.1.self_attn.self.query.weight" in tensors("there.safetensors")


def test_specs_by_prefix(mhabridge: Callable[..., Done]) -> None:
    packed = mb.MHASpec(8, 4, kdim=4, vdim=6)
    named = mb.MHAWeights.random(packed).to_layout("megengine", packed, prefix="attn")
    np.savez("packed.npz", **named)
    refused = mhabridge("convert", "packed.npz", "there.pth", "--to", "torch")
    assert refused.code == 2
    assert "io_weight_bias" in refused.err
    Path("specs.json").write_text(json.dumps({"attn": packed.to_dict()}), encoding="utf-8")
    assert mhabridge("convert", "packed.npz", "there.pth", "--to", "torch", "--spec", "specs.json").code == 0
    assert tensors("there.pth")["attn.k_proj_weight"] == (8, 4)
    rows = mhabridge("inspect", "packed.npz", "--spec", "specs.json").out.splitlines()
    assert any(row.startswith(" attn ") and row.endswith("kdim=4, vdim=6") for row in rows)
    same = mhabridge("fingerprint", "there.pth", "packed.npz", "--spec", "specs.json", "--equal")
    assert same.code == 0


def test_nested_entries_and_shards(mhabridge: Callable[..., Done], folder: Path) -> None:
    arrays = [outgoing(name, "float32", values) for name, values in model().items()]
    written(folder / "deep.pth", torch_writer, arrays, [], {}, ("outer", "state_dict"))
    keys = ("--nested", "outer", "--nested", "state_dict")
    done = mhabridge("convert", "deep.pth", "there.safetensors.index.json", "--shard-size", "1kB", *keys)
    assert done.code == 0, done.err
    assert len(list(folder.glob("there-*.safetensors"))) > 1
    assert set(tensors("there.safetensors.index.json")) == set(model())
    top = mhabridge("inspect", "deep.pth", "--nested", "", "--json")
    assert {tensor["name"] for tensor in json.loads(top.out)["tensors"]} >= {"outer.state_dict.head.weight"}


@pytest.mark.parametrize("ending", FORMATS)
def test_entries_that_are_no_tensors_are_kept(mhabridge: Callable[..., Done], folder: Path, ending: str) -> None:
    arrays = [outgoing(name, "float32", values) for name, values in model().items()]
    objects = [
        StoredObject("epoch", "3", 3),
        StoredObject("best", "nan", float("nan")),
        StoredObject("tags", "", ["a"]),
    ]
    written(folder / "more.pth", torch_writer, arrays, objects)
    done = mhabridge("convert", "more.pth", f"there.{ending}")
    assert done.code == 0, done.out + done.err
    assert "kept: epoch, best" in done.out
    assert ("tags: left out" in done.out) == (ending in ("ckpt", "npz"))
    seen = mhabridge("inspect", f"there.{ending}").out
    assert "epoch" in seen
    assert "best" in seen


def test_what_would_take_code_to_make_is_refused_or_left_out(mhabridge: Callable[..., Done], folder: Path) -> None:
    with open(folder / "odd.pkl", "wb") as file:
        pickle.dump({**model(), "args": argparse.Namespace(rate=0.1)}, file)
    refused = mhabridge("convert", "odd.pkl", "there.pth")
    assert (refused.code, refused.out) == (2, "")
    assert "argparse.Namespace" in refused.err
    done = mhabridge("convert", "odd.pkl", "there.pth", "--ignore-objects")
    assert done.code == 0
    assert any(line.startswith("args: left out") for line in done.out.splitlines())
    assert set(tensors("there.pth")) == set(model())


ERRORS = {
    ("model.npz", "there.txt"): "says its format",
    ("model.npz", "missing/there.pth"): "does not exist",
    ("model.npz", "model.npz/there.pth"): "is none",
    ("model.npz", "/proc/there.pth"): "/proc",
    ("missing.npz", "there.pth"): "missing.npz",
    ("rules.toml", "there.pth"): "rules.toml",
    ("model.npz", "there.pth", "--to", "keras"): "keras",
    ("model.npz", "there.pth", "--to", "torch", "--layout", "keras"): "keras",
    ("model.npz", "there.pth", "--to", "torch", "--num-heads", "3"): "num_heads",
    ("model.npz", "there.pth", "--num-heads", "0"): "--num-heads",
    ("model.npz", "there.pth", "--rename", "nothing"): "PATTERN=REPLACEMENT",
    ("model.npz", "there.pth", "--kind", "nothing"): "PATTERN=KIND",
    ("model.npz", "there.pth", "--shard-size", "5 horses"): "5GB",
    ("model.npz", "there.pth", "--shard-size", "0"): "5GB",
    ("model.npz", "there.pth", "--rules", "missing.toml"): "missing.toml",
    ("model.npz", "there.pth", "--rules", "model.npz"): "a TOML file",
    ("model.npz", "there.pth", "--rules", "rules.toml"): "nonsense",
    ("model.npz", "there.pth", "--spec", "rules.toml"): "a spec as JSON",
    ("model.npz", "there.pth", "--to", "torch", "--names-of", "missing.module:make"): "missing.module:make",
    ("model.npz", "there.pth", "--to", "torch", "--names-of", "os:abort_not"): "AttributeError",
    ("model.npz", "there.pth", "--to", "torch", "--names-of", "missing.pth"): "missing.pth",
    ("model.npz", "there.pth", "--format", "pth"): "OUT names a file",
    ("model.npz", "."): "--format",
    ("model.npz", "model.npz", "there.pth"): "an existing folder",
    ("model.npz", "model.npz", ".", "--format", "pth"): "several sources",
    ("model.npz",): "Missing argument",
}


@pytest.mark.parametrize("arguments", ERRORS, ids=" ".join)
def test_what_cannot_be_done_is_a_message_and_exit_code_2(
    mhabridge: Callable[..., Done], folder: Path, arguments: tuple[str, ...]
) -> None:
    (folder / "rules.toml").write_text("nonsense = 1\n", encoding="utf-8")
    before = sorted(folder.iterdir())
    done = mhabridge("convert", *arguments)
    assert (done.code, done.out) == (2, "")
    assert ERRORS[arguments] in done.err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "text",
    ['rename = "a=b"', "drop = [1]", 'kinds = ["a"]', "num_heads = true", "spec = 3", "[spec]\nembed_dim = 8", "= 1"],
)
def test_a_rules_file_says_what_is_wrong(mhabridge: Callable[..., Done], folder: Path, text: str) -> None:
    (folder / "rules.toml").write_text(text, encoding="utf-8")
    done = mhabridge("convert", "model.npz", "there.pth", "--rules", "rules.toml")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("mhabridge: ")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("12", 12), ("7b", 7), ("2kB", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert rules.size_of(text) == size


# -- several files -----------------------------------------------------------------------------------------------------


def test_several_files_go_to_a_folder(mhabridge: Callable[..., Done], folder: Path) -> None:
    np.savez(folder / "second.npz", **model(1))
    assert mhabridge("convert", "model.npz", "third.safetensors.index.json").code == 0
    (folder / "out").mkdir()
    sources = ("model.npz", "second.npz", "third.safetensors.index.json")
    done = mhabridge("convert", *sources, "out", "--format", ".ckpt", "--to", "mindspore", "--json")
    assert done.code == 0
    assert [Path(one["target"]).name for one in json.loads(done.out)] == ["model.ckpt", "second.ckpt", "third.ckpt"]
    assert tensors("out/third.ckpt") == tensors("out/model.ckpt") != tensors("out/second.ckpt")


def test_one_file_that_fails_keeps_no_other_back(mhabridge: Callable[..., Done], folder: Path) -> None:
    (folder / "bad.npz").write_bytes((folder / "model.npz").read_bytes()[:1000])
    (folder / "out").mkdir()
    done = mhabridge("convert", "bad.npz", "model.npz", "out", "--format", "pth")
    assert done.code == 2
    assert "bad.npz was not converted" in done.err
    assert [path.name for path in (folder / "out").iterdir()] == ["model.pth"]
    assert "model.pth: 14 tensors" in done.out
    listed = json.loads(mhabridge("convert", "bad.npz", "model.npz", "out", "--format", "npz", "--json").out)
    assert [one["ok"] for one in listed] == [False, True]
    assert listed[0]["error"]["kind"] == "CheckpointError"


# -- groups of alike entries -------------------------------------------------------------------------------------------


def entry(*sources: str, target: str | None, shape: tuple[int, ...] = (4,), rule: str = "linear") -> Entry:
    return Entry(sources, target, "float32", (shape,) * len(sources), shape if target else None, rule)


def test_what_differs_in_more_than_numbers_is_not_alike() -> None:
    first = entry("a.0.weight", target="a.0.weight")
    others = [
        entry("a.1.weight", target="a.1.gamma"),
        entry("a.1.weight", target=None),
        entry("a.1.bias", target="a.1.weight"),
        entry("a.1.weight", target="a.1.weight", rule="norm"),
        entry("a1.0.weight", target="a1.0.weight"),
    ]
    for other in others:
        assert len(plans.alike((first, other))) == 2, other
    assert plans.alike((first, entry("a.12.weight", target="a.12.weight"))) != [[first]]
    assert len(plans.alike((first, entry("a.12.weight", target="a.12.weight")))) == 1


def test_shapes_that_differ_within_a_group_are_not_hidden() -> None:
    cells = plans.row([entry("a.0.w", target="a.0.v"), entry("a.1.w", target="a.1.v", shape=(5,))])
    assert cells[:5] == ["2", "a.*.w", "(several)", "a.*.v", "(several)"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.w",), "a.w"),
        (("w", "b"), "{w,b}"),
        (("x.q.w", "x.k.w"), "x.{q,k}.w"),
        (("x.q.w", "x.q.b"), "x.q.{w,b}"),
        (("x.s.q.w", "x.o.w"), "x.{s.q,o}.w"),
        (("a.a", "a.a.a"), "a.{a,a.a}"),
    ],
)
def test_several_names_as_one(names: tuple[str, ...], expected: str) -> None:
    assert plans.braced(names) == expected


# -- inspecting --------------------------------------------------------------------------------------------------------


def test_inspect_shows_everything(mhabridge: Callable[..., Done], folder: Path) -> None:
    named = {**model(1), "lonely": np.ones((), "float32")}
    arrays = [
        outgoing(name, "float32", values, tied="both" if name in ("embed.weight", "head.weight") else None)
        for name, values in {**named, "head.weight": named["embed.weight"]}.items()
    ]
    written(folder / "all.pth", torch_writer, arrays, [StoredObject("epoch", "3", 3)], {}, ("state_dict",))
    done = mhabridge("inspect", "all.pth")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert "all.pth: torch, 9 tensors" in lines[0]
    (tied,) = [line.split() for line in lines if line.strip().startswith("head.weight")]
    assert tied == ["head.weight", "float32", "(5,", "8)", "160", "embed.weight"]
    (block,) = [line.split() for line in lines if line.strip().startswith("encoder.layers.0.self_attn ")]
    assert block == ["encoder.layers.0.self_attn", "torch", "8", "?", "float32"]
    assert any("epoch = 3" in line for line in lines)
    assert any("--num-heads" in line for line in lines)
    assert "self_attn  torch   8  2  float32" in mhabridge("inspect", "all.pth", "--num-heads", "2").out


def test_inspect_gives_json(mhabridge: Callable[..., Done]) -> None:
    found = json.loads(mhabridge("inspect", "model.npz", "--json").out)
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in found["tensors"]} == tensors("model.npz")
    assert [block["spec"]["num_heads"] for block in found["blocks"]] == [None, None]


def test_inspect_says_why_attention_cannot_be_told(mhabridge: Callable[..., Done]) -> None:
    np.savez(
        "gqa.npz",
        **{f"{name}_proj.weight": np.ones((n, 8), "float32") for name, n in zip("qkvo", (8, 4, 4, 8), strict=True)},
    )
    done = mhabridge("inspect", "gqa.npz")
    assert done.code == 0
    assert "note: attention layers: " in done.out


def test_names_cannot_command_a_terminal(mhabridge: Callable[..., Done]) -> None:
    name = "\x1b]0;title\x07\x9b2J\u202eweight"
    np.savez("odd.npz", **{name: np.ones(3, "float32")})
    for arguments in (("inspect", "odd.npz"), ("convert", "odd.npz", "there.pth", "--drop", "\x1b*")):
        done = mhabridge(*arguments)
        assert done.code == 0
        assert "\\x1b]0;title\\x07\\x9b2J\\u202eweight" in done.out
    done = mhabridge("convert", "odd.npz", "a.ckpt", "--to", "torch", "--names-of", "model.npz")
    for out in (done.out, done.err):
        assert not any(c in out for c in "\x1b\x07\x9b\u202e")


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_an_error_names_the_file_and_the_way_out(mhabridge: Callable[..., Done], folder: Path) -> None:
    np.savez("a.npz", **{"attn.io_weight_bias": np.ones((1, 80), "f4")})
    Path("spec.json").write_text('{"embed_dim": 4, "num_heads": 2, "kdim": 4, "vdim": 4, "bias": true}')
    done = mhabridge("fingerprint", "model.npz", "a.npz")
    assert done.code == 2
    assert done.out.startswith("model.npz: ")
    assert done.err.startswith("mhabridge: a.npz: ")
    assert "--spec FILE" in done.err
    assert '{"embed_dim": 512, "num_heads": 8, "kdim": 512, "vdim": 512, "bias": true}' in " ".join(done.err.split())
    assert mhabridge("fingerprint", "a.npz", "--spec", "spec.json").code == 0


def test_what_is_no_file_is_not_waited_for(mhabridge: Callable[..., Done], folder: Path) -> None:
    os.mkfifo("pipe")
    Path("large").write_bytes(b"#" * (17 << 20))
    for name, said in (("pipe", "no regular file"), ("/dev/zero", "no regular file"), ("large", "more than")):
        for option in ("--spec", "--rules"):
            done = mhabridge("convert", "model.npz", "b.pkl", "--to", "megengine", option, name)
            assert done.code == 2
            assert done.err.startswith(f"mhabridge: {name}: given {said}")
    Path("bytes").write_bytes(b"\xff")
    assert "no text in UTF-8" in mhabridge("inspect", "model.npz", "--spec", "bytes").err


def test_a_key_that_is_there_twice_is_refused(mhabridge: Callable[..., Done]) -> None:
    Path("spec.json").write_text('{"embed_dim": 8, "num_heads": 2, "num_heads": 4}')
    done = mhabridge("inspect", "model.npz", "--spec", "spec.json")
    assert (done.code, "two entries are named 'num_heads'" in done.err) == (2, True)
    Path("config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2, "num_attention_heads": 4}')
    done = mhabridge("convert", "model.npz", "b.npz", "--to", "mindspore")
    assert (done.code, "two entries are named 'num_attention_heads'" in done.err) == (2, True)


def test_a_function_that_ends_the_program_makes_no_model(mhabridge: Callable[..., Done], folder: Path) -> None:
    done = mhabridge("convert", "model.npz", "b.npz", "--to", "torch", "--names-of", "sys:exit")
    assert (done.code, "sys:exit, which raised SystemExit" in done.err) == (2, True)
    assert not (folder / "b.npz").exists()


def test_a_shard_size_for_one_file_is_refused(mhabridge: Callable[..., Done], folder: Path) -> None:
    for target in (["b.safetensors"], [".", "--format", "npz"]):
        done = mhabridge("convert", "model.npz", *target, "--shard-size", "1GB")
        assert done.code == 2
        assert "--shard-size: given 1GB, and " in done.err
    assert mhabridge("convert", "model.npz", "b.safetensors.index.json", "--shard-size", "1KB").code == 0
    assert len(list(folder.glob("b-*"))) > 1


def test_fingerprints_tell_files_apart(mhabridge: Callable[..., Done]) -> None:
    other = model()
    other["head.weight"] = other["head.weight"].copy()
    other["head.weight"].view("uint32")[2, 3] ^= 1
    np.savez("head.npz", **other)
    np.savez("attention.npz", **{**model(), "encoder.layers.0.self_attn.in_proj_bias": np.ones(24, "float32")})
    np.savez("none.npz", x=np.ones(3))
    assert mhabridge("fingerprint", "model.npz", "head.npz").code == 0
    cases = {"head.npz": "not in the attention layers", "attention.npz": "differ in the attention layers"}
    for name, said in cases.items():
        done = mhabridge("fingerprint", "model.npz", name, "--equal")
        assert done.code == 1
        assert said in done.out.splitlines()[-1]
    assert "no attention layers" in mhabridge("fingerprint", "none.npz").out
    found = json.loads(mhabridge("fingerprint", "model.npz", "head.npz", "--json").out)
    assert found["model.npz"]["attention"] == found["head.npz"]["attention"] == mb.fingerprint("head.npz").attention
    assert found["model.npz"]["all"] != found["head.npz"]["all"]


@pytest.mark.parametrize("command", ["inspect", "fingerprint"])
def test_a_file_that_cannot_be_read(mhabridge: Callable[..., Done], folder: Path, command: str) -> None:
    (folder / "bad.ckpt").write_bytes(b"\x0a\xff\xff")
    for name in ("missing.pth", "bad.ckpt", "."):
        done = mhabridge(command, name)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("mhabridge: ")


# -- as processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("inspect", "model.npz"), ("fingerprint", "model.npz"), ("convert", "model.npz", "there.pth")]
)
def test_a_reader_that_has_seen_enough_and_a_full_disk(arguments: tuple[str, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([*COMMAND, *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    with open("/dev/full", "w", encoding="utf-8") as full:
        again = [*COMMAND, *arguments, *(["--force"] if "convert" in arguments else [])]
        done = subprocess.run(again, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "mhabridge: [Errno 28] No space left on device\n")


def on_a_terminal(*arguments: str, columns: int) -> tuple[int, str]:
    """Exit code and screen of a process whose output is a terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        shown += piece
    os.close(parent)
    return process.wait(timeout=60), shown.decode()


def test_a_terminal_gets_a_bar_and_a_table_that_fits() -> None:
    code, shown = on_a_terminal("convert", "model.npz", "there.ckpt", "--to", "mindspore", columns=70)
    assert code == 0
    assert "verifying" in shown
    assert "B/s" in shown
    assert "not shown in 70 columns" in shown
    assert "verified: every bit" in shown
    code, shown = on_a_terminal("convert", "model.npz", "there.pkl", "--quiet", columns=70)
    assert (code, shown) == (0, "")


@pytest.mark.parametrize("count", [1, 3], ids=["one file", "several files"])
def test_ctrl_c_leaves_whole_files_and_no_stray_ones(folder: Path, count: int) -> None:
    sources, out = [], folder / "out"
    out.mkdir()
    for number in range(count):
        sources.append(f"{number}.safetensors")
        large_file(folder / sources[-1], 1 << 29)
        (out / f"{number}.pth").write_bytes(b"old")
    command = subprocess.Popen(
        [*COMMAND, "convert", *sources, "out", "--format", "pth", "--force"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until_it_writes(command, out)
    command.send_signal(signal.SIGINT)
    assert (*command.communicate(timeout=30), command.returncode) == ("", "", 130)
    assert sorted(path.name for path in out.iterdir()) == [f"{number}.pth" for number in range(count)]
    untouched = [path.stat().st_size == 3 for path in sorted(out.iterdir())]
    assert untouched[-1], "the last of several files had not begun"
    for path, old in zip(sorted(out.iterdir()), untouched, strict=True):
        assert old or len(tensors(path)) == 64, "one that was finished just before is whole"
        path.unlink()  # half a gigabyte


def large_file(path: Path, size: int) -> None:
    """A safetensors file of zeros that takes no room on the disk, but time to read."""
    entries = {
        f"x{i}": {"dtype": "U8", "shape": [size // 64], "data_offsets": [i * size // 64, (i + 1) * size // 64]}
        for i in range(64)
    }
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def wait_until_it_writes(command: subprocess.Popen[str], folder: Path) -> None:
    """Until the process has a file without a name in the folder, and something in it."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        assert command.poll() is None, command.communicate()
        for link in Path(f"/proc/{command.pid}/fd").iterdir():
            if is_growing(link, folder):
                return
        time.sleep(0.01)
    raise AssertionError("it never began")


def is_growing(link: Path, folder: Path) -> bool:
    try:
        target = os.readlink(link)
        return target.startswith(str(folder)) and link.stat().st_size > 0 and not target.endswith(".safetensors")
    except OSError:
        return False


def test_light_commands_import_no_framework(folder: Path) -> None:
    code = (
        "import sys; sys.argv = {!r}\nfrom mhabridge.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "print([name for name in ('torch', 'mindspore', 'megengine', 'safetensors', 'execnet', 'rich') "
        "if name in sys.modules])"
    )
    for arguments in (["inspect", "model.npz"], ["fingerprint", "model.npz"], ["convert", "model.npz", "there.pth"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(["mhabridge", *arguments])], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_a_model_of_ones_own_names_the_target(mhabridge: Callable[..., Done], folder: Path) -> None:
    pytest.importorskip("torch")
    (folder / "my_models.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(8, 5, bias=False)\n", encoding="utf-8"
    )
    np.savez("head.npz", **{"weight": model()["head.weight"]})
    done = mhabridge("convert", "head.npz", "there.pth", "--to", "torch", "--names-of", "my_models:make")
    assert done.code == 0, done.err
    np.savez("wide.npz", **{"weight": np.ones((5, 9), "float32")})
    done = mhabridge("convert", "wide.npz", "wide.pth", "--to", "torch", "--names-of", "my_models:make")
    assert done.code == 1
    assert "weight" in done.err
