"""Every kind of layer in mappings/ against the real layer of every framework: saved, converted, loaded, run."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge import mapping
from mhabridge.backends import shipping
from mhabridge.backends.worker import Worker
from mhabridge.checkpoint.conversion import ConversionReport, convert_checkpoint
from mhabridge.checkpoint.fingerprints import fingerprint
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.planning import kinds, modules
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError
from tests import worker_layers
from tests.conftest import _infos as infos
from tests.conftest import _ready as ready

ENDINGS = {"torch": ".pth", "mindspore": ".ckpt", "mindspore.mint": ".ckpt", "megengine": ".pkl"}

# float32 answers of single layers to numbers of the size of 1; 2e-6 was measured (MindSpore's convolutions).
CLOSE = 1e-5


@functools.cache
def megengine() -> Worker:
    info = infos()["megengine"]
    own = Path(worker_layers.__file__).read_text(encoding="utf-8")
    modules_there = {"mhabridge.bridge": shipping.source("mhabridge.bridge"), "trial": own}
    return Worker(info.python, info.framework, extra_modules=modules_there)


@pytest.fixture(scope="module", autouse=True)
def _worker_ends() -> Iterator[None]:
    yield
    if megengine.cache_info().currsize:
        megengine().close()
    megengine.cache_clear()


def ask(function: str, dialect: str, case: str, file: Path) -> Any:
    """Have a dialect's framework run a function of worker_layers: here, or in its environment."""
    payload = {"dialect": dialect, "case": case, "file": str(file)}
    name = dialect.partition(".")[0]
    ready(name)
    if infos()[name].where == "here":
        answer = getattr(worker_layers, function)(name, payload)
    else:
        answer = megengine().call(f"trial:{function}", payload, timeout=100)
    return answer.get("output")


def kind_of(case: str) -> str:
    """The kind of a case, as the user states it."""
    name, args, options, _ = worker_layers.CASES[case]
    groups = options.get("groups", 1)
    if groups > 1:
        return f"grouped_{name}:{groups}"
    if (name, args) == ("prelu", (1,)):
        return "prelu_of_one"
    for kind, names in {"norm": ("layer_norm", "group_norm"), "batch_norm": ("batch_norm1d", "batch_norm2d")}.items():
        if name in names:
            return kind
    return str(name)


def arrays_of(file: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(file) as opened:
        return {name: opened.read(name) for name in opened if not name.endswith("num_batches_tracked")}


def lacking(case: str, *dialects: str) -> bool:
    """Whether a framework has no such layer: MegEngine by its table, and mindspore.mint some of PyTorch's."""
    kind = kind_of(case).partition(":")[0]
    mint = "mindspore.mint" in dialects and kind in ("conv_transpose1d", "conv_transpose3d")
    return mint or any(kind not in modules.kinds_of(dialect) for dialect in dialects)


# -- against the real layers -------------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("dialect", "case"),
    [(dialect, case) for dialect in ENDINGS for case in worker_layers.CASES if not lacking(case, dialect)],
)
def test_the_tables_have_the_real_names_and_shapes(dialect: str, case: str) -> None:
    real = {name: tuple(shape) for name, shape in ask("shapes", dialect, case, Path()).items()}
    kind = kind_of(case)
    choice = kinds.stated("layer", modules.readings(real, dialect), kind, dialect)
    assert dict(choice.written(dialect).values()) == real
    optional = {part.name for part in modules.kinds_of(dialect)[choice.reading.kind].parts if part.optional}
    listed = {part.name for part in modules.kinds_of(dialect)[choice.reading.kind].parts}
    assert real.keys() <= listed
    assert listed - real.keys() <= optional


def test_every_kind_of_the_tables_has_a_case() -> None:
    kinds_of_cases = {kind_of(case).partition(":")[0] for case in worker_layers.CASES}
    for dialect in modules.known_dialects():
        assert modules.kinds_of(dialect).keys() <= kinds_of_cases
    assert modules.kinds_of("torch").keys() == kinds_of_cases


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("source", "target", "case"),
    [
        (*pair, case)
        for pair in itertools.permutations(ENDINGS, 2)
        for case in worker_layers.CASES
        if not lacking(case, *pair)
    ],
)
def test_a_layer_answers_the_same_in_another_framework(source: str, target: str, case: str, tmp_path: Path) -> None:
    first, second, back = (tmp_path / f"{n}{ENDINGS[d]}" for n, d in enumerate((source, target, source)))
    expected = ask("save", source, case, first)
    said: dict[str, Any] = {"source": source, "kinds": {worker_layers.PATH: kind_of(case)}}
    assert convert_checkpoint(first, second, to=target, **said).verified is True
    found = ask("load", target, case, second)
    if expected is not None and found is not None:
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < CLOSE
    assert convert_checkpoint(second, back, to=source).verified is True  # what travels with it says the kind
    before, after = arrays_of(first), arrays_of(back)
    assert {name: (array.shape, array.tobytes()) for name, array in before.items()} == {
        name: (array.shape, array.tobytes()) for name, array in after.items()
    }
    assert fingerprint(second).all == fingerprint(back).all


# -- which kind it is --------------------------------------------------------------------------------------------------


def decided(path: str, shape: tuple[int, ...], source: str, target: str, **wanted: Any) -> str:
    found = modules.readings({"weight": shape}, source)
    return str(kinds.decide(path, found, target, **wanted))


@pytest.mark.parametrize(
    ("path", "shape", "source", "target", "kind"),
    [
        ("wte", (9, 4), "torch", "mindspore", "embedding"),
        ("encoder.embed_tokens", (9, 4), "torch", "mindspore", "embedding"),
        ("embed_out", (9, 4), "torch", "mindspore", "linear"),  # GPT-NeoX's head
        ("classifier.3", (9, 4), "torch", "mindspore", "linear"),
        ("blocks.2.fc1", (9, 4), "torch", "mindspore", "linear"),
        ("x", (9, 4), "torch", "megengine", "linear"),  # an embedding would be written in the same way
        ("x", (9, 4), "mindspore", "torch", "linear"),  # an embedding is called otherwise there
        ("blocks.2.dw", (8, 1, 3, 3), "torch", "megengine", "grouped_conv2d:8"),
        ("stem.conv1", (8, 1, 3, 3), "torch", "megengine", "conv2d"),
        ("stem.0", (8, 3, 3, 3), "torch", "megengine", "conv2d"),
        ("stem.0", (8, 3, 1, 1), "mindspore", "torch", "conv2d"),  # and not a conv1d
        ("conv1d", (8, 3, 1, 1), "mindspore", "torch", "conv1d"),
        ("stem.0", (8, 3, 3, 3), "megengine", "torch", "conv2d"),  # and not a grouped conv1d
        ("conv3d_1", (8, 1, 3, 3, 3), "megengine", "torch", "conv3d"),
        ("stem.act", (8,), "torch", "mindspore", "prelu"),
        ("stem.ln_1", (8,), "torch", "mindspore", "norm"),
        ("stem.act", (1,), "torch", "megengine", "prelu_of_one"),
    ],
)
def test_hints_decide(path: str, shape: tuple[int, ...], source: str, target: str, kind: str) -> None:
    assert decided(path, shape, source, target) == kind


@pytest.mark.parametrize(
    ("path", "shape", "source", "target", "listed"),
    [
        ("x", (9, 4), "torch", "mindspore", ["linear (weight (9, 4))", "embedding (embedding_table (9, 4))"]),
        ("x", (8, 1, 3, 3), "torch", "megengine", ["conv2d (weight (8, 1, 3, 3))", "(weight (8, 1, 1, 3, 3))"]),
        ("x", (8, 1, 3, 3, 3), "megengine", "torch", ["conv3d", "grouped_conv2d"]),
        ("x", (8,), "torch", "mindspore", ["norm (gamma (8,))", "prelu (w (8,))"]),
    ],
)
def test_two_readings_are_listed(
    path: str, shape: tuple[int, ...], source: str, target: str, listed: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        decided(path, shape, source, target)
    assert all(text in str(caught.value) for text in listed), str(caught.value)


def test_the_targets_names_and_shapes_decide() -> None:
    table = {"embedding_table": (9, 4)}
    assert decided("x", (9, 4), "torch", "mindspore", wanted=table) == "embedding"
    assert decided("x", (9, 4), "torch", "mindspore", wanted={"weight": (9, 4)}) == "linear"
    groups = {"weight": (4, 2, 3, 5, 5)}  # no shape in PyTorch tells of four groups
    assert decided("x", (8, 3, 5, 5), "torch", "megengine", wanted=groups) == "grouped_conv2d:4"


def test_what_is_stated_must_fit() -> None:
    found = modules.readings({"weight": (8, 3, 5, 5)}, "torch")
    assert str(kinds.stated("x", found, "grouped_conv2d:4", "megengine")) == "grouped_conv2d:4"
    for wrong in ("linear", "grouped_conv2d:x", "conv2", "", "grouped_conv2d", "grouped_conv2d:1", "grouped_conv2d:0",
                  "conv2d:4", "conv2d:", "grouped_conv2d:" + "9" * 10_000):  # fmt: skip
        with pytest.raises(ArgumentError, match="kind of x"):
            kinds.stated("x", found, wrong, "megengine")
    with pytest.raises(ArgumentError, match="a divisor of 8"):
        kinds.stated("x", found, "grouped_conv2d:3", "megengine")
    with pytest.raises(ArgumentError, match="In groups it is grouped_conv2d:4"):
        kinds.stated("x", found, "conv2d:4", "megengine")
    one = modules.readings({"weight": (1, 3, 5, 5)}, "torch")
    with pytest.raises(ArgumentError, match="grouped_conv2d"):
        kinds.stated("x", one, "grouped_conv2d:2", "megengine")
    told = modules.readings({"weight": (4, 2, 3, 5, 5)}, "megengine")
    assert str(kinds.stated("x", told, "grouped_conv2d", "torch")) == "grouped_conv2d:4"
    assert str(kinds.stated("x", told, "grouped_conv2d:4", "torch")) == "grouped_conv2d:4"
    for wrong in ("grouped_conv2d:2", "linear:1"):
        with pytest.raises(ArgumentError, match="kind of x"):
            kinds.stated("x", told + modules.readings({"weight": (4, 2)}), wrong, "torch")


def test_a_layer_that_the_target_does_not_have_is_refused() -> None:
    found = modules.readings({"weight": (6, 4, 3), "bias": (4,)}, "torch")
    with pytest.raises(UnsupportedError, match="conv_transpose1d"):
        kinds.decide("up", found, "megengine")


def test_doubts_are_told_in_one_note(tmp_path: Path) -> None:
    pixels = {f"down.{n}.weight": np.ones((4, 3, 1, 1), "f4") for n in range(6)}
    np.savez(tmp_path / "a.npz", **pixels)
    report = convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.pth", to="torch", source="mindspore")
    assert report.notes[0] == (
        "down.0, down.1, down.2, down.3 and 2 more: read as conv2d; by names and shapes it could be conv1d (--kind)."
    )
    said = {"down.*": "conv1d"}
    report = convert_checkpoint(tmp_path / "a.npz", tmp_path / "c.pth", to="torch", source="mindspore", kinds=said)
    assert {entry.after for entry in report.entries} == {(4, 3, 1)}
    assert not any("read as" in note for note in report.notes)


def entry_of(report: ConversionReport, name: str) -> tuple[Any, str]:
    return next((entry.after, entry.rule) for entry in report.entries if entry.target == name)


def test_groups_are_a_decision_that_is_shown_counted_and_remembered(tmp_path: Path) -> None:
    weight = np.arange(8 * 3 * 4, dtype="f4").reshape(8, 3, 2, 2)  # in 4 groups: no shape of PyTorch's tells
    np.savez(tmp_path / "a.npz", **{"stem.weight": weight})
    convert = functools.partial(convert_checkpoint, force=True)
    open_rule, note = "conv2d; could be grouped_conv2d", "stem: read as conv2d; by names and shapes it could be"

    for source in ("a.npz", "mindspore.npz"):  # what travels with the second one is no decision either
        convert(tmp_path / "a.npz", tmp_path / "mindspore.npz", to="mindspore", source="torch")
        report = convert(tmp_path / source, tmp_path / "b.npz", to="megengine")
        assert entry_of(report, "stem.weight") == ((8, 3, 2, 2), open_rule)
        assert report.counts == {open_rule: 1}
        assert report.notes[0].startswith(note)

    said = {"stem": "grouped_conv2d:4"}
    for to in ("torch", "mindspore", "megengine"):
        convert(tmp_path / "a.npz", tmp_path / f"{to}.npz", to=to, kinds=said)
        report = convert(tmp_path / f"{to}.npz", tmp_path / "b.npz", to="megengine")
        assert entry_of(report, "stem.weight") == ((4, 2, 3, 2, 2), "grouped_conv2d:4"), to
        assert not any("read as" in one for one in report.notes)
        back = convert(tmp_path / "b.npz", tmp_path / "c.npz", to="torch")
        assert entry_of(back, "stem.weight") == ((8, 3, 2, 2), "grouped_conv2d:4"), to
        report = convert(tmp_path / "c.npz", tmp_path / "d.npz", to="megengine")
        assert entry_of(report, "stem.weight")[0] == (4, 2, 3, 2, 2), to

    for to in ("torch", "mindspore", "megengine"):  # that it has none is remembered, too
        convert(tmp_path / "a.npz", tmp_path / f"{to}.npz", to=to, kinds={"stem": "conv2d"})
        report = convert(tmp_path / f"{to}.npz", tmp_path / "b.npz", to="megengine")
        assert entry_of(report, "stem.weight") == ((8, 3, 2, 2), "conv2d"), to


def test_a_kind_that_travels_and_does_not_fit_is_of_another_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"stem.weight": np.ones((8, 3, 2, 2), "f4")})
    for kind in ("grouped_conv2d:3", "grouped_conv2d", "conv2d:x", "linear", "unknown:4"):
        made = {"mhabridge": 1, "framework": "torch", "attention": {}, "kinds": {"stem": kind}}
        (tmp_path / "a.npz.mhabridge.json").write_text(json.dumps(made))
        with pytest.raises(CheckpointError, match=r"belongs to another file.*stem"):
            convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.npz", to="megengine")
        fingerprint(tmp_path / "a.npz")


def test_the_targets_shapes_settle_the_groups(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"stem.weight": np.ones((8, 3, 2, 2), "f4")})
    for shape, rule in (((8, 3, 2, 2), "conv2d"), ((2, 4, 3, 2, 2), "grouped_conv2d:2")):
        report = convert_checkpoint(
            tmp_path / "a.npz", tmp_path / "b.npz", to="megengine", names_of={"stem.weight": shape}, force=True
        )
        assert entry_of(report, "stem.weight") == (shape, rule)
        assert not any("read as" in note for note in report.notes)


@pytest.mark.timeout(30)
def test_a_hostile_number_of_channels_takes_no_time(tmp_path: Path) -> None:
    shape = (2**60, 0, 1, 1)
    choice = kinds.decide("x", modules.readings({"weight": shape}, "torch"), "megengine")
    assert choice.others == ("grouped_conv2d",)
    wanted = {"weight": (2**59, 2, 0, 1, 1)}
    assert kinds.decide("x", modules.readings({"weight": shape}, "torch"), "megengine", wanted).groups == 2**59


@pytest.mark.parametrize("to", ["mindspore", "megengine", "mindspore.mint"])
def test_bilinear_layers_are_no_convolutions(to: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.ModuleDict({"bilinear": torch.nn.Bilinear(4, 3, 5), "pair": torch.nn.Bilinear(4, 3, 5)})
    torch.save(model.state_dict(), tmp_path / "a.pth")
    report = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.npz", to=to, kinds={"pair": "unknown"})
    unchanged = "unchanged: no known kind of layer"
    assert report.counts == {unchanged: 4}
    assert entry_of(report, "bilinear.weight") == ((5, 4, 3), unchanged)
    back = convert_checkpoint(tmp_path / "b.npz", tmp_path / "c.npz", to="torch", source="torch")
    assert back.counts == {unchanged: 4}  # what was said of `pair` travels
    for name, said in (("bilinear", {"bilinear": "conv1d"}), ("pair", {"pair": "conv1d"})):
        stated = convert_checkpoint(tmp_path / "a.pth", tmp_path / "d.npz", to=to, kinds=said, force=True)
        assert entry_of(stated, f"{name}.weight")[1] == "conv1d"


def test_no_reading_of_what_does_not_fit_together() -> None:
    assert modules.readings({"weight": (4, 3), "bias": (3,)}) == []
    assert modules.readings({"weight": (4, 3), "scale": (4,)}) == []
    assert modules.readings({"weight": (2, 2, 3, 5, 5), "bias": (1, 5, 1, 1)}, "megengine") == []
    assert modules.readings({"bias": (3,)}) == []


def test_the_hints_speak_of_kinds_that_there_are() -> None:
    known = modules.kinds_of("torch").keys()
    table = mapping.table("layouts")
    assert set(table["unlikely"]["kinds"]) <= known
    assert all(hints.keys() <= known for hints in table["hints"])
