"""What a conversion does to every tensor: the user's rules, law 1, and the forms that state dicts come in."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mhabridge.checkpoint.conversion import ConversionReport, convert_checkpoint
from mhabridge.checkpoint.formats import npz_writing, safetensors_file
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.inspection import inspect_checkpoint
from mhabridge.checkpoint.planning import completeness, renaming
from mhabridge.checkpoint.planning import plan as planning
from mhabridge.checkpoint.planning.drafts import Draft, Entry
from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError, WeightsError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights
from tests.checkpoint_files import outgoing, written

SPEC = MHASpec(4, 2)


def arrays(prefix: str = "") -> dict[str, np.ndarray]:
    """A small model in PyTorch's names: an attention, a linear map, a norm, an embedding and a tensor of no layer."""
    found = MHAWeights.random(SPEC).to_layout("torch", SPEC, prefix="attn")
    found["fc.weight"] = np.arange(8, dtype="f4").reshape(2, 4)
    found["fc.bias"] = np.arange(2, dtype="f4")
    found["norm.weight"] = np.arange(4, dtype="f4")
    found["norm.bias"] = np.arange(4, dtype="f4") + 1
    found["embed.weight"] = np.arange(12, dtype="f4").reshape(3, 4)
    found["scale"] = np.float32([3])
    return {prefix + name: array for name, array in found.items()}


def source_of(folder: Path, prefix: str = "", **more: np.ndarray) -> Path:
    np.savez(folder / "source.npz", **arrays(prefix), **more)
    return folder / "source.npz"


def names(file: Path) -> list[str]:
    with open_checkpoint(file) as opened:
        return list(opened)


def convert(file: Path, to: str | None = "mindspore", **options: Any) -> ConversionReport:
    report = convert_checkpoint(file, file.with_name("target.npz"), to=to, force=True, **options)
    assert report.verified
    return report


def targets(report: ConversionReport) -> dict[str, tuple[str, ...]]:
    return {entry.target: entry.sources for entry in report.entries if entry.target is not None}


IN_MINDSPORE = [
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "fc.weight",
    "fc.bias",
    "norm.gamma",
    "norm.beta",
    "embed.embedding_table",
    "scale",
]


# -- the report --------------------------------------------------------------------------------------------------------


def test_every_tensor_is_told_and_the_order_stays(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path))
    assert names(tmp_path / "target.npz") == IN_MINDSPORE
    assert [entry.sources for entry in report.entries if entry.target == "norm.gamma"] == [("norm.weight",)]
    assert report.counts == {
        "attention: mindspore, as it is": 4,
        "linear": 2,
        "norm": 2,
        "embedding": 1,
        "unchanged: no known kind of layer": 1,
    }
    assert sorted(name for entry in report.entries for name in entry.sources) == sorted(arrays())


def test_a_packed_target_tells_all_that_it_is_made_of(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), "megengine")
    entry = next(entry for entry in report.entries if entry.target == "attn.io_weight_bias")
    assert entry.sources == tuple(IN_MINDSPORE[i] for i in (0, 2, 1, 3))
    assert (entry.before, entry.after, entry.dtype) == (((12, 4), (4, 4), (12,), (4,)), (1, 80), "float32")
    assert names(tmp_path / "target.npz")[0] == "attn.io_weight_bias"


def test_the_report_is_json(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), drop="scale")
    found = json.loads(report.to_json())
    assert found["ok"] is found["verified"] is True
    assert found["source_format"] == found["target_format"] == "npz"
    assert len(found["entries"]) == 10
    assert found["counts"]["dropped by --drop scale"] == 1
    assert {
        "sources": ["fc.bias"],
        "target": "fc.bias",
        "dtype": "float32",
        "before": [[2]],
        "after": [2],
        "rule": "linear",
    } in found["entries"]
    assert found["bytes"] == sum(array.nbytes for name, array in arrays().items() if name != "scale")


def test_a_dry_run_makes_the_same_plan_and_writes_nothing(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    dry = convert_checkpoint(source, tmp_path / "a.pkl", to="megengine", dry_run=True)
    assert (dry.target, dry.verified, dry.ok) == (None, None, True)
    assert list(tmp_path.iterdir()) == [source]
    assert convert_checkpoint(source, tmp_path / "a.pkl", to="megengine").entries == dry.entries


def test_the_way_is_told_byte_by_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(source_of(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * report.bytes, 2 * report.bytes)  # written, and read back
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- rules about names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        "module.*=*",
        ["module.*=*", "*=never.*"],
        {f"module.{name}": name for name in arrays()},
        lambda name: name.removeprefix("module."),
    ],
    ids=["rule", "list", "mapping", "callable"],
)
def test_names_are_changed_first(rename: Any, tmp_path: Path) -> None:
    report = convert(source_of(tmp_path, "module."), rename=rename)
    assert names(tmp_path / "target.npz") == IN_MINDSPORE
    assert targets(report)["norm.gamma"] == ("module.norm.weight",)


def test_a_prefix_may_stay(tmp_path: Path) -> None:
    convert(source_of(tmp_path, "module."))
    assert names(tmp_path / "target.npz") == [f"module.{name}" for name in IN_MINDSPORE]


def test_the_first_rule_that_fits_is_used_even_if_it_keeps_the_name(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), to=None, rename=["norm.*=norm.*", "n*.weight=x.weight", "fc.*=y.*"])
    assert {"norm.weight", "norm.bias", "y.weight"} <= targets(report).keys()
    with pytest.raises(ArgumentError, match=r"rename: given 'nothing\.\*=nothing\.\*', which no name fits"):
        convert(source_of(tmp_path), to=None, rename=["nothing.*=nothing.*"])


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"fc\.weight: given fc\.weight and norm\.weight"):
        convert(source_of(tmp_path), rename="norm.*=fc.*")


def test_a_name_that_is_filled_twice_is_an_error() -> None:
    first, second = (Entry((name,), "x.gamma", "float32", ((3,),), (3,), "norm") for name in ("a", "b"))
    assert completeness.require_once([first]) == {"x.gamma": (3,)}
    with pytest.raises(WeightsError, match=r"x\.gamma: given a and b; expected one tensor for this name"):
        completeness.require_once([first, second])


@pytest.mark.parametrize(
    ("rename", "error"),
    [
        ("fc", ArgumentError),
        ("=x", ArgumentError),
        ("a*=*b*", ArgumentError),
        ("fc=", ArgumentError),
        ("fc.*=", ArgumentError),
        ("fc*=*", ArgumentError),  # .bias: the dot stays behind
        ({"scale": ""}, ArgumentError),
        (3, ArgumentTypeError),
        ([3], ArgumentTypeError),
        ({"scale": 3}, ArgumentTypeError),
        (lambda name: 3, ArgumentTypeError),
        (lambda name: name + ".", ArgumentError),
    ],
)
def test_rules_that_are_none(rename: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match="rename"):
        convert(source_of(tmp_path), rename=rename)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        ("fcc.*=x.*", r"rename: given 'fcc\.\*=x\.\*', which no name fits.*Close to it: fc\."),
        (["fc.*=x.*", "nrm.*=y.*"], r"rename: given 'nrm\.\*=y\.\*', which.*Close to it: norm\."),
        ({"scal": "x"}, r"rename: given 'scal', which no name fits.*Close to it: scale\."),
        ("1234*=x*", r"rename: given '1234.*mhabridge inspect"),
    ],
)
def test_a_rule_that_no_name_fits_is_an_error(rename: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        convert(source_of(tmp_path), rename=rename)
    with pytest.raises(ArgumentError, match=said):
        convert(source_of(tmp_path), to=None, rename=rename)


def test_rules_may_come_from_an_iterator(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), rename=iter(["fc.*=x.*", "fc.b*=never.*"]))
    assert targets(report)["x.bias"] == ("fc.bias",)
    with pytest.raises(ArgumentError, match="which no name fits"):
        convert(source_of(tmp_path), rename=iter(["fc.*=x.*", "nothing.*=never.*"]))


def test_many_long_names_are_compared_quickly() -> None:
    many = [f"{'x' * 100_000}{number}" for number in range(100)] + [f"layer.{number}.weight" for number in range(9_000)]
    start = time.monotonic()
    assert "layer.0.weight" in renaming.close("*0.wieght", many)
    assert renaming.close("x" * 100_000, many) == [many[0]]
    assert time.monotonic() - start < 5


# -- leaving out -------------------------------------------------------------------------------------------------------


def test_what_is_dropped_is_listed(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), drop=["embed.*", "sc?le"])
    left = {entry.sources[0]: (entry.rule, entry.after) for entry in report.entries if entry.target is None}
    assert left == {"embed.weight": ("dropped by --drop embed.*", None), "scale": ("dropped by --drop sc?le", None)}
    assert names(tmp_path / "target.npz") == IN_MINDSPORE[:-2]


def test_patterns_are_of_old_names_or_new_ones(tmp_path: Path) -> None:
    for drop in ("module.embed.*", "embed.*"):
        convert(source_of(tmp_path, "module."), drop=drop, rename="module.*=*")
        assert names(tmp_path / "target.npz") == [*IN_MINDSPORE[:-2], "scale"]


def test_a_pattern_that_nothing_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"drop: given 'embd\.\*', which no name fits.*Close to it: embed\.weight"):
        convert(source_of(tmp_path), drop=["embd.*", "scale"])
    report = convert(source_of(tmp_path), drop=["embed.*", "*.weight"])  # the second one finds other names as well
    assert report.counts["dropped by --drop embed.*"] == 1


def test_entries_that_are_no_tensors_are_dropped_by_name(tmp_path: Path) -> None:
    file = torch_file(tmp_path, {"state_dict": state(), "epoch": 3, "args": argparse.Namespace(a=1)})
    with pytest.raises(CheckpointError, match="args"):
        convert_checkpoint(file, tmp_path / "b.pth", drop=["epoch"])
    report = convert_checkpoint(file, tmp_path / "b.pth", drop=["epoch", "args.*"])
    assert report.left_out[0] == "epoch: left out (3); dropped by --drop epoch"
    assert report.left_out[1].startswith("args: left out")
    assert report.kept == ()
    with open_checkpoint(tmp_path / "b.pth") as opened:
        assert opened.objects == ()


def test_allow_missing_needs_the_targets_names(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"allow_missing: given 'head\.\*', without .*--names-of"):
        convert(source_of(tmp_path), allow_missing=["head.*"])


def test_a_part_of_an_attention_layer_is_noted(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), "megengine", drop="attn.out_proj.weight")
    assert [note.partition(":")[0] for note in report.notes[:2]] == ["attn.in_proj_weight", "attn.in_proj_bias"]
    assert targets(report)["attn.in_proj_weight"] == ("attn.in_proj_weight",)


def test_nothing_may_be_left_over(tmp_path: Path) -> None:
    with open_checkpoint(source_of(tmp_path)) as file:
        draft = Draft(file, str)
        for name in list(draft.left())[1:]:
            draft.leave_out(name, "for the test")
        with pytest.raises(WeightsError, match=r"attn\.in_proj_weight: given no rule"):
            completeness.require_used(draft)


# -- the target's names ------------------------------------------------------------------------------------------------


def wanted(**changes: Any) -> dict[str, tuple[int, ...]]:
    shapes = {name: array.shape for name, array in arrays().items()}
    own = dict(zip(IN_MINDSPORE, shapes.values(), strict=True))
    return {name: shape for name, shape in {**own, **changes}.items() if shape is not None}


def test_the_targets_names_are_filled_exactly(tmp_path: Path) -> None:
    convert(source_of(tmp_path), names_of=wanted())
    np.savez(tmp_path / "model.npz", **{name: np.zeros(shape, "f4") for name, shape in wanted().items()})
    convert(source_of(tmp_path), names_of=tmp_path / "model.npz")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc2.weight": (2, 2)}, "fc2.weight: given 1 names of the target without a tensor, 0 tensors without a name"),
        ({"scale": None}, "scale: given 0 names of the target without a tensor, 1 tensors without a name"),
        ({"scale": None, "bias": (1,)}, r"bias: given 1 names .*, 1 tensors without a name \(scale\)"),
        ({"fc.weight": (4, 2)}, r"fc.weight: given shape \(2, 4\); expected shape \(4, 2\)"),
        ({"scale": ()}, r"scale: given shape \(1,\); expected shape \(\)"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=said):
        convert(source_of(tmp_path), names_of=wanted(**changes))
    assert not (tmp_path / "target.npz").exists()


def test_what_may_be_missing_is_noted(tmp_path: Path) -> None:
    more = wanted(**{"fc2.weight": (2, 2)})
    report = convert(source_of(tmp_path), names_of=more, allow_missing="fc2.*")
    assert "fc2.weight: not in the source; allowed by fc2.*" in report.notes
    with pytest.raises(WeightsError, match=r"fc2\.weight"):
        convert(source_of(tmp_path), names_of=more, allow_missing=["fc3.*"])


def test_a_prefix_of_all_names_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"All differ by 'module\.': use the rule 'module\.\*=\*'"):
        convert(source_of(tmp_path, "module."), names_of=wanted())
    longer = {f"net.{name}": shape for name, shape in wanted().items()}
    with pytest.raises(WeightsError, match=r"All differ by 'net\.': use the rule '\*=net\.\*'"):
        convert(source_of(tmp_path), names_of=longer)
    with pytest.raises(WeightsError, match=r"Use --rename, --drop or --allow-missing"):
        convert(source_of(tmp_path, "module."), names_of={**wanted(), "more": (1,)})


def test_the_targets_names_say_what_a_layer_is(tmp_path: Path) -> None:
    source = source_of(tmp_path, **{"tokens.weight": np.ones((3, 2), "f4")})
    with pytest.raises(CheckpointError, match=r"tokens: given embedding .* or linear"):
        convert(source)
    report = convert(source, names_of=wanted(**{"tokens.embedding_table": (3, 2)}))
    assert targets(report)["tokens.embedding_table"] == ("tokens.weight",)


def test_kinds_are_stated_by_pattern(tmp_path: Path) -> None:
    more = {f"{name}.weight": np.ones((3, 2), "f4") for name in ("a.x", "a.y", "b")}
    source = source_of(tmp_path, **more)
    report = convert(source, kinds={"a.*": "embedding", "b": "linear"})
    assert {"a.x.embedding_table", "a.y.embedding_table", "b.weight"} <= set(targets(report))
    convert(source, kinds={"*": "embedding", "b": "linear"})  # a path comes before patterns
    for wrong, said in (
        ({"c": "linear"}, "'c'"),
        ({"b": "conv2d"}, "kind of b"),
        ({"f*": "conv2d"}, r"'f\*'"),
    ):
        with pytest.raises(ArgumentError, match=said):
            convert(source, kinds={"a.*": "embedding", "b": "linear", **wrong})


def encoder_layer(folder: Path, start: str, **more: np.ndarray) -> Path:
    named = MHAWeights.random(SPEC).to_layout("torch", SPEC, prefix=f"{start}self_attn")
    named |= {f"{start}linear{n}.weight": np.ones((4, 4), "f4") for n in (1, 2)}
    named |= {f"{start}norm{n}.weight": np.ones(4, "f4") for n in (1, 2)}
    np.savez(folder / "layer.npz", **named, **{start + name: array for name, array in more.items()})
    return folder / "layer.npz"


@pytest.mark.parametrize("start", ["", "encoder.layers.0."])
def test_parts_of_transformer_layers_have_the_frameworks_names(start: str, tmp_path: Path) -> None:
    found = targets(convert(encoder_layer(tmp_path, start)))
    assert {f"{start}dense1.weight", f"{start}norm2.gamma"} < set(found)
    back = convert_checkpoint(tmp_path / "target.npz", tmp_path / "back.npz", to="megengine")
    assert {f"{start}linear1.weight", f"{start}norm2.weight"} < set(targets(back))


def test_somebodys_own_layer_keeps_its_names(tmp_path: Path) -> None:
    more = {"gate.weight": np.ones((4, 4), "f4")}
    assert "a.linear1.weight" in targets(convert(encoder_layer(tmp_path, "a.", **more)))
    names_of = {
        name.replace("dense", "linear"): shape
        for name, shape in ((entry.target, entry.after) for entry in convert(encoder_layer(tmp_path, "a.")).entries)
    }
    assert "a.linear1.weight" in targets(convert(encoder_layer(tmp_path, "a."), names_of=names_of))


# -- options that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "tensorflow"}, "to: given 'tensorflow'; expected one of torch, mindspore, megengine, mindspore.mint"),
        ({"to": "PyTorch"}, "Did you mean torch"),
        ({"to": "Mindspore 2.0"}, "Did you mean mindspore.*follows an @"),
        ({"to": " "}, "to: given ' '"),
        ({"to": "torch@x"}, "version"),
        ({"kinds": {"embedd": "embedding"}}, "kinds: given 'embedd'.*Close to it: embed"),
        ({"to": "torch@1.0"}, r"to: given 'torch@1\.0'; expected a version that is known: torch@1\.5 to torch@2\.13"),
        ({"to": "torch@2.14"}, "torch@1.5 to torch@2.13"),
        ({"to": "mindspore@9.9"}, r"to: given 'mindspore@9\.9'; .* mindspore@2\.0 to mindspore@2\.10"),
        ({"to": "mindspore.mint@9.9"}, r"mindspore@2\.0 to mindspore@2\.10"),
        ({"source": "megengine@2.0"}, r"source: given 'megengine@2\.0'; .* megengine@1\.13"),
        ({"layout": "mindspore@1.9"}, r"layout: given 'mindspore@1\.9'"),
        ({"layout": "mindspore@9.9"}, r"layout: given 'mindspore@9\.9'; .* mindspore@2\.10"),
        ({"source": "keras"}, "source: given 'keras'"),
        ({"layout": "bert"}, "Did you mean hf-bert"),
        ({"to": None, "num_heads": 2}, "num_heads: given 2, and no framework to convert to"),
        ({"to": None, "layout": "hf-bert"}, "layout"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        convert(source_of(tmp_path), **{"to": "torch", **options})
    assert not (tmp_path / "target.npz").exists()


@pytest.mark.parametrize(
    "options",
    [{"drop": 3}, {"drop": [3]}, {"allow_missing": 3}, {"kinds": "a=b"}, {"kinds": {"a": None}}, {"to": 3}],
)
def test_options_of_the_wrong_kind(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError):
        convert(source_of(tmp_path), **{"to": "torch", **options})
    with pytest.raises(ArgumentTypeError, match="dst: given None"):
        convert_checkpoint(source_of(tmp_path), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"workers": "a"}, ArgumentTypeError),
        ({"workers": True}, ArgumentTypeError),
        ({"workers": 0}, ArgumentError),
        ({"workers": -1}, ArgumentError),
        ({"shard_size": "5"}, ArgumentTypeError),
        ({"shard_size": -1}, ArgumentError),
        ({"shard_size": 0}, ArgumentError),
        ({"progress": 5}, ArgumentTypeError),
        ({"nested": 5}, ArgumentTypeError),
        ({"nested": ("model", 5)}, ArgumentTypeError),
        ({"names_of": {"a": 5}}, ArgumentTypeError),
        ({"names_of": {"a": (-1,)}}, ArgumentTypeError),
        ({"names_of": {5: (1,)}}, ArgumentTypeError),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    (name,) = options
    for target in ("b.npz", "b.safetensors.index.json"):
        with pytest.raises(error, match=f"^{name}: given "):
            convert_checkpoint(source_of(tmp_path), tmp_path / target, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["source.npz"]
    if name == "nested":
        with pytest.raises(ArgumentTypeError, match=r"^nested: given "):
            inspect_checkpoint(tmp_path / "source.npz", **options)


def test_nothing_is_lost_by_writing_over_the_source(tmp_path: Path) -> None:
    file = torch_file(tmp_path, {"state_dict": state(), "epoch": 3, "optimizer": {"state": {0: np.ones(2)}}})
    before = file.read_bytes()
    os.symlink(file, tmp_path / "link.pth")
    for target in (file, tmp_path / "link.pth"):
        with pytest.raises(CheckpointError, match="the source itself, without optimizer"):
            convert_checkpoint(file, target, force=True)
        with pytest.raises(CheckpointError, match=r"the source itself, without \w+"):
            convert_checkpoint(file, target, force=True, drop=next(iter(state())), dry_run=True)
    assert file.read_bytes() == before
    source = source_of(tmp_path)
    assert convert_checkpoint(source, source, force=True, to="mindspore").verified  # all of it is there afterwards


@pytest.mark.parametrize(
    "to", ["torch@1.12.1+cpu", "torch@2.13.5", "mindspore@2.4", "mindspore@2.10.1rc1", "megengine@1.13.0"]
)
def test_versions_between_the_known_ones_are_fine(to: str, tmp_path: Path) -> None:
    convert(source_of(tmp_path), to)


def test_dtypes_that_the_target_does_not_have_are_noted(tmp_path: Path) -> None:
    rows = {f"table.{n}": outgoing(f"table.{n}", "bfloat16", np.ones(2)) for n in range(3)}
    source = written(tmp_path / "a.safetensors", safetensors_file, list(rows.values()), [], {})
    old = "bfloat16 (table.0 and 2 more): MindSpore 2.0 has no bfloat16: load_checkpoint fails on it (KeyError)."
    for to, notes in (("mindspore@2.0", [old]), ("mindspore@2.10", []), ("mindspore", []), ("torch@1.8", [])):
        report = convert_checkpoint(source, tmp_path / "b.ckpt", to=to, force=True)
        assert [note for note in report.notes if "bfloat16" in note] == notes, to
    report = convert_checkpoint(source, tmp_path / "b.pkl", to="megengine")
    assert report.notes[0].startswith("bfloat16 (table.0 and 2 more): load_state_dict refuses it")


def test_a_file_of_a_newer_framework_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"x.gamma": np.ones(2, "f4")})
    made = {"mhabridge": 1, "framework": "mindspore@9.9", "attention": {}, "kinds": {"x": "norm"}}
    (tmp_path / "a.npz.mhabridge.json").write_text(json.dumps(made))
    assert set(targets(convert(tmp_path / "a.npz", "torch"))) == {"x.weight"}


def test_without_a_framework_nothing_changes_but_the_container(tmp_path: Path) -> None:
    report = convert(source_of(tmp_path), None, rename="attn.*=attention.*")
    assert report.counts == {"unchanged": 10}
    assert names(tmp_path / "target.npz")[0] == "attention.in_proj_weight"


def test_one_layer_under_a_prefix(tmp_path: Path) -> None:
    with open_checkpoint(source_of(tmp_path, "model.")) as file:
        plan = planning.make(file, planning.Options(to="megengine", prefix="model.attn"))
        assert [(one.name, one.shape) for one in plan.outgoing] == [("io_weight_bias", (1, 80))]
        with pytest.raises(WeightsError, match="nothing: given no tensor with this prefix"):
            planning.make(file, planning.Options(to="megengine", prefix="nothing"))


# -- the forms of state dicts ------------------------------------------------------------------------------------------


def torch_file(folder: Path, state: Any) -> Path:
    torch = pytest.importorskip("torch")
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def bits(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_checkpoint(file) as opened:
        return {n: (t.dtype, t.shape, b"".join(map(bytes, opened.chunks(t)))) for n, t in opened.items()}


def state() -> Any:
    """Every dtype, views, scalars, empty and tied tensors."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return OrderedDict(
        {
            "turned": base.t(),
            "row": base[1],
            "column": base[:, 2],
            "tied": base,
            "tied too": base,
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            **{str(dtype): torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)},
            **{str(dtype): torch.arange(3).to(dtype) for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool)},
        }
    )


@pytest.mark.frameworks
@pytest.mark.parametrize("nested", [(), ("state_dict",), ("model",), ("checkpoint", "model_state_dict")])
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".npz", ".pkl"])
def test_every_form_of_a_tensor_arrives(ending: str, nested: tuple[str, ...], tmp_path: Path) -> None:
    content = state()
    for key in reversed(nested):
        content = {key: content}
    source = torch_file(tmp_path, content)
    there, back = tmp_path / f"b{ending}", tmp_path / "c.pth"
    assert convert_checkpoint(source, there, to="torch").verified
    assert bits(there) == bits(source)
    assert len(bits(source)) == 14
    assert convert_checkpoint(there, back, to="torch").verified
    assert bits(back) == bits(source)


@pytest.mark.frameworks
def test_an_empty_tensor_has_no_place_in_a_mindspore_checkpoint(tmp_path: Path) -> None:
    source = torch_file(tmp_path, state())
    with pytest.raises(CheckpointError, match="empty"):
        convert_checkpoint(source, tmp_path / "b.ckpt", to="torch")
    assert list(tmp_path.iterdir()) == [source]
    assert convert_checkpoint(source, tmp_path / "b.ckpt", to="torch", drop="empty").verified


@pytest.mark.frameworks
def test_entries_that_are_no_tensors_are_kept_or_listed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = torch_file(tmp_path, {"state_dict": {"x": torch.ones(2)}, "epoch": 3, "args": {"lr": 0.1, "name": "a"}})
    for ending in (".pth", ".pkl", ".safetensors", ".ckpt", ".npz"):
        report = convert_checkpoint(source, tmp_path / f"b{ending}", to="torch")
        assert report.verified
        told = " ".join((*report.kept, *report.left_out))
        assert "epoch" in told, ending
        assert "lr" in told or "args" in told, ending
        with open_checkpoint(tmp_path / f"b{ending}") as opened:
            assert "x" in opened
            found = {entry.name for entry in opened.objects} | set(opened)
            assert set(report.kept) <= found, ending


@pytest.mark.frameworks
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_say_what_they_are_and_how_many(protocol: int, tmp_path: Path) -> None:
    more = {"s": {1, 2, 3}, "e": set(), "f": frozenset([1, 2]), "o": OrderedDict(a=1), "t": (1,)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": np.ones(2, "f4"), **more}, protocol))
    assert inspect_checkpoint(tmp_path / "a.pkl").objects == {
        "s": "a set of 3 entries",
        "e": "a set of 0 entries",
        "f": "a frozenset of 2 entries",
        "o": "a dict of 1 entries",
        "t": "a tuple of 1 entries",
    }


def test_objects_that_would_be_made_by_code_are_refused_or_listed(tmp_path: Path) -> None:
    import argparse

    torch = pytest.importorskip("torch")
    source = torch_file(tmp_path, {"state_dict": {"x": torch.ones(2)}, "opt": argparse.Namespace(lr=1)})
    with pytest.raises(CheckpointError, match=r"opt: given objects .* by argparse.Namespace"):
        convert_checkpoint(source, tmp_path / "b.npz", to="torch")
    report = convert_checkpoint(source, tmp_path / "b.npz", to="torch", ignore_objects=True)
    assert report.verified
    assert len(report.left_out) == 1
    assert report.left_out[0].startswith("opt: left out")


def test_bfloat16_keeps_its_bits_in_every_container(tmp_path: Path) -> None:
    words = np.array([0x3F80, 0x7FC1, 0xFF80, 1], np.uint16)
    values = words.view(ml_dtypes.bfloat16)
    at = written(tmp_path / "0.safetensors", safetensors_file, [outgoing("x", "bfloat16", values)])
    for number, ending in enumerate((".pth", ".ckpt", ".pkl", ".npz", ".safetensors"), 1):
        target = tmp_path / f"{number}{ending}"
        assert convert_checkpoint(at, target, to="torch").verified
        at = target
        assert bits(at) == {"x": ("bfloat16", (4,), words.tobytes())}


# -- whose names a file has --------------------------------------------------------------------------------------------


def plain_file(folder: Path, content: dict[str, np.ndarray], ending: str = ".safetensors") -> Path:
    """A file without a mark: nothing but names tells whose it is."""
    writer = safetensors_file if ending == ".safetensors" else npz_writing
    return written(folder / f"a{ending}", writer, [outgoing(name, "float32", one) for name, one in content.items()])


def vision_transformer() -> dict[str, np.ndarray]:
    """Some of a timm vision transformer, with the gamma of its LayerScale, and a convolution with a flat kernel."""
    found = {"patch_embed.proj.weight": np.ones((4, 3, 2, 2)), "patch_embed.proj.bias": np.ones(4)}
    for path in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        found.update({f"{path}.weight": np.ones(4), f"{path}.bias": np.zeros(4)})
    return {**found, "blocks.0.ls1.gamma": np.ones(4), "flat.weight": np.ones((4, 3, 1, 3))}


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_one_gamma_does_not_make_a_file_mindspores(ending: str, tmp_path: Path) -> None:
    source = plain_file(tmp_path, vision_transformer(), ending)
    for to in ("torch", "megengine"):
        report = convert_checkpoint(source, tmp_path / f"{to}.npz", to=to)
        assert "blocks.0.ls1.gamma" in targets(report)
        assert sum(count for rule, count in report.counts.items() if rule.startswith("conv2d")) == 3
        assert f"a{ending}: not read as MindSpore's although blocks.0.ls1.gamma is there: 3 layers have" in "".join(
            report.notes
        )
    said = convert_checkpoint(source, tmp_path / "said.npz", to="torch", source="torch", dry_run=True)
    assert [entry.target for entry in said.entries] == [entry.target for entry in report_of(source).entries]
    assert not any("read as" in note for note in said.notes)


def report_of(source: Path, to: str = "torch") -> ConversionReport:
    return convert_checkpoint(source, source.with_name("unwritten.npz"), to=to, dry_run=True)


@pytest.mark.parametrize(
    ("content", "own"),
    [
        ({"n.gamma": 4, "n.beta": 4}, True),
        ({"n.gamma": 4, "n.beta": 4, "m.gamma": 4, "m.beta": 4, "mint.weight": 4, "mint.bias": 4}, True),
        ({"n.gamma": 4, "n.beta": 4, "a.weight": 4, "a.bias": 4, "b.weight": 4, "b.bias": 4}, False),
        ({"n.gamma": 4}, False),  # a LayerScale; a norm of MindSpore's without a beta says so by --from
        ({"ls.gamma": 4, "n.gamma": 4, "n.beta": 4}, True),
        ({"n.gamma": 4, "a.weight": 4, "a.bias": 4}, False),
        ({"bn.moving_mean": 4, "bn.moving_variance": 4, "a.weight": 4, "a.bias": 4, "n.gamma": 4}, True),
    ],
)
def test_names_are_weighed(content: dict[str, int], own: bool, tmp_path: Path) -> None:
    source = plain_file(tmp_path, {name: np.ones(size) for name, size in content.items()})
    report = report_of(source)
    assert ("n.weight" in targets(report)) == own or "n.gamma" not in content
    assert ("bn.running_mean" in targets(report)) == ("bn.moving_mean" in content)
    assert any("a.safetensors: read as MindSpore's: " in note for note in report.notes) == own
    assert any("not read as MindSpore's" in note for note in report.notes) != own


def test_a_packed_vector_is_megengines(tmp_path: Path) -> None:
    source = plain_file(tmp_path, {"attn.io_weight_bias": np.ones((1, 80))})
    report = convert_checkpoint(source, tmp_path / "b.npz", to="torch", spec=SPEC, dry_run=True)
    assert "read as MegEngine's: only its layers have io_weight_bias" in "".join(report.notes)
    assert not any("read as" in note for note in report_of(source_of(tmp_path)).notes)


@pytest.mark.parametrize(
    ("to", "ending", "said"), [("torch", ".ckpt", "MindSpore's"), ("megengine", ".pth", "PyTorch's")]
)
def test_names_in_another_frameworks_format_are_noted(to: str, ending: str, said: str, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    report = convert_checkpoint(source, tmp_path / f"b{ending}", to=to)
    assert f"is {said} own format" in " ".join(report.notes)
    for other, goal in ((None, ending), (to, ".npz"), (to, ".safetensors")):
        report = convert_checkpoint(source, tmp_path / f"c{goal}", to=other, force=True)
        assert "own format" not in " ".join(report.notes)
