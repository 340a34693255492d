"""docs/pytorch.md: every cell of its table is measured, on the PyTorch that is installed, on 1.8.1 where that is, and
by each way into mhabridge; every row has a situation here, and every situation a row there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from tests.conftest import usable
from tests.pages import rows_of

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

from tests import worker_pytorch  # noqa: E402  (needs PyTorch)

SPEC = mb.MHASpec(8, 2, batch_first=True)
WEIGHTS = mb.MHAWeights.random(SPEC, seed=3)
N, L = 2, 3
X = np.random.default_rng(11).standard_normal((N, L, 8)).astype(np.float32)
LONG = np.random.default_rng(12).standard_normal((N, 5, 8)).astype(np.float32)
CAUSAL = np.triu(np.ones((L, L), bool), 1)
OTHER = np.array([[False, False, True], [False, True, False], [True, False, False]])
PADDING = np.array([[False, False, True], [False, False, False]])
ADDED = np.linspace(-1, 1, L * L, dtype=np.float32).reshape(L, L)
ADDED_PADDING = np.array([[0.5, -1.0, 0.25], [1.5, 0.0, -0.5]], np.float32)
DEAD_PADDING = np.array([[True, True, True], [False, False, False]])
DEAD_ROW = np.array([[False, False, False], [True, True, True], [False, False, False]])
DEAD_HEAD = np.zeros((N * 2, L, L), bool)
DEAD_HEAD[1, 2] = True
LEAKY = X.copy()
LEAKY[0, 2] = np.nan  # what PADDING blocks
OUT_BIAS = np.broadcast_to(WEIGHTS.arrays()["out_bias"], (N, L, 8))


def inf(mask: np.ndarray) -> np.ndarray:
    """The float mask that blocks the same."""
    return np.where(mask, np.float32(-np.inf), np.float32(0))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an answer would be: that of the reference to a call, or given numbers."""

    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: tuple[np.ndarray, ...] | None = None
    numbers: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Situation:
    """A call, and the answers that may be given to it, by the words of the page; errors have their class's name."""

    call: dict[str, Any]
    answers: dict[str, Answer] = dataclasses.field(default_factory=dict)
    inputs: tuple[np.ndarray, ...] = (X,)
    with_weights_only: bool = False
    output_only: bool = False
    dropout: float = 0.0


def reads(call: dict[str, Any]) -> dict[str, Answer]:
    """A mask of an unusual kind: taken for what it is, or ignored."""
    return {"as meant": Answer(call), "ignored": Answer({})}


def dead(mask: dict[str, Any]) -> Situation:
    """A call with fully masked rows."""
    return Situation(mask, {"NaN": Answer(mask), "zero": Answer({**mask, "fully_masked": "zero"}), "ignored": Answer()})


SITUATIONS = {
    "causal-alone": Situation({"is_causal": True}, {"causal": Answer({"attn_mask": CAUSAL}), "not causal": Answer()}),
    "causal-and-padding": Situation(
        {"is_causal": True, "key_padding_mask": PADDING},
        {
            "both": Answer({"attn_mask": CAUSAL, "key_padding_mask": PADDING}),
            "the padding": Answer({"key_padding_mask": PADDING}),
            "causal": Answer({"attn_mask": CAUSAL}),
        },
    ),
    "causal-and-its-mask": Situation(
        {"is_causal": True, "attn_mask": CAUSAL}, {"causal": Answer({"attn_mask": CAUSAL})}
    ),
    "causal-and-another-mask": Situation(
        {"is_causal": True, "attn_mask": OTHER},
        {
            "both": Answer({"attn_mask": OTHER | CAUSAL}),
            "the mask": Answer({"attn_mask": OTHER}),
            "causal": Answer({"attn_mask": CAUSAL}),
        },
    ),
    "causal-another-mask-and-padding": Situation(
        {"is_causal": True, "attn_mask": OTHER, "key_padding_mask": PADDING},
        {
            "all three": Answer({"attn_mask": OTHER | CAUSAL, "key_padding_mask": PADDING}),
            "the masks": Answer({"attn_mask": OTHER, "key_padding_mask": PADDING}),
            "causal": Answer({"attn_mask": CAUSAL}),
        },
    ),
    "causal-more-keys": Situation(
        {"is_causal": True, "attn_mask": np.triu(np.ones((L, 5), bool), 1)},
        {
            "top left": Answer({"attn_mask": np.triu(np.ones((L, 5), bool), 1)}),
            "bottom right": Answer({"attn_mask": np.triu(np.ones((L, 5), bool), 3)}),
        },
        inputs=(X, LONG, LONG),
    ),
    "causal-alone-more-queries": Situation(
        {"is_causal": True}, {"top left": Answer({"attn_mask": np.triu(np.ones((5, L), bool), 1)})}, (LONG, X, X)
    ),
    "dead-padding": dead({"key_padding_mask": DEAD_PADDING}),
    "dead-padding-float": dead({"key_padding_mask": inf(DEAD_PADDING)}),
    "dead-row": dead({"attn_mask": DEAD_ROW}),
    "dead-row-float": dead({"attn_mask": inf(DEAD_ROW)}),
    "dead-head": dead({"attn_mask": DEAD_HEAD}),
    "byte-padding": Situation({"key_padding_mask": PADDING.astype(np.uint8)}, reads({"key_padding_mask": PADDING})),
    "byte-mask": Situation({"attn_mask": OTHER.astype(np.uint8)}, reads({"attn_mask": OTHER})),
    "byte-of-seven": Situation({"attn_mask": OTHER.astype(np.uint8) * 7}, reads({"attn_mask": OTHER})),
    "integer-padding": Situation({"key_padding_mask": PADDING.astype(np.int64)}, reads({"key_padding_mask": PADDING})),
    "integer-mask": Situation({"attn_mask": OTHER.astype(np.int64)}, reads({"attn_mask": OTHER})),
    "integer-of-two": Situation(
        {"key_padding_mask": PADDING.astype(np.int64) * 2}, reads({"key_padding_mask": PADDING})
    ),
    "float-padding": Situation({"key_padding_mask": ADDED_PADDING}, reads({"key_padding_mask": ADDED_PADDING})),
    "half-mask": Situation({"attn_mask": ADDED.astype(np.float16)}, reads({"attn_mask": ADDED.astype(np.float16)})),
    "half-padding": Situation(
        {"key_padding_mask": ADDED_PADDING.astype(np.float16)},
        reads({"key_padding_mask": ADDED_PADDING.astype(np.float16)}),
    ),
    "double-mask": Situation({"attn_mask": ADDED.astype(np.float64)}, reads({"attn_mask": ADDED})),
    "bool-padding-float-mask": Situation(
        {"key_padding_mask": PADDING, "attn_mask": ADDED},
        {"both": Answer({"key_padding_mask": PADDING, "attn_mask": ADDED}), "the mask": Answer({"attn_mask": ADDED})},
    ),
    "float-padding-bool-mask": Situation(
        {"key_padding_mask": ADDED_PADDING, "attn_mask": OTHER},
        {
            "both": Answer({"key_padding_mask": ADDED_PADDING, "attn_mask": OTHER}),
            "the mask": Answer({"attn_mask": OTHER}),
        },
    ),
    "one-row-for-all": Situation({"attn_mask": OTHER[:1]}, reads({"attn_mask": OTHER[:1].repeat(L, axis=0)})),
    "a-mask-for-each-sequence": Situation(
        {"attn_mask": np.stack([OTHER, CAUSAL])}, reads({"attn_mask": np.stack([OTHER, OTHER, CAUSAL, CAUSAL])})
    ),
    "one-padding-for-all": Situation(
        {"key_padding_mask": PADDING[:1]}, reads({"key_padding_mask": PADDING[:1].repeat(N, axis=0)})
    ),
    "nan-behind-padding": Situation(
        {"key_padding_mask": PADDING},
        {"NaN": Answer({"key_padding_mask": PADDING}), "kept out": Answer({"key_padding_mask": PADDING}, (X,))},
        inputs=(LEAKY,),
        output_only=True,
    ),
    "weights-in-training": Situation(
        {},
        {
            "after dropout": Answer(numbers=(OUT_BIAS, np.zeros((N, L, L)))),
            "before dropout": Answer(numbers=(OUT_BIAS, np.full((N, L, L), 1 / L))),
        },
        inputs=(np.ones_like(X),),
        with_weights_only=True,
        dropout=1.0,
    ),
    "weights-by-head": Situation(
        {"average_attn_weights": False}, {"by head": Answer({"average_attn_weights": False})}, with_weights_only=True
    ),
    "unbatched": Situation({}, {"(L, E)": Answer()}, inputs=(X[0],)),
    "other-batch": Situation(
        {},
        {"one long batch": Answer({}, (X[:1], *[LONG.swapaxes(0, 1).reshape(1, -1, 8)] * 2))},
        inputs=(X[:1], LONG, LONG),
    ),
}


# -- what an answer says ----------------------------------------------------------------------------------------------


@functools.cache
def exact(name: str, word: str, need_weights: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The output and weights that a word stands for."""
    situation = SITUATIONS[name]
    answer = situation.answers[word]
    if answer.numbers is not None:
        return answer.numbers
    inputs = answer.inputs or situation.inputs
    result = mb.backend("numpy").run(
        SPEC, WEIGHTS, *(inputs * 3 if len(inputs) == 1 else inputs), need_weights=need_weights, **answer.call
    )
    return result.output, result.attn_weights


def said(name: str, output: Any, weights: Any) -> str:
    """The one word that an answer's numbers stand for."""
    found = []
    weights = None if SITUATIONS[name].output_only else weights
    for word in SITUATIONS[name].answers:
        pairs = zip((output, weights), exact(name, word, weights is not None), strict=True)
        if all(b is None or alike(a, b) for a, b in pairs):
            found.append(word)
    return " or ".join(found) or "another answer"


def alike(a: Any, b: np.ndarray) -> bool:
    a = np.asarray(a, np.float64)
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-4, equal_nan=True)


def needs(name: str) -> tuple[bool, ...]:
    return (True,) if SITUATIONS[name].with_weights_only else (True, False)


# -- PyTorch's own layer ----------------------------------------------------------------------------------------------


def requests(name: str, grad: bool, need_weights: bool) -> dict[str, Any]:
    """A call of a situation as tests/worker_pytorch.py takes it."""
    situation = SITUATIONS[name]
    call = {**situation.call, "need_weights": need_weights}
    return {
        "layer": {"embed_dim": 8, "num_heads": 2, "batch_first": True, "dropout": situation.dropout},
        "state": {key: array.tolist() for key, array in WEIGHTS.to_layout("torch", SPEC).items()},
        "training": bool(situation.dropout),
        "grad": grad,
        "inputs": [plain(array) for array in situation.inputs],
        "call": {key: plain(item) if isinstance(item, np.ndarray) else item for key, item in call.items()},
    }


def plain(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "values": array.tolist()}


def word_of(name: str, answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])
    return said(name, answer["output"], answer["weights"]) + (", warns" if answer["warned"] else "")


def slow(name: str, need_weights: bool) -> str:
    if need_weights not in needs(name):
        return "-"
    answer = worker_pytorch.answer(requests(name, True, need_weights))
    assert not answer.get("fast")
    return word_of(name, answer)


def fast(name: str) -> str:
    words = set()
    for need_weights in needs(name):
        answer = worker_pytorch.answer(requests(name, False, need_weights))
        taken = "error" in answer or answer["fast"]
        words.add(word_of(name, answer) if taken else "not taken")
    return " or ".join(sorted(words))


@functools.lru_cache(maxsize=1)
def old_answers() -> dict[str, str]:
    """Every situation on PyTorch 1.8.1, which has one path whether weights are asked for or not."""
    cases = [(name, need_weights) for name in SITUATIONS for need_weights in needs(name)]
    done = subprocess.run(
        [mb.backend("torch@1.8.1").info.python, "-I", str(Path(worker_pytorch.__file__))],
        input=json.dumps([requests(name, True, need_weights) for name, need_weights in cases]),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    words: dict[str, set[str]] = {}
    for (name, _), answer in zip(cases, json.loads(done.stdout), strict=True):
        words.setdefault(name, set()).add(word_of(name, answer))
    return {name: " or ".join(sorted(found)) for name, found in words.items()}


# -- mhabridge --------------------------------------------------------------------------------------------------------


def ours(name: str) -> Iterator[tuple[str, str]]:
    """What each way into mhabridge answers."""
    situation = SITUATIONS[name]
    arrays = situation.inputs * 3 if len(situation.inputs) == 1 else situation.inputs
    for backend, need_weights, mode in itertools.product(("torch", "torch@1.8.1"), needs(name), ("auto", "composed")):
        call = {**situation.call, "need_weights": need_weights, "mode": mode, "training": bool(situation.dropout)}
        if usable(backend):
            run = functools.partial(mb.backend(backend).run, SPEC.replace(dropout=situation.dropout), WEIGHTS)
            yield f"{backend} {mode}", answered(name, lambda: unpack(run(*arrays, **call)))  # noqa: B023
    inputs = [torch.tensor(array) for array in situation.inputs]
    inputs = inputs * 3 if len(inputs) == 1 else inputs
    call = {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in situation.call.items()}
    for (kind, layer), need_weights, grad in itertools.product(layers(name).items(), needs(name), (True, False)):
        ask = functools.partial(layer, *inputs, need_weights=need_weights, **call)
        with torch.set_grad_enabled(grad):
            yield f"{kind} grad={grad}", answered(name, ask)


def layers(name: str) -> dict[str, Callable[..., Any]]:
    """``mb.attend`` on PyTorch's own layer, and the drop-in."""
    from mhabridge.adapters.torch import MultiheadAttention

    rate = SITUATIONS[name].dropout
    native = mb.build(SPEC.replace(dropout=rate), "torch", WEIGHTS).train(bool(rate))
    dropin = MultiheadAttention(8, 2, dropout=rate, batch_first=True).train(bool(rate))
    dropin.load_state_dict(native.state_dict())
    return {"attend": functools.partial(mb.attend, native), "drop-in": dropin}


def unpack(result: Any) -> tuple[Any, Any]:
    return result.output, result.attn_weights


def answered(name: str, ask: Callable[[], Any]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output, weights = ask()
    except mb.MHABridgeError as error:
        return type(error).__name__
    return said(name, *(x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (output, weights)))


# -- the page ---------------------------------------------------------------------------------------------------------


TABLE = rows_of("pytorch.md", "The table")


def test_every_row_has_a_situation_and_every_situation_a_row() -> None:
    assert list(TABLE) == list(SITUATIONS)


@pytest.mark.parametrize("name", SITUATIONS)
def test_pytorchs_paths(name: str) -> None:
    if not mb.backend("torch").info.version.startswith("2.13."):
        pytest.skip("the page is about PyTorch 2.13")
    assert [slow(name, True), slow(name, False), fast(name)] == TABLE[name][:3]


@pytest.mark.parametrize("name", SITUATIONS)
def test_pytorch_1_8(name: str) -> None:
    if not usable("torch@1.8.1"):
        pytest.skip("torch@1.8.1 is not installed: make test-versions")
    assert old_answers()[name] == TABLE[name][3]


@pytest.mark.parametrize("name", SITUATIONS)
def test_mhabridge_has_one_answer(name: str) -> None:
    found = list(ours(name))
    assert len(found) >= 4
    assert {word for _, word in found} == {TABLE[name][4]}, found


def test_another_answer_is_seen() -> None:
    wrong, attention = exact("causal-alone", "not causal", True)
    assert said("causal-alone", wrong, attention) == "not causal"
    assert said("causal-alone", wrong, np.zeros((N, L, L))) == "another answer"
    assert said("causal-alone", np.where(np.arange(8) == 3, np.nan, wrong), attention) == "another answer"
    assert said("dead-row", *exact("dead-row", "zero", True)) == "zero"
