"""Biases that are missing, doubled or somewhere else, and the positions that are appended to keys and values."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from mhabridge.diff.diagnosis.evidence import Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.hypotheses import Change, Hypothesis
from mhabridge.diff.diagnosis.packed import WORDS, native_name, taken
from mhabridge.diff.diagnosis.state import LETTERS, State, Tensor

ALL = (*LETTERS, "out")


def _groups(case: Case) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Biases that one thing may happen to: each by itself, those of the packed projection, all."""
    there = [letter for letter in ALL if case.state.has(f"{letter}_bias")]
    for letter in there:
        yield (letter,), f"{letter}_bias", native_name(f"{letter}_bias", case.spec)
    if set(LETTERS) <= set(there):
        yield LETTERS, "q_bias, k_bias, v_bias", "in_proj_bias"
    if len(there) > 1:
        yield tuple(there), "all biases", "all biases"


def missing(case: Case) -> Iterator[Hypothesis]:
    """A bias was not added."""
    for letters, where, native in _groups(case):
        names = [f"{letter}_bias" for letter in letters]
        fault = Fault("bias missing", where, f"{where} was not added", f"{native}: add it")
        yield Hypothesis(fault, functools.partial(_without, names=names))


def _without(state: State, names: list[str]) -> State | None:
    return state.with_parameters(**dict.fromkeys(names)) if state.has(*names) else None


def doubled(case: Case) -> Iterator[Hypothesis]:
    """A bias was added twice."""
    for letters, where, native in _groups(case):
        names = [f"{letter}_bias" for letter in letters]
        fault = Fault("bias doubled", where, f"{where} was added twice", f"{native}: add it once")
        yield Hypothesis(fault, functools.partial(_twice, names=names))


def _twice(state: State, names: list[str]) -> State | None:
    if not state.has(*names):
        return None
    return state.with_parameters(**{name: state.parameters[name].then("twice", _double) for name in names})


def _double(bias: np.ndarray) -> np.ndarray:
    return 2.0 * bias


def misplaced(case: Case) -> Iterator[Hypothesis]:
    """A bias on another projection: in the place of its own, as well as it, or two or three of them exchanged."""
    for to, source in itertools.permutations(ALL, 2):
        if case.state.has(f"{source}_bias", f"{to}_weight"):
            yield from _misplaced(case, to, source)
    for order in list(itertools.permutations(ALL))[1:]:
        moves = {f"{to}_bias": f"{source}_bias" for to, source in zip(ALL, order, strict=True) if to != source}
        if taken(case.state, moves) is None:
            continue
        found = ", ".join(WORDS[each] for each in order)
        fault = Fault(
            "bias on the wrong projection",
            ", ".join(moves),
            f"the biases of query, key, value and output were taken as those of {found}",
            f"in_proj_bias, out_proj.bias: order query, key, value, output, not {found}",
        )
        yield Hypothesis(fault, functools.partial(taken, moves=moves), rare=len(moves) > 2)


def _misplaced(case: Case, to: str, source: str) -> Iterator[Hypothesis]:
    own, other = f"{to}_bias", f"{source}_bias"
    if case.state.has(own):
        words = f"the {WORDS[to]} projection added the {WORDS[source]}'s bias instead of its own"
    else:
        words = f"the {WORDS[to]} projection, which has no bias, added the {WORDS[source]}'s"
    target = native_name(own, case.spec) if case.state.has(own) else f"the {WORDS[to]} projection"
    mend = f"{native_name(other, case.spec)}: add it to the {WORDS[source]}, not to {target}"
    fault = Fault("bias on the wrong projection", own, words, mend)
    yield Hypothesis(fault, lambda state: _replaced(state, own, other, False))
    moved = Fault(
        "bias on the wrong projection",
        f"{other}, {own}",
        f"{other} was added to the {WORDS[to]} projection and not to its own",
        mend,
    )
    yield Hypothesis(moved, lambda state: _replaced(state, own, other, True), rare=case.state.has(own))


def _replaced(state: State, own: str, other: str, move: bool) -> State | None:
    """With ``move`` the other's bias is added to what is there, and lost where it belongs."""
    found, mine = state.parameters.get(other), state.parameters.get(own)
    weight = state.parameters.get(own.replace("bias", "weight"))
    if found is None or weight is None or found.shape != weight.shape[:1]:
        return None
    if not move:
        return state.with_parameters(**{own: found})
    total = found if mine is None else mine.then("plus", np.add, found)
    return state.with_parameters(**{own: total, other: None})


def appended_rows(case: Case) -> Iterator[Hypothesis]:
    """bias_k, bias_v and the zero position: lost, exchanged, added, or in the other order."""
    state = case.state
    if state.bias_row:
        yield _row("bias_k, bias_v", "the learned position was not appended", "append them", _no_bias_row)
        for name in ("bias_k", "bias_v"):
            words = f"{name} was taken as zeros"
            yield _row(name, words, "append it", functools.partial(_zeroed, name=name))
        words = "each was appended in the place of the other"
        exchanged = {"bias_k": "bias_v", "bias_v": "bias_k"}
        yield _row("bias_k, bias_v", words, "exchange the two", lambda state: taken(state, exchanged))
    if state.zero_row:
        yield _row("add_zero_attn", "the zero position was not appended", "append it", lambda s: _zero_row(s, False))
    else:
        words = "a zero position was appended that the layer does not have"
        yield _row("add_zero_attn", words, "turn it off", lambda s: _zero_row(s, True))
    if state.bias_row and state.zero_row:
        words = "the zero position was appended before bias_k and bias_v"
        yield _row("add_zero_attn", words, "append it last", lambda s: s.but(rows_swapped=True))


def _row(where: str, words: str, mend: str, change: Change) -> Hypothesis:
    name = "zero position" if where == "add_zero_attn" else "bias_k and bias_v"
    return Hypothesis(Fault(name, where, words, f"{where}: {mend}"), change)


def _no_bias_row(state: State) -> State | None:
    return state.but(bias_row=False) if state.bias_row else None


def _zero_row(state: State, there: bool) -> State | None:
    return None if state.zero_row == there else state.but(zero_row=there)


def _zeroed(state: State, name: str) -> State | None:
    if not state.bias_row or not state.has(name):
        return None
    zeros: Tensor = state.parameters[name].then("zeros", np.zeros_like)
    return state.with_parameters(**{name: zeros})
