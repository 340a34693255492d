"""``mb.diff`` and ``mhabridge diff``: what is compared, what fails, and with which exit code."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.backends.registry import Backend
from mhabridge.calls import Result
from mhabridge.diff.inputs import MASKS, random_inputs, random_masks
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError

click_testing = pytest.importorskip("click.testing", reason="click is not installed")

SPEC = mb.MHASpec(16, 4)


def test_the_reference_against_itself_is_equal() -> None:
    report = mb.diff(SPEC, ["numpy"], grads=True, **random_masks("padding+causal", SPEC))
    assert report.ok
    assert report.exit_code == 0
    assert {entry.distance.verdict for entry in report.entries} == {"equal"}
    assert "grads.q_weight" in {entry.tensor for entry in report.entries}


def test_the_packages_are_callable_whatever_was_imported_first() -> None:
    import mhabridge.backends.registry
    import mhabridge.diff.judge

    assert callable(mb.diff)
    assert mb.diff(SPEC, "numpy").ok
    assert next(info.name for info in mb.backends()) == "numpy"
    assert mhabridge.backends.registry.backend is mb.backend


def altered(monkeypatch: pytest.MonkeyPatch, change: Any) -> mb.DiffReport:
    """A diff whose one backend's answer was changed on the way."""
    run = Backend.run

    def changed(self: Backend, *args: Any, **kwargs: Any) -> Result:
        return Result(**{**vars(run(self, *args, **kwargs)), **change(run(self, *args, **kwargs))})

    monkeypatch.setattr(Backend, "run", changed)
    report: mb.DiffReport = mb.diff(SPEC, ["numpy"])
    return report


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda r: {"output": r.output * np.nan}, "broken"),
        (lambda r: {"output": r.output[:1]}, "broken"),
        (lambda r: {"output": r.output.swapaxes(0, 1)}, "broken"),
        (lambda r: {"output": r.output + 1e-3}, "off"),
        (lambda r: {"output": r.output[..., ::-1]}, "off"),
        (lambda r: {"attn_weights": None}, "broken"),
        (lambda r: {"attn_weights": r.attn_weights[::-1]}, "off"),
    ],
)
def test_a_wrong_answer_fails(monkeypatch: pytest.MonkeyPatch, change: Any, verdict: str) -> None:
    report = altered(monkeypatch, change)
    assert not report.ok
    assert report.exit_code == 1
    assert verdict in {entry.distance.verdict for entry in report.entries}
    assert json.loads(report.to_json())["ok"] is False


def test_a_backend_that_dies_or_refuses_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Backend, *args: Any, **kwargs: Any) -> Result:
        raise BackendError("worker", given="killed by SIGSEGV", expected="an answer")

    monkeypatch.setattr(Backend, "run", dies)
    report = mb.diff(SPEC, ["numpy"])
    assert (report.ok, report.exit_code, report.runs[0].status) == (False, 2, "failed")
    assert "SIGSEGV" in report.runs[0].reason
    assert report.entries == ()


def test_an_unknown_backend_is_a_row_that_says_so() -> None:
    report = mb.diff(SPEC, ["numpy", "tensorflow"])
    assert not report.ok
    assert [run.status for run in report.runs] == ["answered", "failed"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"backends": []}, ArgumentError, "at least one"),
        ({"backends": ["numpy", "numpy"]}, ArgumentError, "each name once"),
        ({"inputs": {"query": 1, "keys": 2}}, ArgumentTypeError, "query, key and value"),
        ({"inputs": [1, 2]}, ArgumentTypeError, "2 arrays"),
        ({"attn_mask": np.zeros((3, 3), bool)}, ArgumentError, "attn_mask"),
        ({"dtype": "int8"}, ArgumentError, "dtype"),
        ({"inputs": [np.zeros((0, 2, 16), "f4")] * 3}, ArgumentError, "something to compare"),
        ({"attention_mask": None}, TypeError, "attention_mask"),
    ],
)
def test_a_wrong_call_is_an_exception(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mb.diff(SPEC, **{"backends": ["numpy"], **arguments})


def test_given_weights_and_inputs_are_used() -> None:
    weights = mb.MHAWeights.random(SPEC, seed=9)
    arrays = random_inputs(SPEC, 9)
    report = mb.diff(SPEC, ["numpy"], weights, arrays)
    same = mb.diff(SPEC, ["numpy"], weights, list(arrays.values()))
    other = mb.diff(SPEC, ["numpy"], weights)
    values = [r.entries[0].distance.expected for r in (report, same, other)]
    assert values[0] == values[1] != values[2]


def test_dtype_rounds_weights_and_inputs_on_purpose() -> None:
    report = mb.diff(SPEC, ["numpy"], mb.MHAWeights.random(SPEC), random_inputs(SPEC), dtype="float16")
    assert (report.dtype, report.spec.dtype) == ("float16", "float16")


def test_json_and_csv_hold_everything() -> None:
    report = mb.diff(SPEC, ["numpy"])
    data = json.loads(report.to_json())
    assert mb.MHASpec.from_dict(data["spec"]) == SPEC
    assert [entry["tensor"] for entry in data["entries"]] == ["output", "attn_weights"]
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["verdict"] for row in rows] == ["equal", "equal"]
    assert [row["second_times_bound"] for row in rows] == ["0.0", "0.0"]


@pytest.mark.parametrize("name", MASKS)
def test_random_masks_leave_every_row_open(name: str) -> None:
    from mhabridge.masks import Sizes, canonical

    arguments = random_masks(name, SPEC)
    assert not canonical(**arguments, sizes=Sizes(2, 4, 5, 7)).fully_masked().any()
    assert bool(arguments) == (name != "none")


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("masks", ["none", "padding+causal", "per-head"])
def test_every_backend_agrees(framework: str, masks: str, dtype: str) -> None:
    spec = SPEC.replace(dtype=dtype)
    report = mb.diff(spec, ["numpy", framework], grads=True, average_attn_weights=True, **random_masks(masks, spec))
    if dtype == "float16" and framework == "torch@1.8.1":  # it has no half precision on a CPU
        assert [run.status for run in report.runs] == ["answered", "refused"]
        return
    assert report.ok, report.to_json()
    assert report.worst_pair is not None
    assert report.worst_pair.comparison.max_abs < (0.1 if dtype == "float16" else 1e-4)


# -- the command ---------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    from mhabridge.cli.diff import command

    return click_testing.CliRunner().invoke(command, list(arguments), catch_exceptions=True)


def test_command_prints_a_table_and_a_verdict() -> None:
    result = invoke("--backends", "numpy", "--masks", "padding+causal", "--grads")
    assert result.exit_code == 0, result.output
    assert "grads.q_weight" in result.output
    assert "rounding explains every difference" in result.output


def test_command_json() -> None:
    result = invoke("--backends", "numpy", "--json", "--embed-dim", "8", "--num-heads", "2", "--no-bias", "--per-head")
    data = json.loads(result.output)
    assert data["spec"]["q_bias"] is False
    assert data["ok"] is True
    assert len(data["entries"][1]["index"]) == 4


def test_command_spec_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(mb.MHASpec(12, 3, kdim=5).to_json(), encoding="utf-8")
    assert json.loads(invoke("--backends", "numpy", "--spec", str(path), "--json").output)["spec"]["kdim"] == 5


def test_command_exit_code_when_a_backend_cannot_be_asked() -> None:
    result = invoke("--backends", "numpy,nothing")
    assert result.exit_code == 2
    assert "nothing" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--embed-dim", "10", "--num-heads", "4"], "multiple of num_heads"),
        (["--masks", "diagonal"], "diagonal"),
        (["--masks", "bool+float"], "one attn_mask"),
        (["--spec", "missing.json"], "missing.json"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
        (["--weights", "x.safetensors", "--no-bias"], "--no-bias"),
        (["--fully-masked", "maybe"], "maybe"),
        (["--prefix", "encoder"], "--prefix"),
        (["--spec", "x.json", "--embed-dim", "8", "--batch-first"], "--embed-dim, --batch-first"),
        (["--dtype", "int4"], "int4"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], words: str) -> None:
    result = invoke("--backends", "numpy", *arguments)
    assert isinstance(result.exception, mb.MHABridgeError)  # main() prints it and exits with 2
    assert words in str(result.exception)


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--target-length", "-3"], ["--seed", "-1"], ["--embed-dim", "x"]]
)
def test_command_refuses_numbers_out_of_range(arguments: list[str]) -> None:
    assert invoke("--backends", "numpy", *arguments).exit_code == 2


def test_command_reads_a_packed_vector_with_its_sizes(tmp_path: pathlib.Path) -> None:
    spec = mb.MHASpec(8, 2, kdim=6, vdim=4, batch_first=True)
    np.savez(tmp_path / "model.npz", **mb.MHAWeights.random(spec).to_layout("megengine", spec, prefix="attn"))
    file = ["--weights", str(tmp_path / "model.npz"), "--prefix", "attn", "--num-heads", "2"]
    result = invoke("--backends", "numpy", *file, "--embed-dim", "8", "--kdim", "6", "--vdim", "4", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["spec"]["kdim"] == 6
    assert isinstance(invoke("--backends", "numpy", *file).exception, mb.MHABridgeError)


def test_command_reads_a_checkpoint(tmp_path: pathlib.Path) -> None:
    spec = mb.MHASpec(8, 2)
    named = mb.MHAWeights.random(spec).to_layout("hf-bert", spec, prefix="encoder.layer.0.attention")
    np.savez(tmp_path / "model.npz", **named)
    prefix = ["--weights", str(tmp_path / "model.npz"), "--prefix", "encoder.layer.0.attention", "--num-heads", "2"]
    result = invoke("--backends", "numpy", *prefix)
    assert result.exit_code == 0, result.output
    assert "hf-bert" in result.output


@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_nan_that_no_mask_explains_is_refused(what: str) -> None:
    """The reference is NaN then, and so is every honest backend: that is no answer."""
    weights, arrays = mb.MHAWeights.random(SPEC), random_inputs(SPEC)
    if what == "weights":
        tree = {name: np.array(array) for name, array in weights.arrays().items()}
        tree["q_weight"][0, 0] = np.nan
        weights = mb.MHAWeights(**tree)
    else:
        arrays["key"][0, 0, 0] = np.inf
    with pytest.raises(ArgumentError, match="finite numbers"):
        mb.diff(SPEC, ["numpy"], weights, arrays)


def test_an_output_that_only_one_backend_has_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    run, find = Backend.run, mb.backend
    other = Backend(dataclasses.replace(find("numpy").info, name="other"))

    def more(self: Backend, *args: Any, **kwargs: Any) -> Result:
        result = run(self, *args, **kwargs)
        return dataclasses.replace(result, grads={"query": result.output}) if self is other else result

    monkeypatch.setattr(Backend, "run", more)
    monkeypatch.setattr("mhabridge.diff.running.find_backend", lambda name: other if name == "other" else find(name))
    report = mb.diff(SPEC, ["numpy", "other"])
    assert not report.ok
    assert [entry.comparison.verdict for entry in report.entries if entry.tensor == "grads.query"] == ["broken"]
    assert [pair.comparison.verdict for pair in report.pairs if pair.tensor == "grads.query"] == ["broken"]


def test_outputs_never_go_over_what_is_read(tmp_path: pathlib.Path) -> None:
    spec = mb.MHASpec(8, 2)
    path = tmp_path / "model.npz"
    np.savez(path, **mb.MHAWeights.random(spec).to_layout("torch", spec, prefix="attn"))
    before = path.read_bytes()
    given = ["--backends", "numpy", "--weights", str(path), "--prefix", "attn", "--num-heads", "2"]
    for options in (["--csv", str(path)], ["--html", str(tmp_path / "x"), "--csv", str(tmp_path / "x")]):
        result = invoke(*given, *options)
        assert result.exit_code == 2, result.output
    assert invoke(*given, "--csv", str(tmp_path / "none" / "x.csv")).exit_code == 2
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert invoke(*given, "--csv", str(tmp_path / "x.csv")).exit_code == 0
    assert (tmp_path / "x.csv").read_text().startswith("layer,tensor")
