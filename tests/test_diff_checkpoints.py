"""Two checkpoints are equal when their weights are, whatever the framework, format and layout; and in no other case."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.storage.memory import Scratch
from mhabridge.diff.checkpoints import diff_checkpoints, streaming, working
from mhabridge.diff.checkpoints.streaming import Side
from mhabridge.diff.comparing import compare
from mhabridge.diff.report import DiffReport, Entry
from mhabridge.errors import ArgumentError, CheckpointError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

SPEC = MHASpec(16, 4)
LAYERS = ("encoder.0.self_attn", "encoder.1.self_attn")
Arrays = dict[str, np.ndarray]


def attention(layout: str = "hf-bert", spec: MHASpec = SPEC, prefixes: tuple[str, ...] = LAYERS) -> Arrays:
    found: Arrays = {}
    for seed, prefix in enumerate(prefixes):
        found.update(MHAWeights.random(spec, seed=seed).to_layout(layout, spec, prefix=prefix))
    return found


def model(layout: str = "hf-bert", **options: Any) -> Arrays:
    rng = np.random.default_rng(5)
    found = attention(layout, **options)
    found["encoder.embedding.weight"] = rng.standard_normal((10, 16), "f4")
    found["encoder.norm.weight"] = rng.standard_normal(16, "f4")
    found["encoder.norm.bias"] = rng.standard_normal(16, "f4")
    found["encoder.fc.weight"] = rng.standard_normal((12, 16), "f4")
    return found


def saved(path: Path, named: Arrays) -> Path:
    np.savez(path, **named)
    return path.with_name(path.name + ("" if path.name.endswith(".npz") else ".npz"))


def of(folder: Path, first: Arrays, second: Arrays, **options: Any) -> DiffReport:
    return diff_checkpoints(saved(folder / "a.npz", first), saved(folder / "b.npz", second), **options)


def wrong(report: DiffReport) -> dict[str, str]:
    return {f"{e.layer}.{e.tensor}": e.comparison.verdict for e in report.entries if e.comparison.verdict != "equal"}


def entry(report: DiffReport, layer: str, tensor: str) -> Entry:
    return next(one for one in report.entries if (one.layer, one.tensor) == (layer, tensor))


def notes(report: DiffReport) -> str:
    return "\n".join([*report.notes, *(note for layer in report.layers for note in layer.notes)])


# -- what is equal --


@pytest.mark.parametrize("layout", ["torch", "mindspore", "megengine", "hf-vit", "hf-bart", "fused-qkv", "gpt2"])
def test_no_layout_makes_a_difference(layout: str, tmp_path: Path) -> None:
    report = of(tmp_path, model(), model(layout))
    assert (report.verdict, report.ok, len(report.entries)) == ("equal", True, 2 * 8 + 4)
    assert [one.tensor for one in report.of_layer(LAYERS[0])][:2] == ["q_weight", "k_weight"]
    assert {one.comparison.cosine for one in report.entries} == {1.0}
    report = of(tmp_path, model(layout), model())
    assert (report.verdict, len(report.entries), report.diagnoses) == ("equal", 20, ())


@pytest.mark.parametrize("ending", [".safetensors", ".safetensors.index.json", ".pth", ".ckpt", ".pkl"])
@pytest.mark.parametrize("to", ["torch", "mindspore", "megengine"])
def test_no_format_and_no_framework_makes_a_difference(ending: str, to: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.npz", model("torch"))
    target = tmp_path / f"b{ending}"
    convert_checkpoint(source, target, to=to, num_heads=4, shard_size=2000)
    report = diff_checkpoints(source, target)
    assert (report.verdict, len(report.entries)) == ("equal", 20)
    assert report.runs[1].framework == to
    (tmp_path / f"b{ending}.mhabridge.json").unlink(missing_ok=True)
    assert diff_checkpoints(source, target).verdict == "equal"  # the other side tells the sizes
    damaged = dict(model("torch"))
    damaged["encoder.1.self_attn.out_proj.weight"][3, 5] += 1
    assert wrong(diff_checkpoints(saved(tmp_path / "c.npz", damaged), target)) == {f"{LAYERS[1]}.out_weight": "off"}


def test_two_packed_vectors_are_compared_without_their_sizes(tmp_path: Path) -> None:
    report = of(tmp_path, model("megengine"), model("megengine"))
    assert (report.verdict, len(report.entries)) == ("equal", 2 + 4)
    assert "tensor by tensor, not as attention" in notes(report)
    report = of(tmp_path, model("megengine"), model("megengine"), spec=SPEC)
    assert (report.verdict, len(report.entries)) == ("equal", 2 * 8 + 4)


def test_the_same_file_twice(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", model())
    report = diff_checkpoints(path, path)
    assert (report.verdict, report.exit_code) == ("equal", 0)


def test_attention_that_cannot_be_read_is_compared_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    llama = {f"x.{one}_proj.weight": rng.standard_normal((8, 8), "f4") for one in "qkvo"}
    assert of(tmp_path, llama, llama).verdict == "equal"
    other = {**llama, "x.k_proj.weight": llama["x.k_proj.weight"] + 1}
    assert wrong(of(tmp_path, llama, other)) == {"x.k_proj.weight": "off"}


# -- what is not --


def change_a_bit(named: Arrays) -> None:
    named[f"{LAYERS[1]}.self.key.weight"].view("u4")[3, 2] ^= 1


def put_nan(named: Arrays) -> None:
    named[f"{LAYERS[1]}.self.key.weight"][3, 2] = np.nan


def put_infinity(named: Arrays) -> None:
    named[f"{LAYERS[1]}.self.key.weight"][3, 2] = np.inf


@pytest.mark.parametrize(("change", "verdict"), [(change_a_bit, "off"), (put_nan, "broken"), (put_infinity, "broken")])
def test_one_element_is_found(change: Callable[[Arrays], None], verdict: str, tmp_path: Path) -> None:
    named = model()
    change(named)
    for layout in ("torch", "gpt2", "megengine"):
        report = of(tmp_path, model(layout), named)
        found = entry(report, LAYERS[1], "k_weight").comparison
        assert (wrong(report), report.exit_code) == ({f"{LAYERS[1]}.k_weight": verdict}, 1)
        assert (found.index, report.first_divergence) == ((3, 2), LAYERS[1])
    for layout in ("gpt2", "megengine"):  # transposed on both sides
        turned = MHAWeights.from_layout("hf-bert", named, SPEC, prefix=LAYERS[1])
        other = {**model(layout), **turned.to_layout(layout, SPEC, prefix=LAYERS[1])}
        report = of(tmp_path, model(layout), other, spec=SPEC)
        assert entry(report, LAYERS[1], "k_weight").comparison.index == (3, 2)
        assert wrong(report) == {f"{LAYERS[1]}.k_weight": verdict}


@pytest.mark.parametrize("inner", [16, 24])
@pytest.mark.parametrize("ending", ["ckpt", "pth"])
def test_gpt2s_other_linear_maps_lie_the_other_way_round_too(ending: str, inner: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    named = attention("gpt2", prefixes=("h.0.attn",))
    for path, shape in (("c_fc", (16, inner)), ("c_proj", (inner, 16))):
        named[f"h.0.mlp.{path}.weight"] = rng.standard_normal(shape, "f4")
        named[f"h.0.mlp.{path}.bias"] = rng.standard_normal(shape[1], "f4")
    source, target = saved(tmp_path / "a", named), tmp_path / f"b.{ending}"
    to = {"ckpt": "mindspore", "pth": "torch"}[ending]
    convert_checkpoint(source, target, to=to, num_heads=4)
    report = diff_checkpoints(source, target)
    assert (report.verdict, wrong(report)) == ("equal", {})
    convert_checkpoint(source, target, to=to, num_heads=4, rename="h.*.mlp.c_fc.*=h.*.mlp.fc1.*", force=True)
    rules = ["h.*.mlp.c_fc.*=h.*.mlp.fc1.*"]
    assert wrong(diff_checkpoints(source, target, rename=rules)) == {}
    assert wrong(diff_checkpoints(target, source, rename=["h.*.mlp.fc1.*=h.*.mlp.c_fc.*"])) == {}
    convert_checkpoint(source, target, to=to, num_heads=4, force=True)
    named["h.0.mlp.c_fc.weight"][3, 2] += 1
    report = diff_checkpoints(saved(tmp_path / "c", named), target)
    assert wrong(report) == {"h.0.mlp.c_fc.weight": "off"}
    assert entry(report, "h.0.mlp.c_fc", "weight").comparison.index == (2, 3)  # (out, in)


def test_a_model_with_a_head_calls_the_model_below_it_something(tmp_path: Path) -> None:
    named = attention("gpt2", prefixes=("h.0.attn", "h.1.attn"))
    whole = {f"transformer.{name}": one for name, one in named.items()}
    assert of(tmp_path, named, whole).verdict == "equal"


def test_nan_on_both_sides_is_broken(tmp_path: Path) -> None:
    named = model()
    put_nan(named)
    found = entry(of(tmp_path, named, named), LAYERS[1], "k_weight").comparison
    assert (found.verdict, found.side) == ("broken", "both")


def test_zeros_of_another_sign_are_rounding(tmp_path: Path) -> None:
    zeros, others = model(), model()
    zeros["encoder.norm.bias"][3], others["encoder.norm.bias"][3] = 0.0, -0.0
    assert wrong(of(tmp_path, zeros, others)) == {"encoder.norm.bias": "rounding"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_other_rounded_to_half_precision_is_rounding(dtype: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.npz", model())
    half = {name: torch_like(array.astype(dtype)) for name, array in model("torch").items()}
    target = written(tmp_path / "b.safetensors", half)
    report = diff_checkpoints(source, target)
    assert set(wrong(report).values()) == {"rounding"}
    assert (len(wrong(report)), report.ok) == (20, True)
    half["encoder.1.self_attn.out_proj.weight"].view("u2")[2, 7] ^= 64
    report = diff_checkpoints(source, written(tmp_path / "c.safetensors", half))
    assert entry(report, LAYERS[1], "out_weight").comparison.verdict == "off"
    assert entry(report, LAYERS[1], "out_weight").comparison.index == (2, 7)


def torch_like(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array)


def written(path: Path, named: Arrays) -> Path:
    from safetensors.numpy import save_file

    save_file(named, path)
    return path


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (np.zeros((1, 12), "f4"), "shape (3, 4) and (1, 12)"),
        (np.zeros((4, 3), "f4"), "shape (3, 4) and (4, 3)"),
        (np.zeros((1, 4), "f4"), "shape (3, 4) and (1, 4)"),
        (np.zeros((3, 4), "i4"), "dtype float32 and int32"),
        (None, "missing on the second side"),
    ],
)
def test_shapes_and_dtypes_must_agree(second: np.ndarray | None, reason: str, tmp_path: Path) -> None:
    other = {"y": np.ones(2, "f4"), **({} if second is None else {"x": second})}
    report = of(tmp_path, {"y": np.ones(2, "f4"), "x": np.zeros((3, 4), "f4")}, other)
    found = entry(report, "", "x").comparison
    assert (found.verdict, found.reason) == ("broken", reason)


def test_what_only_one_side_has_is_broken(tmp_path: Path) -> None:
    more = {**model(), "encoder.gate": np.ones(3, "f4"), **attention(prefixes=("decoder.0.self_attn",))}
    report = of(tmp_path, model(), more)
    assert {one.comparison.side for one in report.entries if not one.ok} == {"first"}
    assert len(wrong(report)) == 1 + 8
    assert (report.layers[-1].name, report.layers[-1].matched) == ("decoder.0.self_attn", "")
    assert wrong(of(tmp_path, more, model())) == wrong(report)


def test_all_dtypes_are_compared(tmp_path: Path) -> None:
    values = np.arange(-3, 4)
    named = {f"x{n}": values.astype(kind) for n, kind in enumerate(["u1", "i1", "i8", "u8", "f8", "c8", "c16", "?"])}
    assert of(tmp_path, named, named).verdict == "equal"
    for name, array in named.items():
        other = array.copy()
        other[5] = not other[5] if other.dtype == bool else other[5] + 1
        report = of(tmp_path, named, {**named, name: other})
        assert wrong(report) == {f".{name}": "off"}
        assert entry(report, "", name).comparison.index == (5,)


# -- biases --


def test_an_absent_bias_is_not_a_bias_of_zeros(tmp_path: Path) -> None:
    spec = MHASpec(16, 4, k_bias=False)
    absent = attention("whisper", spec)
    zeros = {**absent, **{f"{prefix}.k_proj.bias": np.zeros(16, "f4") for prefix in LAYERS}}
    report = of(tmp_path, absent, zeros)
    found = entry(report, LAYERS[0], "k_bias").comparison
    assert (found.verdict, found.reason) == ("broken", "missing on the first side; on the second it is all zeros")
    assert len(wrong(report)) == 2
    assert "all zeros" not in entry(of(tmp_path, zeros, {**absent}), LAYERS[0], "q_bias").comparison.reason


def test_a_bias_that_the_file_says_was_added_is_none(tmp_path: Path) -> None:
    spec = MHASpec(16, 4, k_bias=False)
    source = saved(tmp_path / "a.npz", attention("whisper", spec))
    convert_checkpoint(source, tmp_path / "b.pt", to="torch", num_heads=4)
    report = diff_checkpoints(source, tmp_path / "b.pt")
    assert (report.verdict, len(report.entries)) == ("equal", 2 * 7)
    assert "k_bias: zeros that its layout asks for" in notes(report)
    (tmp_path / "b.pt.mhabridge.json").unlink()
    assert len(wrong(diff_checkpoints(source, tmp_path / "b.pt"))) == 2


def test_zeros_of_a_layout_count_where_only_the_other_side_told_its_sizes(tmp_path: Path) -> None:
    spec = MHASpec(16, 4, k_bias=False)
    report = of(tmp_path, attention("whisper", spec), attention("megengine", spec))
    assert wrong(report) == {f"{prefix}.k_bias": "broken" for prefix in LAYERS}
    report = of(tmp_path, attention("whisper", spec), attention("megengine", spec), spec=spec)
    assert (report.verdict, len(report.entries)) == ("equal", 2 * 7)


# -- other layers --


def test_other_layers_are_matched_by_their_kinds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    norm = {name: rng.standard_normal(8, "f4") for name in ("weight", "bias", "running_mean", "running_var")}
    first = {f"bn.{name}": array for name, array in norm.items()} | {"bn.num_batches_tracked": np.int64(3)}
    first |= {"ln.weight": norm["weight"], "ln.bias": norm["bias"], "wte.weight": rng.standard_normal((5, 8), "f4")}
    first |= {"conv1d.weight": rng.standard_normal((8, 3, 5), "f4"), "conv1d.bias": norm["bias"]}
    first |= {f"{LAYERS[0]}.{name}": array for name, array in attention("torch", prefixes=("",)).items()}
    convert_checkpoint(saved(tmp_path / "a.npz", first), tmp_path / "b.ckpt", to="mindspore", num_heads=4)
    with open_checkpoint(tmp_path / "b.ckpt") as file:
        assert {"bn.moving_mean", "ln.gamma", "wte.embedding_table"} <= file.keys()
        assert file["conv1d.weight"].shape == (8, 3, 1, 5)
    report = diff_checkpoints(tmp_path / "a.npz", tmp_path / "b.ckpt")
    assert (report.verdict, len(report.entries)) == ("equal", 4 + 2 + 1 + 2 + 8)
    assert "keeps no num_batches_tracked" in notes(report)
    kinds = {layer.name: layer.kind for layer in report.layers}
    assert kinds == {
        "bn": "batch_norm", "ln": "norm", "wte": "embedding", "conv1d": "conv1d", LAYERS[0]: "MultiheadAttention"
    }  # fmt: skip
    back = diff_checkpoints(tmp_path / "b.ckpt", tmp_path / "a.npz")
    assert (back.verdict, len(back.entries)) == ("equal", 17)
    first["conv1d.weight"][2, 1, 3] += 1
    report = diff_checkpoints(saved(tmp_path / "c.npz", first), tmp_path / "b.ckpt")
    assert wrong(report) == {"conv1d.weight": "off"}
    assert entry(report, "conv1d", "weight").comparison.index == (2, 1, 3)


def test_groups_of_a_convolution_may_be_an_axis(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal(144).astype("f4")
    plain = {"conv.weight": weight.reshape(8, 2, 3, 3), "conv.bias": np.ones(8, "f4")}
    grouped = {"conv.weight": weight.reshape(4, 2, 2, 3, 3), "conv.bias": np.ones((1, 8, 1, 1), "f4")}
    assert of(tmp_path, plain, grouped).verdict == "equal"
    other = {"conv.weight": weight.reshape(8, 2, 9, 1), "conv.bias": np.ones(8, "f4")}
    assert wrong(of(tmp_path, plain, other)) == {"conv.weight": "broken"}


def test_parts_of_transformer_layers_have_other_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = attention("torch", prefixes=("layers.0.self_attn",))
    shapes = {"linear1": (32, 16), "linear2": (16, 32), "norm1": (16,), "norm2": (16,)}
    for part, shape in shapes.items():
        first[f"layers.0.{part}.weight"] = rng.standard_normal(shape).astype("f4")
        first[f"layers.0.{part}.bias"] = rng.standard_normal(shape[0]).astype("f4")
    source = saved(tmp_path / "a.npz", first)
    convert_checkpoint(source, tmp_path / "b.ckpt", to="mindspore", num_heads=4)
    report = diff_checkpoints(source, tmp_path / "b.ckpt")
    assert (report.verdict, len(report.entries)) == ("equal", 16)
    assert ("layers.0.linear1", "layers.0.dense1") in {(layer.name, layer.other) for layer in report.layers}


# -- names --


@pytest.mark.parametrize("prefix", ["module", "model", "module._orig_mod", "network"])
def test_what_wrappers_put_before_names_is_passed_over(prefix: str, tmp_path: Path) -> None:
    wrapped = {f"{prefix}.{name}": array for name, array in model("torch").items()}
    report = of(tmp_path, model(), wrapped)
    assert (report.verdict, len(report.entries)) == ("equal", 20)
    assert report.layers[0].other == f"{prefix}.{LAYERS[0]}"


def test_a_path_that_two_layers_would_have_is_nobodys(tmp_path: Path) -> None:
    named = {"module.fc.weight": np.ones((2, 2), "f4"), "model.fc.weight": np.ones((2, 2), "f4")}
    report = of(tmp_path, {"fc.weight": np.ones((2, 2), "f4")}, named)
    assert len(wrong(report)) == 3


def test_the_users_rules_come_first(tmp_path: Path) -> None:
    other = {name.replace("encoder", "bert.layer"): array for name, array in model("torch").items()}
    assert len(wrong(of(tmp_path, model(), other))) == 40
    report = of(tmp_path, model(), other, rename="encoder.*=bert.layer.*")
    assert (report.verdict, len(report.entries)) == ("equal", 20)
    assert {layer.matched for layer in report.layers} == {"rule"}
    assert (report.layers[0].name, report.layers[0].other) == (LAYERS[0], "bert.layer.0.self_attn")
    with pytest.raises(ArgumentError, match=r"decoder\.\*"):
        of(tmp_path, model(), other, rename="decoder.*=bert.*")


# -- ties, entries that are no tensors, heads --


def test_tied_tensors_are_compared_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.randn(6, 4)
    state = {"wte.weight": weight, "head.weight": weight}
    torch.save(state, tmp_path / "a.pt")
    report = diff_checkpoints(tmp_path / "a.pt", tmp_path / "a.pt")
    assert ([one.layer for one in report.entries], report.verdict) == (["wte"], "equal")
    assert "weight: tied with wte.weight on both sides" in notes(report)

    torch.save({"wte.weight": weight.clone()}, tmp_path / "b.pt")
    report = diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (len(report.entries), report.verdict) == (1, "equal")
    assert "the second leaves it out" in notes(report)

    torch.save({"wte.weight": weight.clone(), "head.weight": weight + 1}, tmp_path / "c.pt")
    report = diff_checkpoints(tmp_path / "a.pt", tmp_path / "c.pt")
    assert wrong(report) == {"head.weight": "off"}
    assert "one tensor on the first side, 2 on the other" in notes(report)


def test_what_is_no_tensor_is_a_note(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(2, 2)
    torch.save({"fc.weight": weight, "epoch": 3, "name": "a", "best": 0.5}, tmp_path / "a.pt")
    torch.save({"fc.weight": weight, "epoch": 4, "name": "a"}, tmp_path / "b.pt")
    report = diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
    assert report.verdict == "equal"
    assert report.notes == ("epoch: 3 and 4", "entries that are no tensors, only on the first side: best")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.npz")
    assert "epoch: 4 and 3" in notes(diff_checkpoints(tmp_path / "b.pt", tmp_path / "c.npz"))


def test_another_number_of_heads_is_another_layer(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.npz", model())
    for heads in (4, 8):
        convert_checkpoint(source, tmp_path / f"{heads}.pt", to="torch", num_heads=heads)
    report = diff_checkpoints(tmp_path / "4.pt", tmp_path / "8.pt")
    assert set(wrong(report)) == {f"{prefix}.num_heads" for prefix in LAYERS}
    assert entry(report, LAYERS[0], "num_heads").comparison.values == (4.0, 8.0)
    assert diff_checkpoints(source, tmp_path / "8.pt").verdict == "equal"  # one side does not know
    assert diff_checkpoints(tmp_path / "4.pt", tmp_path / "8.pt", num_heads=4).verdict == "equal"


# -- what was done to them --


def test_the_report_says_what_was_done(tmp_path: Path) -> None:
    named = model()
    named[f"{LAYERS[1]}.output.dense.weight"] = named[f"{LAYERS[1]}.output.dense.weight"].T.copy()
    named["encoder.fc.weight"] = -named["encoder.fc.weight"]
    report = of(tmp_path, model("megengine"), named)
    faults = {one.layer: [fault.mend for fault in one.faults] for one in report.diagnoses}
    assert faults == {
        LAYERS[1]: [f"{LAYERS[1]}.output.dense.weight: transpose"],
        "encoder.fc": ["encoder.fc.weight: negate"],
    }
    assert report.diagnosis is not None
    assert (report.diagnosis.sure, report.diagnosis.layer) == ("certain", report.first_divergence)


def test_a_matrix_that_lies_the_other_way_round_has_another_shape(tmp_path: Path) -> None:
    named = model()
    named["encoder.fc.weight"] = named["encoder.fc.weight"].T.copy()
    report = of(tmp_path, model(), named)
    assert wrong(report) == {"encoder.fc.weight": "broken"}
    assert [fault.mend for fault in report.diagnoses[0].faults] == ["encoder.fc.weight: transpose"]


def test_other_weights_are_unexplained_and_not_all_are_searched(tmp_path: Path) -> None:
    prefixes = tuple(f"encoder.{n}.self_attn" for n in range(7))
    first = attention("torch", prefixes=prefixes)
    rng = np.random.default_rng(9)
    other = {name: rng.standard_normal(array.shape).astype("f4") for name, array in first.items()}
    report = of(tmp_path, first, other)
    assert [one.explained for one in report.diagnoses] == [False] * 4
    assert "not searched for what was done to them, after 4 in vain: encoder.4.self_attn" in notes(report)


def test_pictures_show_what_differs_most(tmp_path: Path) -> None:
    named = model()
    change_a_bit(named)
    named["encoder.fc.weight"][3, 4] += 5
    assert of(tmp_path, model("gpt2"), named).pictures == ()
    drawn = of(tmp_path, model("gpt2"), named, pictures=True).pictures
    assert [(one.layer, one.tensor) for one in drawn] == [("encoder.fc", "weight"), (LAYERS[1], "k_weight")]
    assert sum(drawn[0].counts) == 12 * 16


# -- options, errors --


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    of(tmp_path, model(), model("torch"), progress=lambda done, whole: seen.append((done, whole)))
    whole = 2 * sum(array.nbytes for array in model().values())
    assert seen[-1] == (whole, whole)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_workers_are_a_number_of_threads(workers: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="workers"):
        of(tmp_path, model(), model(), workers=workers)


def test_wrong_words_about_the_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="num_heads"):
        of(tmp_path, model(), model(), num_heads=5)
    with pytest.raises(ArgumentError, match="a prefix of tensors in one of the files"):
        of(tmp_path, model(), model(), spec={"decoder": SPEC})
    with pytest.raises(CheckpointError):
        diff_checkpoints(tmp_path / "none.npz", tmp_path / "none.npz")


def test_it_is_json(tmp_path: Path) -> None:
    named = model()
    put_nan(named)
    found = json.loads(of(tmp_path, model("megengine"), named).to_json())
    assert (found["kind"], found["verdict"], len(found["entries"])) == ("checkpoints", "broken", 20)


# -- reading in pieces --


def views(file: Any) -> dict[str, Any]:
    whole = file["x"]
    rows, columns = whole.shape
    step = columns * 3
    return {
        "plain": whole,
        "transposed": dataclasses.replace(whole, shape=(columns, rows), strides=(1, columns)),
        "some columns": dataclasses.replace(whole, shape=(rows, 5), start=2, strides=(columns, 1)),
        "some columns, transposed": dataclasses.replace(whole, shape=(5, rows), start=2, strides=(1, columns)),
        "every third row": dataclasses.replace(whole, shape=(rows // 3, columns), strides=(step, 1)),
        "three axes": dataclasses.replace(whole, shape=(columns, rows // 3, 3), strides=(1, step, columns)),
        "big-endian": dataclasses.replace(whole, big_endian=True),
    }


@pytest.mark.parametrize("kind", ["f4", "f2", "f8", "u1"])
def test_every_view_is_measured_as_its_array_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE", 7)
    monkeypatch.setattr(streaming, "_SLICE", 100)
    monkeypatch.setattr(streaming, "_SHEET", 100)
    monkeypatch.setattr(streaming, "_SMALL", 0)
    rng = np.random.default_rng(0)
    first = (10 * rng.standard_normal((12, 11))).astype(kind)
    other = (first + (5 * rng.standard_normal(first.shape)).astype(kind)).astype(kind)
    paths = [saved(tmp_path / f"{name}.npz", {"x": array}) for name, array in (("a", first), ("b", other))]
    with open_checkpoint(paths[0]) as one, open_checkpoint(paths[1]) as two:
        for name, view in views(one).items():
            same = dataclasses.replace(view, big_endian=False)
            for theirs in (views(two)[name], views(two)[name]):
                sides = Side(one, view), Side(two, theirs)
                arrays = [typed_array(side) for side in sides]
                found = working.compare_all([sides], 1)[0]
                expected = compare(*arrays)
                assert found.verdict == expected.verdict, name
                assert found.index is not None, name
                if found.verdict == "broken":  # bytes the other way round are now and then no number
                    assert found.index == expected.index, name
                    continue
                apart = np.abs(arrays[0].astype("f8") - arrays[1].astype("f8"))
                assert apart[found.index] == expected.max_abs, name
                assert found.max_abs == expected.max_abs, name
                assert found.mean_abs == pytest.approx(expected.mean_abs, rel=1e-12), name
            assert working.compare_all([(Side(one, same), Side(one, same))], 1)[0].verdict == "equal", name


def typed_array(side: Side) -> np.ndarray:
    return side.file.words(side.tensor).view(side.tensor.dtype)


def test_pieces_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first = {"x": rng.standard_normal((300, 500), "f4"), "y": rng.standard_normal(100, "f4")}
    other = {name: array + rng.standard_normal(array.shape, "f4") for name, array in first.items()}
    expected = compare(first["x"], other["x"])
    monkeypatch.setattr(working, "_STRETCH", 10_000)
    for workers in (1, 3):
        found = entry(of(tmp_path, first, other, workers=workers), "", "x").comparison
        assert (found.verdict, found.index, found.values) == ("off", expected.index, expected.values)
        assert found.mean_abs == pytest.approx(expected.mean_abs, rel=1e-6)
        assert found.cosine == pytest.approx(expected.cosine, rel=1e-6)


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    spec = MHASpec(1024, 16)
    prefixes = tuple(f"layers.{n}" for n in range(3))  # 48 MiB
    first = saved(tmp_path / "a.npz", attention("torch", spec, prefixes))
    second = saved(tmp_path / "b.npz", attention("megengine", spec, prefixes))
    diff_checkpoints(first, second, workers=2)
    tracemalloc.start()
    try:
        assert diff_checkpoints(first, second, workers=2).verdict == "equal"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_large_matrices_are_turned_in_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SMALL", 0)
    monkeypatch.setattr(streaming, "_SHEET", 64 * 1024)
    array = np.random.default_rng(0).standard_normal((256, 384)).astype("f4")
    path = saved(tmp_path / "a.npz", {"x": array, "y": array.T.copy()})
    with open_checkpoint(path) as file:
        turned = Side(file, file["x"]).turned()
        assert not turned.tensor.plain
        joined = np.concatenate([piece.copy() for piece in turned.pieces(Scratch())])
        assert np.array_equal(joined.reshape(384, 256), array.T)
        assert working.compare_all([(turned, Side(file, file["y"]))], 1)[0].verdict == "equal"


def test_a_reshaped_convolution_is_no_convolution_in_another_framework(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 6, 3, 3)).astype("float32")
    np.savez(tmp_path / "a.npz", **{"conv1.weight": weight})
    np.savez(tmp_path / "b.npz", **{"conv1.weight": weight.reshape(6, 4, 3, 3)})
    report = diff_checkpoints(tmp_path / "a.npz", tmp_path / "b.npz")
    assert report.verdict == "broken"
    assert "shape" in report.entries[0].comparison.reason


def test_nan_makes_no_diagnosis(tmp_path: Path) -> None:
    spec = MHASpec(8, 2)
    for name, value in (("a", None), ("b", np.nan)):
        named = MHAWeights.random(spec).to_layout("torch", spec, prefix="attn")
        if value is not None:
            named["attn.in_proj_weight"] = named["attn.in_proj_weight"].copy()
            named["attn.in_proj_weight"][0, 0] = value
        np.savez(tmp_path / f"{name}.npz", **named)
    report = diff_checkpoints(tmp_path / "a.npz", tmp_path / "b.npz")
    assert report.verdict == "broken"
    assert not any(diagnosis.faults for diagnosis in report.diagnoses), report.diagnoses


def test_a_number_beside_a_scalar_tensor_is_compared(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"fc.weight": torch.ones(2, 2), "logit_scale": 2.5}, tmp_path / "a.pt")
    for value, verdict in ((4.6, "off"), (2.5, "rounding")):
        torch.save({"fc.weight": torch.ones(2, 2), "logit_scale": torch.tensor(value)}, tmp_path / "b.pt")
        report = diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt")
        assert report.verdict == verdict
        assert [entry.tensor for entry in report.entries][-1] == "logit_scale"


def test_another_scale_is_another_layer_where_both_files_say_it(tmp_path: Path) -> None:
    spec = MHASpec(8, 2)
    named = MHAWeights.random(spec).to_layout("torch", spec, prefix="attn")
    np.savez(tmp_path / "w.npz", **named)
    for name, one in (("a", spec), ("b", spec.replace(scale=1.0)), ("c", spec)):
        convert_checkpoint(tmp_path / "w.npz", tmp_path / f"{name}.safetensors", to="mindspore", spec=one)
    assert diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "c.safetensors").ok
    report = diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert report.verdict == "off"
    assert [entry.tensor for entry in report.entries if not entry.ok] == ["scale"]
