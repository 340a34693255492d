"""``mb.diff(..., steps=K)``: honest backends stay together, and a wrong gradient parts them at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.backends.registry import Backend
from mhabridge.calls import Result
from mhabridge.diff.inputs import random_masks
from mhabridge.diff.training import nudged
from mhabridge.errors import ArgumentError, ArgumentTypeError

click_testing = pytest.importorskip("click.testing", reason="click is not installed")
SPEC = mb.MHASpec(16, 4)


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_honest_backends_stay_together(framework: str, dtype: str) -> None:
    spec = SPEC.replace(dtype=dtype)
    report = mb.diff(spec, ["numpy", framework], steps=8, **random_masks("padding+causal", spec))
    if dtype == "float16" and framework == "torch@1.8.1":  # it has no half precision on a CPU
        assert [run.status for run in report.runs] == ["answered", "refused"]
        return
    assert report.ok, [step for step in report.steps if not step.explained]
    assert [step.step for step in report.steps] == list(range(1, 9))
    assert report.steps[-1].apart > 0  # they do not share a result


@pytest.mark.parametrize(
    "spoil",
    [
        lambda grads: {**grads, "q_bias": np.zeros_like(grads["q_bias"])},
        lambda grads: {name: grad * np.float32(1.001) for name, grad in grads.items()},
        lambda grads: {**grads, "v_weight": grads["v_weight"].T},
        lambda grads: {**grads, "out_bias": grads["out_bias"] * np.nan},
    ],
)
def test_a_wrong_gradient_parts_them_at_the_first_steps(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """The second backend's answer is the reference's, rounded, with one fault."""
    run = Backend.run
    find = mb.backend

    def changed(self: Backend, *args: Any, **kwargs: Any) -> Result:
        result = run(self, *args, **kwargs)
        rounded = {name: np.asarray(grad, np.float32) for name, grad in result.grads.items()}
        spoilt = spoil(rounded) if rounded and self is other else rounded
        return dataclasses.replace(result, output=result.output.astype(np.float32), grads=spoilt)

    other = Backend(dataclasses.replace(find("numpy").info, name="other"))
    monkeypatch.setattr(Backend, "run", changed)
    for module in ("running", "training"):
        monkeypatch.setattr(
            f"mhabridge.diff.{module}.find_backend", lambda name: other if name == "other" else find(name)
        )
    report = mb.diff(SPEC, ["numpy", "other"], steps=4)
    assert all(entry.ok for entry in report.entries)  # only the training is wrong
    assert not report.ok
    assert report.exit_code == 1
    assert report.verdict == "off"
    assert any(not step.explained for step in report.steps[:2])


@pytest.mark.parametrize(("steps", "error"), [(-1, ArgumentError), (1.5, ArgumentTypeError), (True, ArgumentTypeError)])
def test_a_number_of_steps_that_is_none(steps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="steps"):
        mb.diff(SPEC, ["numpy"], steps=steps)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_nudge_is_one_unit_in_the_last_place(dtype: str) -> None:
    weights = mb.MHAWeights.random(SPEC).astype(dtype)
    moved = nudged(weights)
    for name, array in weights.arrays().items():
        other = moved.arrays()[name]
        assert other.dtype == array.dtype
        bits = np.dtype(f"i{array.dtype.itemsize}")
        apart = np.abs(array.view(bits).astype(np.int64) - other.view(bits).astype(np.int64))
        assert set(np.unique(apart[array != 0])) <= {1, 2}  # two below a power of two, where the units are halved


def test_the_reference_alone_has_nobody_to_part_from() -> None:
    with pytest.raises(ArgumentError, match="another backend"):
        mb.diff(SPEC, ["numpy"], steps=3)


@pytest.mark.frameworks
def test_the_command_says_that_they_stay_together(framework: str) -> None:
    from mhabridge.cli.diff import command

    arguments = ["--backends", framework, "--embed-dim", "8", "--num-heads", "2", "--steps", "3"]
    result = click_testing.CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"trained, numpy and {framework} stay together over 3 steps" in result.output


def test_words_say_where_they_part() -> None:
    from mhabridge.cli.diff import steps_in_words
    from mhabridge.diff.report import Step

    steps = tuple(Step(k, "q_bias", "a", "b", 1e-3, 1e-8, 1e5, k < 3) for k in range(1, 5))
    (line,) = steps_in_words(mb.DiffReport((), (), steps=steps))
    assert "a and b part at step 3" in line


def test_a_backend_that_fails_in_training_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run, find = Backend.run, mb.backend
    other = Backend(dataclasses.replace(find("numpy").info, name="other"))
    calls = []

    def dies(self: Backend, *args: Any, **kwargs: Any) -> Result:
        calls.append(self)
        if self is other and calls.count(other) > 3:
            raise mb.BackendError("worker", given="killed by SIGSEGV")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Backend, "run", dies)
    for module in ("running", "training"):
        monkeypatch.setattr(
            f"mhabridge.diff.{module}.find_backend", lambda name: other if name == "other" else find(name)
        )
    report = mb.diff(SPEC, ["numpy", "other"], steps=4)
    assert len(report.entries) == 4
    assert (report.ok, report.exit_code) == (False, 2)
    assert report.runs[1].reason.startswith("in training: worker: given killed by SIGSEGV")
