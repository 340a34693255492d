"""docs/pytorch.md, its table of other frameworks' layers: each row is measured on the framework's own layer, as it is,
and on the drop-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.backends.worker import Worker
from tests.conftest import usable
from tests.pages import rows_of

pytestmark = pytest.mark.frameworks

TABLE = rows_of("pytorch.md", "Other frameworks' layers")
# What cannot be asserted of a native layer, and why.
VARIES = {
    "mindspore-dead-row": "it leaves memory as it was",
    "megengine-bool-mask": "it races with itself",
    "megengine-evaluation-gradient": "it may end the process",
}
X = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
PADDING = np.array([[False, False, True], [False, True, True]])
CAUSAL = np.triu(np.ones((3, 3), bool), 1)
ADDED = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)

Make = Callable[..., Any]


def test_what_varies_is_a_row_of_the_page_that_says_so() -> None:
    assert {name for name, (own, _) in TABLE.items() if own == "varies"} == set(VARIES)


# -- MindSpore --------------------------------------------------------------------------------------------------------


def answer(layer: Any, *arrays: np.ndarray, **call: Any) -> tuple[Any, ...]:
    import mindspore

    tensors = {name: mindspore.Tensor(v) if isinstance(v, np.ndarray) else v for name, v in call.items()}
    found = layer(*(mindspore.Tensor(array) for array in arrays or (X,) * 3), **tensors)
    return tuple(None if tensor is None else tensor.asnumpy() for tensor in found)


def word(layer: Any, found: tuple[Any, ...], answers: dict[str, dict[str, Any]], arrays: Any = (X,) * 3) -> str:
    """Which call's answer this is, by the reference."""
    spec, weights = mb.extract(layer)
    for name, call in answers.items():
        exact = mb.backend("numpy").run(spec, weights, *call.pop("inputs", arrays), **call)
        if np.allclose(found[0], exact.output, rtol=0, atol=1e-4, equal_nan=True):
            return name
    return "another answer"


def mixed_masks(make: Make) -> str:
    layer = make(8, 2)
    ones = PADDING.astype(np.float32)
    found = answer(layer, key_padding_mask=PADDING, attn_mask=ADDED)
    answers = {"masked": {"key_padding_mask": PADDING}, "padding adds 1.0": {"key_padding_mask": ones}}
    return word(layer, found, {name: {"attn_mask": ADDED, **call} for name, call in answers.items()})


def self_then_cross(make: Make) -> str:
    import mindspore

    layer = make(8, 2)
    one, *others = (mindspore.Tensor(X), mindspore.Tensor(X + 1), mindspore.Tensor(X * X))
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        layer(one, one, one)
        found = tuple(tensor.asnumpy() for tensor in layer(one, *others))
    finally:
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    return word(layer, found, {"three tensors": {"inputs": (X, X + 1, X * X)}, "self-attention": {}})


def dead_row(make: Make) -> str:
    output = answer(make(8, 2), attn_mask=np.ones((3, 3), bool))[0]
    return "NaN" if np.isnan(output).all() else "a number"


def keywords(make: Make) -> str:
    import mindspore

    x = mindspore.Tensor(X)
    return "taken" if make(8, 2)(query=x, key=x, value=x)[0].shape == X.shape else "another shape"


def without_weights(make: Make) -> str:
    return {1: "a tuple of one", 2: "a pair"}[len(answer(make(8, 2), need_weights=False))]


def causal(make: Make) -> str:
    layer = make(8, 2)
    return word(layer, answer(layer, is_causal=True), {"causal": {"is_causal": True}, "not causal": {}})


def dropout_of_one(make: Make) -> str:
    layer = make(8, 2, dropout=1.0)
    layer.set_train(True)
    return "weights" if answer(layer)[1].any() else "weights of 0"


def fresh_mode(make: Make) -> str:
    return "training" if make(8, 2).training else "evaluation"


def fresh_out_bias(make: Make) -> str:
    return "random" if mb.extract(make(8, 2))[1].arrays()["out_bias"].any() else "zero"


MINDSPORE: dict[str, Callable[[Make], str]] = {
    "mindspore-mixed-masks": mixed_masks,
    "mindspore-self-then-cross": self_then_cross,
    "mindspore-dead-row": dead_row,
    "mindspore-keywords": keywords,
    "mindspore-without-weights": without_weights,
    "mindspore-causal": causal,
    "mindspore-dropout-of-one": dropout_of_one,
    "mindspore-fresh-mode": fresh_mode,
    "mindspore-fresh-out-bias": fresh_out_bias,
}


@pytest.mark.parametrize("name", MINDSPORE)
def test_mindspore(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    from mhabridge.adapters.mindspore import MultiheadAttention

    monkeypatch.chdir(tmp_path)  # a failed compilation leaves files behind
    own, ours = TABLE[name]
    look = MINDSPORE[name]
    if name not in VARIES:
        assert or_error(look, mindspore.nn.MultiheadAttention) == own
    assert or_error(look, MultiheadAttention) == ours


def or_error(look: Callable[[Make], str], make: Make) -> str:
    try:
        return look(make)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__


# -- MegEngine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    if not usable("megengine"):
        pytest.skip("megengine is not installed")
    source = Path(__file__).with_name("worker_megengine_native.py").read_text(encoding="utf-8")
    made = Worker(mb.backend("megengine").info.python, "megengine", extra_modules={"facts": source})
    yield made
    made.close()


MEGENGINE = [name for name in TABLE if name.startswith("megengine-")]


@pytest.mark.parametrize("name", MEGENGINE)
def test_megengine(worker: Worker, name: str) -> None:
    own, ours = TABLE[name]
    fact = name.partition("-")[2]
    if name not in VARIES:
        assert worker.call("facts:look", {"fact": fact, "dropin": False}, timeout=60) == own
    assert worker.call("facts:look", {"fact": fact, "dropin": True}, timeout=60) == ours


def test_every_row_has_a_measurement_and_every_measurement_a_row(worker: Worker) -> None:
    facts = worker.call("facts:names", {})
    assert list(TABLE) == [*MINDSPORE, *(f"megengine-{fact}" for fact in facts)]
