"""What layers and models answer, of whatever kind: it is recorded, or left out by name, and never passed over."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge.diff.recordings import diff_recordings
from mhabridge.recording import record
from mhabridge.recording.reading import open_recording

pytestmark = pytest.mark.frameworks


def answering(answer: Any) -> Any:
    """An encoder, and what a function makes of its output."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = torch.nn.TransformerEncoder(layer, 2), torch.rand(2, 3, 8)

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model.eval()

        def forward(self, x: Any) -> Any:
            return answer(self.encoder(x))

    return Model(), x


def both(tmp_path: Path, first: Any, second: Any) -> Any:
    """The comparison of two such models."""
    for name, answer in (("a", first), ("b", second)):
        model, x = answering(answer)
        with record(model, tmp_path / name, overwrite=True):
            model(x)
    return diff_recordings(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan")])
def test_a_number_that_is_none_is_recorded_and_broken(number: Any, tmp_path: Path) -> None:
    for first, second in ((number, 2.5), (2.5, number), (number, number)):
        report = both(tmp_path, lambda x, answer=first: answer, lambda x, answer=second: answer)
        assert (report.verdict, report.exit_code) == ("broken", 1)
        report = both(tmp_path, lambda x, a=first: {"loss": a, "n": 1}, lambda x, a=second: {"loss": a, "n": 1})
        assert (report.verdict, report.exit_code) == ("broken", 1)


def test_an_answer_that_no_file_can_hold_is_not_compared(tmp_path: Path) -> None:
    for first, second in (
        (lambda x: x.to_sparse(), lambda x: (2 * x).to_sparse()),
        (lambda x: {1, 2}, lambda x: {1, 3}),
        (lambda x: object(), lambda x: x),
    ):
        report = both(tmp_path, first, second)
        assert report.exit_code == 2
        assert "output was left out on the first side" in report.notes[-1]


class Own(dict[str, Any]):
    """A mapping that is made of other things than of its items."""

    def __init__(self, one: Any, other: Any) -> None:
        super().__init__(one=one, other=other)

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("not to be updated")


class Uncopied(Own):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not to be copied")


@pytest.mark.parametrize("kind", [Own, Uncopied, collections.defaultdict])
def test_a_mapping_of_the_users_own_does_not_end_the_recording(kind: Any, tmp_path: Path) -> None:
    def made(x: Any) -> Any:
        return kind(list, {"one": x, "other": x + 1}) if kind is collections.defaultdict else kind(x, x + 1)

    torch = pytest.importorskip("torch")

    class Layer(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return made(super().forward(x))

    layer, x = Layer(8, 8), torch.ones(2, 8)
    with record(layer, tmp_path / "a", layers="all", grads=True) as recorder:
        answer = layer(x.requires_grad_())
        assert type(answer) is kind
        (answer["one"] * answer["other"]).sum().backward()
    with open_recording(tmp_path / "a") as found:
        assert found.complete
        grads = found.calls[0].grads
    assert ("outputs/1" in grads) == (kind is not Uncopied)
    assert any("cannot be made again" in line for line in recorder.left_out) == (kind is Uncopied)
