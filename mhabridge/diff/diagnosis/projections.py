"""Projections that were transposed, or reshaped where they should have been transposed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from mhabridge.diff.diagnosis.evidence import Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.hypotheses import Hypothesis
from mhabridge.diff.diagnosis.packed import native_name, stacked
from mhabridge.diff.diagnosis.state import LETTERS, State

_WORDS = {"q": "query", "k": "key", "v": "value", "out": "output"}


def transposed(case: Case) -> Iterator[Hypothesis]:
    """Each projection, the three of the packed one, all four, and the packed one as a whole."""
    there = [letter for letter in (*LETTERS, "out") if case.state.has(f"{letter}_weight")]
    for letter in there:
        yield _of((letter,), native_name(f"{letter}_weight", case.spec), f"the {_WORDS[letter]} projection")
    if [letter for letter in there if letter in LETTERS] == list(LETTERS):
        names = "each block of in_proj_weight" if stacked(case) else "q_proj_weight, k_proj_weight, v_proj_weight"
        yield _of(LETTERS, names, "the query, key and value projections", "q_weight, k_weight, v_weight")
    if len(there) == 4:
        yield _of(tuple(there), "all four weights", "every projection", "all weights")
    if stacked(case):
        yield from _whole(case)


def _of(letters: tuple[str, ...], native: str, words: str, where: str = "") -> Hypothesis:
    lie, were = ("lie", "were") if words.endswith("s") else ("lies", "was")
    fault = Fault(
        "projection transposed",
        where or f"{letters[0]}_weight",
        f"{words} {lie} there as (in, out) and {were} used as (out, in)",
        f"{native}: transpose",
    )
    return Hypothesis(fault, lambda state: _transpose(state, letters))


def _transpose(state: State, letters: tuple[str, ...]) -> State | None:
    names = [f"{letter}_weight" for letter in letters]
    if not state.has(*names):
        return None
    return state.with_parameters(**{name: state.parameters[name].then("T", _turned) for name in names})


def _turned(weight: np.ndarray) -> np.ndarray:
    """A transposed matrix keeps its shape only if it is square; else somebody had to reshape it to make it fit."""
    return weight.T if weight.shape[0] == weight.shape[1] else weight.T.reshape(weight.shape)


def _whole(case: Case) -> Iterator[Hypothesis]:
    """(3E, E) and (E, 3E) reshaped into each other where a transposition was needed."""
    ways = {
        "written as (E, 3E) and read by reshape": lambda whole: whole.T.reshape(whole.shape),
        "read as (E, 3E) by reshape, then transposed": lambda whole: whole.reshape(whole.shape[::-1]).T,
    }
    for words, way in ways.items():
        fault = Fault(
            "projection transposed", "in_proj_weight", f"the packed projection was {words}", "in_proj_weight: transpose"
        )
        yield Hypothesis(fault, functools.partial(_pack, words=words, way=way), rare=True)


def _pack(state: State, words: str, way: Callable[[np.ndarray], np.ndarray]) -> State | None:
    names = [f"{letter}_weight" for letter in LETTERS]
    if not state.has(*names):
        return None
    tensors = [state.parameters[name] for name in names]
    rows = np.cumsum([0, *(tensor.shape[0] for tensor in tensors)])
    changed = {}
    for name, start, stop in zip(names, rows[:-1], rows[1:], strict=True):

        def part(*arrays: np.ndarray, start: int = start, stop: int = stop) -> np.ndarray:
            return way(np.concatenate(arrays))[start:stop]

        changed[name] = tensors[0].then((words, name), part, *tensors[1:], shape=state.parameters[name].shape)
    return state.with_parameters(**changed)
