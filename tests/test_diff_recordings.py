"""Comparing recordings: honest runs pass, each fault is found where it is and named, and no file is believed."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mhabridge import reference
from mhabridge.cli import tree as trees
from mhabridge.diff.recordings import diff_recordings, drift, judging, matching
from mhabridge.errors import ArgumentError, ArgumentTypeError
from mhabridge.recording.reading import RecordedCall, open_recording
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

from . import recordings
from .recordings import H, Writer, comparison, encoder, inputs, notes, padding, record, rewritten


def pair(
    tmp_path: Path, blocks: Any = None, frameworks: tuple[str, str] = ("torch", "megengine"), **options: Any
) -> tuple[Path, Path]:
    """An honest recording, and one whose blocks a test has changed."""
    changed = encoder(frameworks[1]) if blocks is None else blocks
    record(tmp_path / "a", frameworks[0], encoder(frameworks[0]), seed=1)
    record(tmp_path / "b", frameworks[1], changed, seed=2, **options)
    return tmp_path / "a", tmp_path / "b"


# -- honest runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["torch", "mindspore", "megengine"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_honest_runs_pass(tmp_path: Path, second: str, dtype: str) -> None:
    record(tmp_path / "a", "torch", encoder("torch", layers=12), mask=padding(), seed=1)
    record(
        tmp_path / "b",
        second,
        encoder(second, dtype, layers=12),
        mask=padding(),
        seed=2,
        names="model.layers.{}.self_attn",
    )
    report = diff_recordings(tmp_path / "a", tmp_path / "b")
    assert report.ok, [entry for entry in report.entries if not entry.ok][:3]
    assert report.first_divergence is None
    assert report.diagnoses == ()
    assert len(report.layers) == 12
    assert {layer.matched for layer in report.layers} == {"name"}
    assert comparison(report, "layers.3.self_attn", "output").distances[0].times_bound < 1
    json.loads(report.to_json())


def test_the_same_file_is_equal(tmp_path: Path) -> None:
    path, _ = pair(tmp_path)
    report = diff_recordings(path, path)
    assert report.verdict == "equal"
    assert len({run.backend for run in report.runs}) == 2


def test_recordings_of_whole_frameworks() -> None:
    """In single files the honest drift is far from the bound, and a fault is far beyond it."""
    x = inputs("float64")
    noise = np.random.default_rng(0).standard_normal(x.shape) * 2.0**-24
    found = drift.apart(x, x + 10 * noise * np.abs(x))
    assert drift.Drift().explains(found, 2.0**-24) == ""
    assert "relative difference" in drift.Drift().explains(drift.apart(x, x + 100 * noise), 2.0**-24)
    assert "scale" in drift.Drift().explains(drift.apart(x, x * (1 + 25 * 2.0**-24)), 2.0**-24)
    one_row = x.copy()
    one_row[0, 0] *= 1 + 2000 * 2.0**-24
    many = np.concatenate([x] * 2000)
    spoilt = np.concatenate([one_row, *[x] * 1999])
    assert "row" in drift.Drift().explains(drift.apart(many, spoilt), 2.0**-24)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_wrong_weights_are_named_and_explained(tmp_path: Path) -> None:
    blocks = encoder("megengine")
    weights = blocks[2].weights
    blocks[2].weights = dataclasses.replace(weights, out_weight=np.ascontiguousarray(weights.out_weight.T))
    report = diff_recordings(*pair(tmp_path, blocks))
    assert report.first_divergence == "layers.2.self_attn"
    assert "the weights differ: out_weight" in notes(report, "layers.2.self_attn")
    assert comparison(report, "layers.2.self_attn", "output").ok
    assert "each side is right" in comparison(report, "layers.2.self_attn", "output").reason
    assert "what comes after" in notes(report, "layers.3.self_attn")
    (diagnosis,) = report.diagnoses
    assert [fault.mend for fault in diagnosis.faults] == ["out_proj.weight: transpose"]


def test_a_layer_that_computes_something_else_is_to_blame(tmp_path: Path) -> None:
    blocks = encoder("megengine")
    blocks[1].used = blocks[1].spec.replace(scale=1.0)
    report = diff_recordings(*pair(tmp_path, blocks))
    found = comparison(report, "layers.1.self_attn", "output")
    assert (report.first_divergence, found.verdict, found.side) == ("layers.1.self_attn", "off", "second")
    assert "computes something else" in notes(report, "layers.1.self_attn")
    assert report.diagnosis is not None
    assert "scale" in report.diagnosis.faults[0].name
    assert report.diagnosis.side == str(tmp_path / "b")


def test_weights_that_are_not_those_that_were_used(tmp_path: Path) -> None:
    """A recording may lie about its weights: then the layer is off on its own terms."""
    blocks = encoder("megengine")
    blocks[1].told, blocks[1].weights = blocks[1].weights, MHAWeights.random(blocks[1].spec, seed=99)
    report = diff_recordings(*pair(tmp_path, blocks))
    assert comparison(report, "layers.1.self_attn", "output").side == "second"


@pytest.mark.parametrize("fault", ["epsilon", "bias"])
def test_a_fault_between_the_layers_is_seen_before_the_next_one(tmp_path: Path, fault: str) -> None:
    blocks = encoder("megengine")
    if fault == "epsilon":
        blocks[1].epsilon = 2e-5  # 1e-5 in the other: changes 5e-6 of a value, where float32 rounds 6e-8
    else:
        blocks[1].bias = np.zeros_like(blocks[1].bias)
    report = diff_recordings(*pair(tmp_path, blocks))
    assert report.first_divergence == "layers.2.self_attn"
    assert "look before this layer" in notes(report, "layers.2.self_attn")
    assert comparison(report, "layers.1.self_attn", "inputs.query").ok
    assert comparison(report, "layers.2.self_attn", "inputs.query").verdict == "off"
    assert comparison(report, "layers.2.self_attn", "output").ok


def test_other_settings_are_a_difference(tmp_path: Path) -> None:
    blocks = encoder("megengine")
    blocks[0].spec = blocks[0].spec.replace(num_heads=2)
    report = diff_recordings(*pair(tmp_path, blocks))
    assert report.first_divergence == "layers.0.self_attn"
    assert comparison(report, "layers.0.self_attn", "settings").reason == "num_heads 4 and 2"
    assert all(comparison(report, "layers.0.self_attn", name).ok for name in ("output", "q_weight", "inputs.query"))


# -- masks -------------------------------------------------------------------------------------------------------------


def masked(tmp_path: Path, mask: np.ndarray, passed: Any = None) -> Any:
    record(tmp_path / "a", "torch", encoder("torch"), mask=padding(), seed=1)
    record(tmp_path / "b", "mindspore", encoder("mindspore"), mask=mask, passed=passed, seed=2)
    return diff_recordings(tmp_path / "a", tmp_path / "b")


def test_a_wrong_mask_is_said_of_the_mask(tmp_path: Path) -> None:
    other = padding()
    other[0, 5] = True
    report = masked(tmp_path, other)
    assert report.first_divergence == "layers.0.self_attn"
    found = comparison(report, "layers.0.self_attn", "mask")
    assert (found.verdict, found.reason) == (
        "off",
        "0 positions are blocked on the first side only, 1 on the second only",
    )
    assert "the masks differ" in notes(report, "layers.0.self_attn")


@pytest.mark.parametrize("blocked", [-np.inf, -1e9, np.finfo(np.float32).min])
def test_masks_of_another_form_and_the_same_effect(tmp_path: Path, blocked: float) -> None:
    passed = np.where(padding(), np.float32(blocked), np.float32(0.0))
    report = masked(tmp_path, padding(), passed)
    assert report.ok, [entry.comparison for entry in report.entries if not entry.ok][:2]
    assert "key_padding_mask bool (2, 6); key_padding_mask float32 (2, 6)" in notes(report, "layers.0.self_attn")
    found = comparison(report, "layers.0.self_attn", "mask")
    assert found.verdict == ("equal" if np.isinf(blocked) else "rounding")


def test_a_mask_that_was_added_as_one_is_off(tmp_path: Path) -> None:
    report = masked(tmp_path, padding(), padding().astype(np.float32))
    assert comparison(report, "layers.0.self_attn", "mask").verdict == "off"


def test_rows_that_are_fully_masked(tmp_path: Path) -> None:
    """NaN where the reference says NaN is expected; zeros are another policy and a difference."""
    mask = padding()
    mask[1] = True
    record(tmp_path / "a", "torch", encoder("torch", layers=1), mask=mask, seed=1)
    record(tmp_path / "b", "megengine", encoder("megengine", layers=1), mask=mask, seed=2)
    assert diff_recordings(tmp_path / "a", tmp_path / "b").ok
    writer = Writer(tmp_path / "c")
    block = encoder("torch", layers=1)[0]
    x = np.ascontiguousarray(inputs().swapaxes(0, 1))
    call = recordings.Call(inputs(), inputs(), inputs(), mask[:, None, None], fully_masked="zero")
    result = reference.attend(block.spec, block.weights, call)
    settings = {"embed_dim": recordings.E, "num_heads": H}
    writer.layer(
        "layers.0.self_attn", recordings.CLASSES["torch"], settings, block.weights.to_layout("torch", block.spec)
    )
    output = np.ascontiguousarray(result.output.swapaxes(0, 1).astype(np.float32))
    arguments = {"query": x, "key": x, "value": x, "key_padding_mask": mask, "need_weights": False}
    writer.call("layers.0.self_attn", arguments, [output, None])
    writer.end()
    report = diff_recordings(tmp_path / "a", tmp_path / "c")
    assert comparison(report, "layers.0.self_attn", "output").verdict == "broken"
    assert "nan on the first side, zero on the second" in notes(report, "layers.0.self_attn")
    assert diff_recordings(tmp_path / "c", tmp_path / "c").ok


# -- what is missing or strange ----------------------------------------------------------------------------------------


def test_missing_calls_are_broken(tmp_path: Path) -> None:
    first, second = pair(tmp_path)

    def lose(document: Any) -> None:
        del document["calls"][1]

    report = diff_recordings(first, rewritten(second, tmp_path / "c", lose))
    found = comparison(report, "layers.1.self_attn", "call")
    assert (found.verdict, found.side, report.first_divergence) == ("broken", "second", "layers.1.self_attn")
    report = diff_recordings(tmp_path / "c", first)
    found = comparison(report, "layers.1.self_attn", "call")
    assert (found.verdict, found.side) == ("broken", "first")
    assert [layer.name for layer in report.layers] == [f"layers.{number}.self_attn" for number in range(4)]


def test_a_run_that_broke_off_is_no_difference_and_not_ok(tmp_path: Path) -> None:
    first, second = pair(tmp_path)

    def lose(document: Any) -> None:
        del document["calls"][2:]
        document["complete"] = False

    report = diff_recordings(first, rewritten(second, tmp_path / "c", lose))
    assert (report.differs, report.ok, report.exit_code) == (False, False, 2)
    assert report.runs[1].status == "failed"
    assert "broke off" in notes(report, "layers.3.self_attn")


def test_nan_on_both_sides_is_broken(tmp_path: Path) -> None:
    x = inputs()
    x[0, 0, 0] = np.nan
    record(tmp_path / "a", "torch", encoder("torch"), x, seed=1)
    record(tmp_path / "b", "torch", encoder("torch"), x, seed=1)
    report = diff_recordings(tmp_path / "a", tmp_path / "b")
    assert comparison(report, "layers.0.self_attn", "inputs.query").verdict == "broken"
    assert report.first_divergence == "layers.0.self_attn"


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    first, second = pair(tmp_path)

    def lose(document: Any) -> None:
        document["calls"][1]["outputs"][0] = {"left_out": "the limit was reached"}
        document["calls"][2]["arguments"]["query"] = {"left_out": "the limit was reached"}
        for name in ("key", "value"):
            document["calls"][2]["arguments"][name] = {"left_out": "the limit was reached"}
        document["layers"]["layers.3.self_attn"]["parameters"] = {}
        document["left_out"] = [f"calls/{number}" for number in range(30)]

    lost = rewritten(second, tmp_path / "c", lose)
    report = diff_recordings(first, lost)
    assert "the output was left out" in notes(report, "layers.1.self_attn")
    assert "left out of the recording" in notes(report, "layers.2.self_attn")
    assert "no parameters in the recording" in notes(report, "layers.3.self_attn")
    assert comparison(report, "layers.3.self_attn", "output").distances == (None, None)
    assert comparison(report, "layers.3.self_attn", "output").ok
    assert report.runs[1].notes[-1] == "... and 10 more left out"
    assert report.runs[1].reason == "2 of 4 calls are not whole: tensors were left out"
    assert [entry for entry in report.entries if not entry.ok] == []
    assert report.exit_code == 2


def test_outputs_without_a_reference_are_still_compared(tmp_path: Path) -> None:
    blocks = encoder("torch")
    blocks[3].used = blocks[3].spec.replace(scale=1.0)
    first, second = pair(tmp_path, blocks, ("torch", "torch"))

    def lose(document: Any) -> None:
        for layer in document["layers"].values():
            layer["parameters"] = {}

    lost = [rewritten(path, path.with_suffix(".lost"), lose) for path in (first, second)]
    report = diff_recordings(*lost)
    assert report.first_divergence == "layers.3.self_attn"
    assert comparison(report, "layers.3.self_attn", "output").verdict == "off"


def test_attention_weights_of_one_side_are_held_against_the_reference(tmp_path: Path) -> None:
    first, _ = pair(tmp_path)
    record(tmp_path / "c", "torch", encoder("torch"), need_weights=False)
    report = diff_recordings(first, tmp_path / "c")
    (entry, *_) = [entry for entry in report.entries if entry.tensor == "attn_weights"]
    assert report.ok
    assert (entry.first, entry.second) == ("reference", str(first))


def test_dropout_is_not_compared(tmp_path: Path) -> None:
    def train(document: Any) -> None:
        for call in document["calls"]:
            call["training"] = True
        for layer in document["layers"].values():
            layer["settings"]["dropout"] = 0.5

    first, _ = pair(tmp_path)
    report = diff_recordings(first, rewritten(first, tmp_path / "c", train))
    assert not [entry for entry in report.entries if entry.tensor in ("output", "attn_weights")]
    assert "dropout was active" in notes(report, "layers.0.self_attn")
    assert report.exit_code == 1


def test_nothing_compared_is_not_ok(tmp_path: Path) -> None:
    Writer(tmp_path / "a").end()
    report = diff_recordings(tmp_path / "a", tmp_path / "a")
    assert (report.ok, report.exit_code) == (False, 2)


# -- matching ----------------------------------------------------------------------------------------------------------


def test_matching_by_rule_and_by_order(tmp_path: Path) -> None:
    record(tmp_path / "a", "torch", encoder("torch"), names="text.{}.attention", seed=1)
    record(tmp_path / "b", "megengine", encoder("megengine"), names="blocks_{}", seed=2)
    by_rule = diff_recordings(tmp_path / "a", tmp_path / "b", rules=["text.*.attention=blocks_*"], order=False)
    assert {layer.matched for layer in by_rule.layers} == {"rule"}
    by_order = diff_recordings(tmp_path / "a", tmp_path / "b")
    assert [(layer.other, layer.matched) for layer in by_order.layers] == [(f"blocks_{n}", "order") for n in range(4)]
    assert by_rule.ok
    assert by_order.ok
    assert not diff_recordings(tmp_path / "a", tmp_path / "b", order=False).ok
    with pytest.raises(ArgumentError, match="no name fits"):
        diff_recordings(tmp_path / "a", tmp_path / "b", rules=["txt.*=blocks_*"])


def test_order_does_not_match_other_shapes(tmp_path: Path) -> None:
    record(tmp_path / "a", "torch", encoder("torch"), names="text.{}", seed=1)
    blocks = encoder("torch")
    blocks[1].spec = blocks[1].spec.replace(num_heads=2)
    record(tmp_path / "b", "torch", blocks, names="blocks.{}", seed=2)
    report = diff_recordings(tmp_path / "a", tmp_path / "b")
    assert [layer.matched for layer in report.layers].count("") == 2
    assert {entry.layer for entry in report.entries if entry.tensor == "call"} == {"text.1", "blocks.1"}


def test_a_layer_that_is_dropped_is_told_by_the_weights_of_the_others(tmp_path: Path) -> None:
    record(tmp_path / "a", "torch", encoder("torch"), names="text.{}", seed=1)
    blocks = encoder("megengine")
    del blocks[1]
    record(tmp_path / "b", "megengine", blocks, names="blocks.{}", seed=2)
    report = diff_recordings(tmp_path / "a", tmp_path / "b")
    assert [(layer.name, layer.other) for layer in report.layers] == [
        ("text.0", "blocks.0"),
        ("text.1", ""),
        ("text.2", "blocks.1"),
        ("text.3", "blocks.2"),
    ]
    assert report.first_divergence == "text.1"


def test_in_order_of_ending() -> None:
    calls = [RecordedCall(n, name, 0, False, {}, (), {}) for n, name in enumerate(["a", "a.b", "a", "a.b", "ab"])]
    assert [call.index for call in matching.in_order_of_ending(calls)] == [1, 0, 3, 2, 4]


# -- other layers ------------------------------------------------------------------------------------------------------


def plain_model(path: Path, framework: str, wrong: str = "") -> Path:
    """A model of a linear layer, a norm, an activation nobody knows, and what holds them."""
    writer = Writer(path, framework)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((5, 7, 8)).astype(np.float32)
    weight, bias, gamma, beta = (rng.standard_normal(s).astype(np.float32) for s in ((8, 8), (8,), (8,), (8,)))
    ms = framework == "mindspore"
    names = ("gamma", "beta") if ms else ("weight", "bias")
    epsilon = {"epsilon" if ms else "eps": 1e-3 if wrong == "epsilon" else 1e-5}
    writer.layer("", "my.Model", {}, {})
    writer.layer(
        "fc",
        "mindspore.nn.layer.basic.Dense" if ms else "torch.nn.modules.linear.Linear",
        {},
        {"weight": weight, "bias": bias},
    )
    writer.layer("norm", f"{framework}.nn.LayerNorm", epsilon, dict(zip(names, (gamma, beta), strict=True)))
    writer.layer("act", "nn.Mish", {}, {})
    y = x @ weight.T + (0 if wrong == "bias" else bias)
    values = y.astype(np.float64)
    values = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    z = (values * gamma + beta).astype(np.float32)
    out = (z * np.tanh(np.log1p(np.exp(z.astype(np.float64))))).astype(np.float32)
    out = out * np.float32(1.001) if wrong == "act" else out
    writer.call("", {"x": x}, [out])
    writer.call("fc", {"input": x}, [y])
    writer.call("norm", {"input": y}, [z])
    writer.call("act", {"input": z}, [out])
    return writer.end()


def test_other_layers_of_two_frameworks(tmp_path: Path) -> None:
    report = diff_recordings(plain_model(tmp_path / "a", "torch"), plain_model(tmp_path / "b", "mindspore"))
    assert report.ok, [entry for entry in report.entries if not entry.ok][:3]
    assert [layer.name for layer in report.layers] == ["fc", "norm", "act", "(model)"]
    assert all(each is not None for name in ("fc", "norm") for each in comparison(report, name, "output").distances)
    assert comparison(report, "act", "output").distances == (None, None)


@pytest.mark.parametrize(
    ("wrong", "layer", "tensor"),
    [("bias", "fc", "output"), ("epsilon", "norm", "settings"), ("act", "act", "output")],
)
def test_a_fault_in_another_layer_is_found_there(tmp_path: Path, wrong: str, layer: str, tensor: str) -> None:
    report = diff_recordings(plain_model(tmp_path / "a", "torch"), plain_model(tmp_path / "b", "torch", wrong))
    assert report.first_divergence == layer
    assert comparison(report, layer, tensor).verdict == "off"


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients(tmp_path: Path) -> None:
    record(tmp_path / "a", "torch", encoder("torch"), grad=True, seed=1)
    record(tmp_path / "b", "megengine", encoder("megengine"), grad=True, seed=2)
    report = diff_recordings(tmp_path / "a", tmp_path / "b")
    assert report.ok, [entry for entry in report.entries if not entry.ok][:3]
    for name in ("grads.query", "grads.q_weight", "grads.out_bias"):
        assert comparison(report, "layers.1.self_attn", name).distances[1].ok
    assert comparison(report, "layers.1.self_attn", "grads.output").verdict == "equal"


def test_wrong_gradients_diverge_from_the_end(tmp_path: Path) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch"), grad=True, seed=1).path

    def swap(document: Any) -> None:
        for number in (1, 2):
            grads = document["calls"][number]["grads"]
            grads["arguments/query"] = document["calls"][number]["grads"]["outputs/0"]

    report = diff_recordings(first, rewritten(first, tmp_path / "b", swap))
    assert report.first_divergence == "layers.2.self_attn"
    found = comparison(report, "layers.2.self_attn", "grads.query")
    assert (found.verdict, found.side) == ("off", "second")
    assert comparison(report, "layers.3.self_attn", "grads.query").ok
    assert report.diagnosis is not None
    assert report.diagnosis.words == "Unexplained: what comes out is right, and these gradients are not: grads.query."


def test_a_fault_in_backward_alone_is_explained(tmp_path: Path) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch"), grad=True, seed=1).path
    data = bytearray(first.read_bytes())
    with open_recording(first) as recording:
        for name, item in recording.calls[2].grads.items():
            tensor = recording.stored(item)
            assert tensor is not None
            if name.startswith("parameters/"):
                offset, length = tensor.extents[0].offset, tensor.extents[0].length
                halved = np.frombuffer(data[offset : offset + length], "<f4") * np.float32(0.5)
                data[offset : offset + length] = halved.tobytes()
    (tmp_path / "b").write_bytes(data)
    report = diff_recordings(first, tmp_path / "b")
    assert report.first_divergence == "layers.2.self_attn"
    assert report.diagnosis is not None
    assert (report.diagnosis.layer, report.diagnosis.side) == ("layers.2.self_attn", str(tmp_path / "b"))
    assert {fault.name for fault in report.diagnosis.faults} == {"gradient scaled"}
    assert "0.5 times" in report.diagnosis.words


# -- one layer by hand -------------------------------------------------------------------------------------------------


def alone(
    path: Path, given: list[np.ndarray], used: list[np.ndarray] | None = None, factor: float = 1.0, **more: Any
) -> Path:
    """One call of one attention layer of 16 features, batch first."""
    spec = MHASpec(16, 4, batch_first=True)
    weights = MHAWeights.random(spec)
    gain = more.get("gain", 1.0)
    weights = dataclasses.replace(weights, q_weight=weights.q_weight * np.float32(gain))
    writer = Writer(path)
    settings = {"embed_dim": 16, "num_heads": 4, "batch_first": True, **more.get("settings", {})}
    writer.layer("attn", recordings.CLASSES["torch"], settings, weights.to_layout("torch", spec))
    output = reference.attend(spec, weights, recordings.Call(*(used or given))).output.astype(np.float32)
    arguments = dict(zip(("query", "key", "value"), given, strict=True))
    writer.call("attn", arguments, [output * np.float32(factor), None], training=more.get("training", False))
    return writer.end()


def test_a_tensor_shared_with_another_input_is_compared(tmp_path: Path) -> None:
    x, memory = inputs(), inputs()[::-1].copy()
    first, second = alone(tmp_path / "a", [x, memory, memory]), alone(tmp_path / "b", [x, memory, x])
    report = diff_recordings(first, second)
    assert comparison(report, "attn", "inputs.value").verdict == "off"
    assert diff_recordings(second, second).ok


def test_dropout_on_one_side_is_a_difference(tmp_path: Path) -> None:
    x = [inputs()] * 3
    on: dict[str, Any] = {"training": True, "settings": {"dropout": 0.1}}
    first, second = alone(tmp_path / "a", x), alone(tmp_path / "b", x, factor=1.2, **on)
    report = diff_recordings(first, second)
    assert comparison(report, "attn", "settings").reason == "dropout active on the second side only"
    report = diff_recordings(second, second)
    assert (report.exit_code, report.runs[0].status) == (2, "failed")
    assert "dropout was active" in report.runs[0].reason
    report = diff_recordings(second, alone(tmp_path / "c", x, factor=float("nan"), **on))
    found = comparison(report, "attn", "output")
    assert (found.verdict, found.side, found.reason, report.exit_code) == ("broken", "second", "NaN or inf", 1)


def test_swapped_axes_are_named(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((5, 5, 16)).astype(np.float32)
    turned = np.ascontiguousarray(x.swapaxes(0, 1))
    report = diff_recordings(alone(tmp_path / "a", [x] * 3), alone(tmp_path / "b", [turned] * 3))
    said = notes(report, "attn")
    assert "batch and sequence are swapped on one side" in said
    assert "query, key, value: swap the first two axes, or set batch_first" in said
    assert "look before" not in said


def test_what_right_layers_amplify_is_no_fault_of_the_next(tmp_path: Path) -> None:
    """Sharp attention makes more of a small difference: both answers are right, and so is what follows from them."""
    paths = []
    for name, change in (("a", 0.0), ("b", 8 * 2.0**-24)):
        x = inputs("float32")
        x = x + np.float32(change) * np.random.default_rng(1).choice([-1, 1], x.shape).astype(np.float32)
        path = alone(tmp_path / f"one_{name}", [x] * 3, gain=400.0)
        with open_recording(path) as recording:
            made = recording.read(recording.calls[0].outputs[0])
            parameters = recording.parameters(recording.calls[0])
        assert made is not None
        writer = Writer(tmp_path / name)
        settings = {"embed_dim": 16, "num_heads": 4, "batch_first": True}
        writer.layer("attn", recordings.CLASSES["torch"], settings, parameters)
        writer.layer("after", "my.Same", {}, {})
        writer.call("attn", {"query": x, "key": x, "value": x}, [made, None])
        writer.call("after", {"x": made}, [made])
        paths.append(writer.end())
    report = diff_recordings(*paths)
    far = drift.apart(*(open_recording(path).read(open_recording(path).calls[1].outputs[0]) for path in paths))
    before = drift.Drift()
    before.add(drift.apart(*(open_recording(path).read(open_recording(path).calls[0].item("query")) for path in paths)))
    assert before.explains(far, 2.0**-24) != ""
    assert report.ok, [entry for entry in report.entries if not entry.ok][:3]


def one_layer(path: Path, of_class: str, parameters: dict[str, Any], given: Any, made: Any, **settings: Any) -> Path:
    writer = Writer(path, of_class.partition(".")[0] if of_class.startswith("mindspore") else "torch")
    writer.layer("fc", of_class, settings, parameters)
    writer.call("fc", given if isinstance(given, dict) else {"input": given}, [made])
    return writer.end()


def test_a_bias_that_a_dense_layer_lacks_is_broken(tmp_path: Path) -> None:
    x, weight, bias = inputs(), np.eye(16, dtype=np.float32), np.ones(16, np.float32)
    linear = {"weight": weight, "bias": bias}
    first = one_layer(tmp_path / "a", "torch.nn.modules.linear.Linear", linear, x, x + bias)
    second = one_layer(tmp_path / "b", "mindspore.nn.layer.basic.Dense", {"weight": weight}, x, x)
    report = diff_recordings(first, second)
    found = comparison(report, "fc", "bias")
    assert (found.verdict, found.side) == ("broken", "second")
    assert "computes something else" not in notes(report, "fc")


@pytest.mark.parametrize("blocked", [-1e4, -1e9, np.finfo(np.float32).min, -np.inf])
def test_masks_of_other_layers_in_another_form(tmp_path: Path, blocked: float) -> None:
    x = inputs()
    paths = []
    floats = np.where(padding(), np.float32(blocked), np.float32(0.0))
    for name, mask in (("a", padding()), ("b", floats), ("c", ~padding()), ("d", np.where(padding(), -1e9, 0.0))):
        given = {"x": x, "mask": mask if mask.dtype == bool else mask.astype(np.float32)}
        paths.append(one_layer(tmp_path / name, "my.Block", {}, given, x))
    assert diff_recordings(paths[0], paths[1]).ok
    assert diff_recordings(paths[1], paths[3]).ok
    assert not diff_recordings(paths[2], paths[1]).ok


def test_a_class_of_the_users_own_is_not_judged_by_its_name(tmp_path: Path) -> None:
    x, weight = inputs(), np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    paths = [one_layer(tmp_path / name, "my.layers.Linear", {"weight": weight}, x, x @ weight) for name in "ab"]
    assert diff_recordings(*paths).ok
    own = [one_layer(tmp_path / n, "torch.nn.Linear", {"weight": weight}, x, x @ weight) for n in "cd"]
    report = diff_recordings(*own)
    assert comparison(report, "fc", "output").verdict == "off"
    assert "computes something else" in notes(report, "fc")


@pytest.mark.parametrize(
    ("kind", "parameters", "given", "made"),
    [
        ("Embedding", {"weight": np.zeros((1, 200_000), "f4")}, np.zeros(200_000, "i8"), np.zeros(4, "f4")),
        ("Linear", {"weight": np.zeros((300_000, 1), "f4")}, np.zeros((300_000, 1), "f4"), np.zeros(4, "f4")),
        ("Linear", {"weight": np.zeros((3, 4), "f4"), "bias": np.zeros(7, "f4")}, np.zeros((3, 4), "f4"), np.ones(3)),
        ("Linear", {"weight": np.zeros(4, "f4")}, np.zeros((3, 4), "f4"), np.zeros((3, 3), "f4")),
        ("LayerNorm", {"weight": np.zeros(0, "f4")}, np.zeros((3, 0), "f4"), np.zeros((3, 0), "f4")),
    ],
)
def test_layers_that_do_not_fit_are_not_computed(
    tmp_path: Path, kind: str, parameters: dict[str, Any], given: Any, made: Any
) -> None:
    path = one_layer(tmp_path / "a", f"torch.nn.{kind}", parameters, given, made, eps=1.0)
    tracemalloc.start()
    report = diff_recordings(path, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    huge = len(made) == 4
    assert (comparison(report, "fc", "output").verdict == "broken") == huge


# -- parameters that change ---------


def stepped(path: Path, form: int = 2, told: bool = True, factor: float = 1.0) -> Path:
    """Two calls of one layer, whose parameters are others at the second one."""
    spec, x = MHASpec(16, 4, batch_first=True), inputs()
    weights = [MHAWeights.random(spec, seed=seed) for seed in (0, 1)]
    writer = Writer(path, form=form)
    settings = {"embed_dim": 16, "num_heads": 4, "batch_first": True}
    named = [each.to_layout("torch", spec) for each in weights]
    writer.layer("attn", recordings.CLASSES["torch"], settings, named[0])
    for number in range(2):
        output = reference.attend(spec, weights[number], recordings.Call(x, x, x)).output.astype(np.float32)
        output = output * np.float32(factor if number else 1.0)
        changed = named[1] if number and told else None
        writer.call("attn", {"query": x, "key": x, "value": x}, [output, None], parameters=changed)
    return writer.end()


def test_each_call_is_judged_by_its_own_parameters(tmp_path: Path) -> None:
    first = stepped(tmp_path / "a")
    report = diff_recordings(first, stepped(tmp_path / "b"))
    assert report.verdict == "equal"
    assert comparison(report, "attn (call 2)", "output").distances[1].ok
    assert comparison(report, "attn (call 2)", "q_weight").ok
    report = diff_recordings(first, stepped(tmp_path / "c", told=False))
    assert report.first_divergence == "attn (call 2)"
    assert comparison(report, "attn (call 2)", "output").side == "second"


def test_a_parameter_that_was_left_out_is_not_missing(tmp_path: Path) -> None:
    first = stepped(tmp_path / "a")

    def lose(document: Any) -> None:
        del document["layers"]["attn"]["parameters"]["in_proj_weight"]
        document["calls"][0]["parameters"] = {"in_proj_weight": {"left_out": "the limit was reached"}}

    report = diff_recordings(first, rewritten(first, tmp_path / "b", lose))
    assert report.ok
    assert "the parameters are not compared: in_proj_weight: given a parameter that was left out" in notes(
        report, "attn"
    )
    assert "not held against the reference" in notes(report, "attn")
    assert comparison(report, "attn (call 2)", "output").distances[1].ok


def test_an_old_recording_is_not_judged_by_parameters_that_it_cannot_tell(tmp_path: Path) -> None:
    first, second = (stepped(tmp_path / name, form=1, told=False) for name in "ab")
    report = diff_recordings(first, second)
    assert report.ok
    assert comparison(report, "attn", "output").distances[1].ok
    assert comparison(report, "attn (call 2)", "output").distances == (None, None)
    assert "recordings of this age do not tell" in notes(report, "attn (call 2)")
    new = stepped(tmp_path / "new")  # of the same run, by a recorder that follows the parameters
    for sides in ((first, new), (new, first)):
        report = diff_recordings(*sides)
        assert (report.exit_code, report.first_divergence) == (0, None)
        assert "recordings of this age do not tell" in notes(report, "attn (call 2)")
    report = diff_recordings(first, stepped(tmp_path / "other", factor=1.01))
    assert report.first_divergence == "attn (call 2)"
    report = diff_recordings(first, stepped(tmp_path / "c", form=1, told=False, factor=1.01))
    assert (report.first_divergence, report.ok) == ("attn (call 2)", False)


# -- what comes after the last layer ---------


def ended(path: Path, times: float = 1.0, answer: Any = None, dtype: str = "float32") -> Path:
    """One attention layer, and the model's own answer: its output through a norm, or what a test says."""
    spec, x = MHASpec(16, 4, batch_first=True), inputs()
    weights = MHAWeights.random(spec)
    writer = Writer(path)
    settings = {"embed_dim": 16, "num_heads": 4, "batch_first": True}
    writer.layer("", "my.Whole", {}, {})
    writer.layer("attn", recordings.CLASSES["torch"], settings, weights.to_layout("torch", spec))
    output = reference.attend(spec, weights, recordings.Call(x, x, x)).output.astype(np.float32)
    writer.call("attn", {"query": x, "key": x, "value": x}, [output, None])
    made = (output / np.sqrt(np.square(output).mean(-1, keepdims=True)) * times).astype(dtype)
    writer.call("", {}, [made] if answer is None else answer)
    return writer.end()


def test_a_fault_after_the_last_layer_is_found(tmp_path: Path) -> None:
    first = ended(tmp_path / "a")
    assert diff_recordings(first, ended(tmp_path / "b", 1 + 2.0**-22)).ok
    report = diff_recordings(first, ended(tmp_path / "c", 1.001))
    assert (report.first_divergence, report.verdict, report.exit_code) == ("(model)", "off", 1)
    assert notes(report, "(model)") == "the fault lies between attn and the model's output"
    assert report.notes == ()
    assert diff_recordings(first, ended(tmp_path / "d", dtype="float64")).ok


def test_an_answer_of_one_number_may_have_cancelled(tmp_path: Path) -> None:
    def scalar(name: str, value: float) -> Path:
        return ended(tmp_path / name, answer=[np.float32([value])])

    first = scalar("a", 1.0)
    assert diff_recordings(first, scalar("b", 1 + 1e-4)).ok
    assert not diff_recordings(first, scalar("c", 1 + 1e-3)).ok
    assert not diff_recordings(first, scalar("d", -1.0)).ok


BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (np.array(2.5, BF16), np.array(2.52, BF16), 2),
        (np.array(2.5, BF16), np.array(-2.5, BF16), 2),
        (np.array(2.5, BF16), np.array(0, BF16), 2),
        (np.array([[0.5, -0.25]], BF16), np.array([[0.25, 0.25]], BF16), 2),
        (np.array([[5.0, -2.5]], BF16), np.array([[-5.0, 5.0]], BF16), 1),
        (np.array(2.5, BF16), np.array(2.5, BF16), 0),
        (np.float32([2.5]), np.array([2.5], BF16), 0),
        (np.float16([2.5]), np.float16([1.5]), 2),
        (np.float16([[0.5, 0.5]]), np.float16([[0.53, 0.47]]), 2),
        (np.linspace(1, 2, 12).astype(BF16), np.linspace(1, 2.02, 12).astype(BF16), 0),
        (np.linspace(1, 2, 12).astype(BF16), np.linspace(1, -2, 12).astype(BF16), 1),
        (np.float32([2.5]), np.float32([-2.5]), 1),
        (np.float32([1e-5]), np.float64([1.1e-5]), 2),  # a loss near 0, of numbers of size 1
        (np.float32([0.3]), np.float64([0.31]), 1),
        (np.zeros((2, 6, 16), "f4"), np.full((2, 6, 16), 1e-12, "f4"), 2),
        (np.zeros((2, 6, 16), "f4"), np.full((2, 6, 16), 1.0, "f4"), 1),
    ],
)
def test_what_cannot_be_told_from_rounding_is_not_called_that(
    tmp_path: Path, first: np.ndarray, second: np.ndarray, code: int
) -> None:
    report = diff_recordings(ended(tmp_path / "a", answer=[first]), ended(tmp_path / "b", answer=[second]))
    assert report.exit_code == code
    if code == 2:
        assert "that cannot be told from rounding" in notes(report, "(model)")
        assert "that cannot be told from rounding" in report.runs[1].reason
        assert report.first_divergence is None


def test_a_row_of_zeros_is_no_rounding_in_any_dtype(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 30, 50)).astype(BF16)
    y = x.copy()
    y[1, 3] = 0
    assert diff_recordings(ended(tmp_path / "a", answer=[x]), ended(tmp_path / "b", answer=[y])).exit_code == 1
    assert diff_recordings(ended(tmp_path / "c", answer=[x]), ended(tmp_path / "d", answer=[-x])).exit_code == 1


@pytest.mark.parametrize("mask", [-np.inf, -1e9, float(np.finfo("f4").min)])
def test_what_a_mask_writes_into_both_answers_is_no_fault_and_hides_none(tmp_path: Path, mask: float) -> None:
    x = inputs()

    def masked(name: str, array: np.ndarray, value: float = mask) -> Path:
        array = array.copy()
        array[..., 12:] = value
        return ended(tmp_path / name, answer=[array])

    first = masked("a", x)
    assert diff_recordings(first, masked("b", x)).exit_code == 0
    assert diff_recordings(first, masked("c", x + np.float32(1e-7))).exit_code == 0
    assert diff_recordings(first, masked("d", x * 2)).exit_code == 1
    assert diff_recordings(first, ended(tmp_path / "e", answer=[x])).exit_code == 1
    coarse = x.astype("f2")
    coarse[..., 12:] = np.float16(mask) if np.isinf(mask) else -6e4
    beside = diff_recordings(ended(tmp_path / "j", answer=[coarse]), first)
    assert beside.exit_code == (0 if np.isinf(mask) else 1)
    nan = [masked(name, x, float("nan")) for name in "fg"]
    assert diff_recordings(*nan).verdict == "broken"
    nothing = [ended(tmp_path / name, answer=[np.array(np.inf)]) for name in "hi"]
    assert diff_recordings(*nothing).verdict == "broken"


def test_integers_of_another_width_are_the_same(tmp_path: Path) -> None:
    index = np.arange(12).reshape(2, 6)
    first = answered(tmp_path / "a", index, index=index)
    report = diff_recordings(first, answered(tmp_path / "b", index.astype("i4"), index=index.astype("i4")))
    assert (report.verdict, report.exit_code) == ("equal", 0)
    assert "output: int64 and int32: the same integers" in notes(report, "layer")
    assert "inputs.index: int64 and int32: the same integers" in notes(report, "layer")
    assert diff_recordings(first, answered(tmp_path / "c", index.astype("i4") + 1, index=index)).exit_code == 1
    assert diff_recordings(first, answered(tmp_path / "d", index > 0, index=index)).verdict == "broken"
    wide = [answered(tmp_path / name, np.array([2**63 + n], "u8"), index=index) for n, name in enumerate("ef")]
    assert diff_recordings(*wide).exit_code == 1


@pytest.mark.parametrize("answers", [(np.arange(4), np.arange(4)[::-1].copy()), (np.arange(4) > 1, np.arange(4) > 2)])
def test_what_picks_among_numbers_depends_on_their_rounding(tmp_path: Path, answers: Any) -> None:
    def picked(name: str, dtype: Any, answer: Any) -> Path:
        writer = Writer(tmp_path / name)
        writer.layer("pick", "my.Pick", {}, {})
        writer.call("pick", {"x": np.linspace(-1, 1, 64).reshape(4, 16).astype(dtype)}, [answer])
        return writer.end()

    first = picked("a", "f4", answers[0])
    assert diff_recordings(first, picked("b", "f4", answers[1])).exit_code == 1
    report = diff_recordings(first, picked("c", BF16, answers[1]))
    assert report.exit_code == 2
    assert "depends on their rounding" in notes(report, "pick")
    assert diff_recordings(first, picked("d", BF16, answers[0])).exit_code == 0


def held(path: Path, answer: Any) -> Path:
    """A model's answer in some container: a dict here is a mapping, a ``Named`` is a dataclass."""
    writer = Writer(path)

    def item(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return {"items": [item(f"{name}/{n}", each) for n, each in enumerate(value)]}
        if isinstance(value, dict):
            return {"named": {key: item(f"{name}/{key}", each) for key, each in value.items()}}
        return writer.item(name, value)

    writer.layer("layer", "my.Layer", {}, {})
    top = isinstance(answer, (tuple, dict)) and not isinstance(answer, Named)
    values = list(answer.values() if isinstance(answer, dict) else answer) if top else [answer]
    writer.call("layer", {"x": inputs()}, [item(f"o/{n}", value) for n, value in enumerate(values)])
    made = writer.end()
    if not top or isinstance(answer, tuple):
        return made
    return rewritten(made, path.with_suffix(".named"), lambda d: d["calls"][0].update(output_names=list(answer)))


class Named(dict[str, Any]):
    """Recorded as a dataclass is: one thing that has names."""


X, Y = inputs(), inputs() + 1
PAIR = {"logits": X, "hidden": Y}


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        (Named(PAIR), PAIR, []),
        (Named(PAIR), (X, Y), []),
        (PAIR, (X, Y), []),
        ({"logits": X}, Named(out=X), []),
        ({"logits": X, "past": None}, X, []),
        ({"logits": X, "past": None}, (X,), []),
        ({"past": None, **PAIR}, (X, Y), []),
        (Named(logits=X, hidden=None), X, []),
        ((X, {"a": Named(PAIR)}), {"p": X, "q": ((X, Y),)}, []),
        (PAIR, {"hidden": Y, "logits": X}, []),
        ((X, Y), X, ["output.1"]),
        (X, (X, Y), ["output.1"]),
        (PAIR, {"hidden": Y}, ["output.logits"]),
        (PAIR, {"hidden": Y, "logits": None}, ["output.logits"]),
        (PAIR, (X,), ["output.hidden"]),
        (PAIR, (Y, X), ["output.logits", "output.hidden"]),
        ((X, None), (X, Y), ["output.1"]),
        ((X, None), (None, X), ["output.0", "output.1"]),
        (None, (X, Y), ["output.0", "output.1"]),
    ],
)
def test_the_container_of_answers_is_no_difference(tmp_path: Path, first: Any, second: Any, wrong: list[str]) -> None:
    for one, other in ((first, second), (second, first)):
        report = diff_recordings(held(tmp_path / "a", one), held(tmp_path / "b", other))
        assert [entry.tensor for entry in report.entries if not entry.ok] in (wrong, wrong[::-1])
        assert report.exit_code == (1 if wrong else 0)
        for path in tmp_path.iterdir():
            path.unlink()


def test_what_was_left_out_as_a_whole_is_not_missing_in_parts(tmp_path: Path) -> None:
    first = answered(tmp_path / "a", {"left_out": "a my.Cache"})
    report = diff_recordings(first, answered(tmp_path / "b", X, Y))
    assert report.exit_code == 2
    assert "output.1 was left out on the first side" in notes(report, "layer")


def test_what_was_held_against_nothing_is_not_what_a_fault_lies_behind(tmp_path: Path) -> None:
    def lose(document: Any) -> None:
        document["calls"][0]["outputs"][0] = {"left_out": "the limit was reached"}

    first = rewritten(ended(tmp_path / "a"), tmp_path / "b", lose)
    report = diff_recordings(first, ended(tmp_path / "c", 1.01))
    said = "the fault lies between the inputs and the model's output; attn lies there too: what it answered was not"
    assert said in notes(report, "(model)")


def test_where_there_is_no_answer_of_the_model_that_is_said(tmp_path: Path) -> None:
    first = ended(tmp_path / "a")
    said = "what comes after attn, the last layer that was recorded, was not compared"
    report = diff_recordings(first, alone(tmp_path / "b", [inputs()] * 3))
    assert (report.ok, report.exit_code) == (True, 0)
    assert said in report.notes[-1]
    cut = ended(tmp_path / "c", answer=[{"left_out": "a my.Cache"}])
    report = diff_recordings(cut, first)
    assert (report.exit_code, said in report.notes[-1]) == (2, True)
    assert report.notes[-1].endswith("output was left out on the first side (a my.Cache)")
    assert report.runs[0].reason == "the model's output is not whole: a my.Cache"
    named = {"named": {"x": {"value": 1}, "y": {"left_out": "a my.Cache"}}}
    report = diff_recordings(*(ended(tmp_path / name, answer=[named]) for name in "de"))
    assert report.exit_code == 2
    assert report.notes[-1].startswith("what comes after attn was compared in part: output.y was left out")

    def lose(document: Any) -> None:
        document["inputs_from"] = "a"

    report = diff_recordings(first, rewritten(ended(tmp_path / "f", 2.0), tmp_path / "g", lose))
    assert (report.ok, "another run's inputs" in report.notes[-1]) == (True, True)

    def only_the_model(document: Any) -> None:
        document["calls"] = [call for call in document["calls"] if not call["layer"]]

    report = diff_recordings(*[rewritten(first, tmp_path / "h", only_the_model)] * 2)
    assert (report.ok, report.runs[0].reason) == (False, "nothing was recorded")


# -- answers of other layers -------


def answered(path: Path, *answers: Any, of_class: str = "my.Layer", names: Any = (), **arguments: Any) -> Path:
    writer = Writer(path)
    writer.layer("layer", of_class, {}, {})
    writer.call("layer", {"x": inputs(), **arguments}, list(answers))
    made = writer.end()
    if not names:
        return made
    return rewritten(made, path.with_suffix(".named"), lambda d: d["calls"][0].update(output_names=list(names)))


@pytest.mark.parametrize(
    ("first", "second", "verdict", "reason"),
    [
        (6.0, -30.0, "off", "relative difference"),
        (6.0, 6.0, "equal", ""),
        (6.0, np.array(6.0, "f4"), "equal", ""),
        (3, 4, "off", "3 and 4"),
        (3, True, "broken", "3 and True"),
        ("a", "b", "off", "'a' and 'b'"),
        ("a", 1.0, "broken", "'a' and a tensor"),
        (1.0, None, "broken", "missing on the second side"),
        (None, np.ones(2, "f4"), "broken", "missing on the first side"),
    ],
)
def test_numbers_and_texts_are_compared(tmp_path: Path, first: Any, second: Any, verdict: str, reason: str) -> None:
    report = diff_recordings(answered(tmp_path / "a", first), answered(tmp_path / "b", second))
    found = comparison(report, "layer", "output")
    assert (found.verdict, reason in found.reason) == (verdict, True)
    assert report.exit_code == (0 if verdict == "equal" else 1)


@pytest.mark.parametrize("asked", [None, True, False])
def test_attention_weights_that_one_side_lacks_are_broken_if_it_was_asked(tmp_path: Path, asked: bool | None) -> None:
    kind, output, weights = "my.MultiheadAttention", inputs(), np.ones((2, 6, 6), "f4")
    given = {} if asked is None else {"need_weights": asked}
    first = answered(tmp_path / "a", output, weights, of_class=kind)
    report = diff_recordings(first, answered(tmp_path / "b", output, None, of_class=kind, **given))
    assert report.exit_code == (0 if asked is False else 1)
    if asked is False:
        assert "attn_weights was left out on the second side (not asked for)" in notes(report, "layer")
    else:
        assert comparison(report, "layer", "attn_weights").reason == "missing on the second side"


def test_what_lies_in_a_mapping_is_compared_by_its_name(tmp_path: Path) -> None:
    x, y = inputs(), inputs() + 1

    def nested(name: str, inner: Any) -> Path:
        writer = Writer(tmp_path / name)
        writer.layer("layer", "my.Layer", {}, {})
        items = {key: writer.item(f"t/{key}", value) for key, value in inner.items()}
        writer.call("layer", {"x": x}, [x, {"items": [{"value": 1}, {"named": items}]}])
        return writer.end()

    first = nested("a", {"p": x, "q": y})
    assert diff_recordings(first, nested("b", {"q": y, "p": x})).verdict == "equal"
    report = diff_recordings(first, nested("c", {"p": x, "q": -y}))
    assert not comparison(report, "layer", "output.1.1.q").ok
    report = diff_recordings(first, nested("d", {"p": x, "q": {"left_out": "a my.Thing"}}))
    assert (report.exit_code, report.runs[1].reason) == (2, "1 of 1 calls are not whole: tensors were left out")
    top = answered(tmp_path / "e", x, y, names=["p", "q"]), answered(tmp_path / "f", y, x, names=["q", "p"])
    assert diff_recordings(*top).verdict == "equal"
    assert not diff_recordings(top[0], answered(tmp_path / "g", y, x)).ok


# -- gradients that are missing ----------------------------------------------------------------------------------------


def without(path: Path, target: Path, names: tuple[str, ...], why: str = "") -> Path:
    def lose(document: Any) -> None:
        for call in document["calls"]:
            for name in names or list(call["grads"]):
                del call["grads"][name]
                document["left_out"] += [f"calls/{call['index']:06d}/grads/{name}: {why}"] if why else []

    return rewritten(path, target, lose)


def test_missing_gradients_are_broken_unless_left_out(tmp_path: Path) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch", layers=1), grad=True, seed=1).path
    packed = ("parameters/in_proj_weight",)
    report = diff_recordings(first, without(first, tmp_path / "b", packed))
    for name in ("grads.q_weight", "grads.k_weight", "grads.v_weight"):
        found = comparison(report, "layers.0.self_attn", name)
        assert (found.verdict, found.side) == ("broken", "second")
    assert comparison(report, "layers.0.self_attn", "grads.out_weight").ok
    assert comparison(report, "layers.0.self_attn", "grads.q_bias").ok
    report = diff_recordings(without(first, tmp_path / "c", packed, "no room"), first)
    assert (report.exit_code, report.runs[0].status) == (2, "failed")
    assert "the gradient of q_weight" in report.runs[0].reason
    assert comparison(report, "layers.0.self_attn", "grads.q_bias").ok
    assert diff_recordings(first, without(first, tmp_path / "d", ())).exit_code == 1


def test_gradients_of_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    spec = MHASpec(16, 4, batch_first=True)
    weights = MHAWeights.random(spec)

    def twice(path: Path, times: float) -> Path:
        writer, x = Writer(path), inputs()
        settings = {"embed_dim": 16, "num_heads": 4, "batch_first": True}
        writer.layer("attn", recordings.CLASSES["torch"], settings, weights.to_layout("torch", spec))
        for _ in range(2):
            output = reference.attend(spec, weights, recordings.Call(x, x, x)).output.astype(np.float32)
            grads = {
                "parameters/in_proj_weight": np.float32(times) * weights.to_layout("torch", spec)["in_proj_weight"]
            }
            writer.call("attn", {"query": x, "key": x, "value": x}, [output, None], grads)
        return writer.end()

    first = twice(tmp_path / "a", 1.0)
    assert diff_recordings(first, first).ok
    report = diff_recordings(first, twice(tmp_path / "b", 2.0))
    assert comparison(report, "attn (call 2)", "grads.q_weight").verdict == "off"


# -- single step, pictures, memory -------------------------------------------------------------------------------------


def test_single_step_sees_a_layer_behind_an_early_error(tmp_path: Path) -> None:
    blocks = encoder("megengine")
    blocks[0].bias = np.zeros_like(blocks[0].bias)
    blocks[2].weights = MHAWeights.random(blocks[2].spec, seed=77)
    report = diff_recordings(*pair(tmp_path, blocks), single_step="numpy")
    steps = [comparison(report, f"layers.{number}.self_attn", "single_step.output") for number in range(4)]
    assert [step.verdict in ("equal", "rounding") for step in steps] == [True, True, False, True]
    assert steps[2].side == "second"
    assert report.first_divergence == "layers.1.self_attn"  # where what came in differs first
    assert [entry.tensor for entry in report.of_layer("layers.3.self_attn") if not entry.ok] == []
    assert "its inputs differ, as what comes after" in notes(report, "layers.3.self_attn")
    assert "the weights differ" in notes(report, "layers.2.self_attn")
    assert not [layer for layer in report.layers if any("computes something else" in note for note in layer.notes)]


def test_single_step_without_the_backend_says_so(tmp_path: Path) -> None:
    report = diff_recordings(*pair(tmp_path), single_step="torch@0.1")
    assert report.ok
    assert "the reference stands in" in report.notes[0]
    with pytest.raises(ArgumentTypeError, match="single_step"):
        diff_recordings(tmp_path / "a", tmp_path / "b", single_step=3)  # type: ignore[arg-type]


def test_pictures(tmp_path: Path) -> None:
    record(tmp_path / "c", "torch", encoder("torch"), need_weights=False)
    report = diff_recordings(pair(tmp_path)[0], tmp_path / "c", pictures=True)
    drawn = {(picture.layer, picture.tensor): picture for picture in report.pictures}
    assert len(drawn[("layers.0.self_attn", "attn_weights")].maps) == H
    assert ("layers.3.self_attn", "output") in drawn


def test_pieces_give_the_same_verdict_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = encoder("megengine")
    blocks[3].used = blocks[3].spec.replace(scale=1.0)
    paths = pair(tmp_path, blocks, mask=None)
    whole = diff_recordings(*paths)
    monkeypatch.setattr(judging, "_SCORES", 2 * H * recordings.L)
    parts = diff_recordings(*paths)
    for layer in ("layers.0.self_attn", "layers.3.self_attn"):
        for tensor in ("output", "attn_weights"):
            a, b = comparison(whole, layer, tensor), comparison(parts, layer, tensor)
            assert (a.verdict, a.side, a.index) == (b.verdict, b.side, b.index)
            assert a.distances[1].max_error == b.distances[1].max_error
            assert a.distances[1].index == b.distances[1].index


def test_long_calls_are_judged_where_they_differ_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch", layers=1), seed=1).path
    monkeypatch.setattr(judging, "_SCORES", H * recordings.L)
    monkeypatch.setattr(judging, "_WORK", 1.0)
    data = bytearray(first.read_bytes())
    with open_recording(first) as recording:
        tensor = recording.stored(recording.calls[0].outputs[0])
        assert tensor is not None
        offset = tensor.extents[0].offset + 4 * (recordings.N * recordings.E * 4 + recordings.E + 3)  # row 4, batch 1
    data[offset : offset + 4] = struct.pack("<f", 9.0)
    (tmp_path / "b").write_bytes(data)
    report = diff_recordings(first, tmp_path / "b")
    found = comparison(report, "layers.0.self_attn", "output")
    assert (found.side, found.distances[1].index) == ("second", (1, 4, 3))
    assert "in 1 of 12 pieces" in notes(report, "layers.0.self_attn")


def test_memory_does_not_grow_with_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_SCORES", 1 << 14)

    def peak(layers: int) -> int:
        record(tmp_path / f"a{layers}", "torch", encoder("torch", layers=layers), big, seed=1)
        tracemalloc.start()
        assert diff_recordings(tmp_path / f"a{layers}", tmp_path / f"a{layers}").ok
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    big = np.random.default_rng(0).standard_normal((512, 8, recordings.E)).astype(np.float32)
    peak(1)
    few, many = peak(2), peak(6)
    assert many < 1.3 * few


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_the_tree_marks_the_first_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = encoder("megengine", layers=24)
    weights = blocks[9].weights
    blocks[9].weights = dataclasses.replace(weights, v_weight=-weights.v_weight)
    record(tmp_path / "a", "torch", encoder("torch", layers=24), seed=1)
    record(tmp_path / "b", "megengine", blocks, seed=2)
    trees.print_tree(diff_recordings(tmp_path / "a", tmp_path / "b"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "└─ layers"
    assert lines[2].split() == ["├─", "...", "7", "layers", "equal", "or", "rounding"]
    (marked,) = [line for line in lines if "<--- first divergence: the weights differ: v_weight" in line]
    assert marked.split()[1:3] == ["9.self_attn", "off"]
    assert any("... 12 layers differ, since their inputs do" in line for line in lines)
    assert len(lines) == 8


def test_the_tree_escapes_what_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "a", "torch", encoder("torch", layers=1), names="\x1b[2J{}")
    trees.print_tree(diff_recordings(tmp_path / "a", tmp_path / "a"))
    assert "\x1b" not in capsys.readouterr().out


def test_notes_are_said_and_what_was_not_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff_command = pytest.importorskip("mhabridge.cli.diff_recordings")
    kind, output, weights = "my.MultiheadAttention", inputs(), np.ones((2, 6, 6), "f4")
    first = answered(tmp_path / "a", output, weights, of_class=kind)
    diff_command.show(diff_recordings(first, first))
    said = capsys.readouterr().out
    assert "not held against the reference: on the first side" in said
    assert said.endswith("verdict: rounding explains every difference\n")
    diff_command.show(diff_recordings(first, answered(tmp_path / "b", -output, weights, of_class=kind)))
    said = capsys.readouterr().out
    assert "Unexplained: nothing was tried" in said
    assert said.endswith("verdict: NOT ok: 1 of 3 tensors differ by more than rounding, first in layer\n")

    def lose(document: Any) -> None:
        document.update(complete=False, left_out=["a: too large", "b: too large", "c: gone"])

    diff_command.show(diff_recordings(first, rewritten(first, tmp_path / "c", lose)))
    said = capsys.readouterr().out
    assert "c: a and 1 more: too large\n" in said
    assert said.endswith("c: the recording broke off, or its run ended with an error\n")


def test_long_runs_with_one_note_say_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "a", "torch", encoder("torch", layers=8), mask=padding())
    passed = np.where(padding(), np.float32(-np.inf), np.float32(0.0))
    record(tmp_path / "b", "torch", encoder("torch", layers=8), mask=padding(), passed=passed)
    trees.print_tree(diff_recordings(tmp_path / "a", tmp_path / "b"))
    lines = capsys.readouterr().out.splitlines()
    assert sum("masks as passed" in line for line in lines) == 1
    assert any("... 6 layers equal or rounding, noted as above" in line for line in lines)
    assert len(lines) == 6


# -- the command ------


def test_the_command_says_what_to_do_next(tmp_path: Path) -> None:
    testing = pytest.importorskip("click.testing")
    from mhabridge.cli import diff, diff_checkpoints, record_kit
    from mhabridge.cli import diff_recordings as command

    path, _ = pair(tmp_path)
    record(tmp_path / "c", "torch", encoder("torch", layers=1), finished=False).journal.close()
    run = testing.CliRunner().invoke
    found = run(command.command, [str(path), str(tmp_path / "c")])
    assert "c.journal is there" in str(found.exception)
    found = run(command.command, [str(path), str(path), "--png", str(tmp_path / "x.jpg")])
    assert (found.exit_code, "does not end in .png" in found.output) == (2, True)
    for each in (command.command, diff_checkpoints.command):
        found = run(each, [str(path), str(path), "--rename", "foo"])
        assert isinstance(found.exception, ArgumentError)
        assert "--drop" not in str(found.exception)
    found = run(diff.command, ["--backends", "torch,"])
    assert (found.exit_code, "names of backends" in found.output) == (2, True)
    said = run(record_kit.command, ["--help"]).output
    assert "\\b" not in said
    assert '  with mhabridge_record.record(model, "a.safetensors"):\n' in said


# -- real models -------------------------------------------------------------------------------------------------------


def real(framework: str, path: Path, spec: Any, weights: Any, fault: str = "") -> Path:
    """An encoder of a framework's own, recorded as people do it."""
    import importlib
    import warnings

    from mhabridge.recording import record as recording

    model = importlib.import_module(f"mhabridge.adapters.{framework}").transformer.build(spec, weights)
    x = np.random.default_rng(0).standard_normal((2, 10, spec.embed_dim)).astype(np.float32)
    mask = np.zeros((2, 10), bool)
    mask[1, 7:] = True
    if framework == "torch":
        import torch

        model.eval()
        for layer in model.layers if fault == "epsilon" else []:
            layer.norm2.eps = 1e-6
        if fault == "bias":
            model.layers[4].linear2.bias.data.zero_()
        if fault == "last bias":
            model.layers[11].linear2.bias.data.zero_()
        with torch.no_grad(), recording(model, path), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.from_numpy(x), src_key_padding_mask=torch.from_numpy(mask))
    else:
        import mindspore

        model.set_train(False)
        with recording(model, path):
            model(mindspore.Tensor(x), src_key_padding_mask=mindspore.Tensor(mask))
    return path


@pytest.mark.frameworks
def test_real_encoders_of_twelve_layers(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mindspore")
    from mhabridge.transformer import TransformerSpec
    from mhabridge.transformer_weights import TransformerWeights

    spec = TransformerSpec("encoder", 64, 4, dim_feedforward=256, dropout=0.0, num_encoder_layers=12, batch_first=True)
    weights = TransformerWeights.random(spec)
    first = real("torch", tmp_path / "torch", spec, weights)
    second = real("mindspore", tmp_path / "mindspore", spec, weights)
    report = diff_recordings(first, second)
    assert report.ok, [entry for entry in report.entries if not entry.ok][:3]
    assert len(report.layers) == 13
    assert report.layers[-1].name == "(model)"
    assert any(entry.comparison.verdict == "rounding" for entry in report.entries)
    for fault, layer in (("epsilon", "layers.1.self_attn"), ("bias", "layers.5.self_attn"), ("last bias", "(model)")):
        wrong = diff_recordings(second, real("torch", tmp_path / fault, spec, weights, fault))
        assert wrong.first_divergence == layer
        between = "between layers.11.self_attn and the model's output"
        assert ("look before this layer" if layer != "(model)" else between) in notes(wrong, layer)
