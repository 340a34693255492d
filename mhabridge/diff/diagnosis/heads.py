"""Heads: split or merged by the wrong axes, too many or too few, or in another order, which is found by matching.

There are H! orders, so they are not tried. With a projection's heads in an order p, what is observed is a sum over
heads h of what head h gives with that projection's head p(h). All H x H such terms are computed; the H x H factors of
0 and 1 that the sum must have are found by least squares (or, where each head's weights were observed, by looking for
the nearest), and then the whole computation is judged like any other hypothesis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mhabridge.diff.diagnosis.computing import LARGE
from mhabridge.diff.diagnosis.evidence import Bench, Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.hypotheses import Hypothesis
from mhabridge.diff.diagnosis.state import LETTERS, State, Tensor

_SUBSETS = (("q",), ("k",), ("v",), ("out",), ("q", "k"), LETTERS, ("k", "v"), ("q", "v"))
_EQUATIONS = 1200
_LARGEST = 32  # heads


def interleaved(case: Case) -> Iterator[Hypothesis]:
    """view(d, H) instead of view(H, d) when splitting or merging, and the reverse."""
    if case.state.heads == 1:
        return
    groups = [("q",), ("k",), ("v",), ("out",), ("q", "k"), LETTERS, (*LETTERS, "out")]
    for letters in groups:
        if not case.state.has(*(f"{letter}_weight" for letter in letters)):
            continue
        for way, words in (("d, H", "(d, H) instead of (H, d)"), ("back", "(H, d) and then transposed")):
            names = ", ".join(f"{letter}_weight" for letter in letters)
            verb = "merged" if letters == ("out",) else "split"
            fault = Fault(
                "heads interleaved",
                names,
                f"the features of {', '.join(letters)} were {verb} as {words}",
                f"{names}: rows of a head lie together (H, d); reorder them",
            )
            rare = len(letters) == 2
            yield Hypothesis(fault, functools.partial(_interleave, letters=letters, way=way), rare)


def _interleave(state: State, letters: Sequence[str], way: str) -> State | None:
    if not state.has(*(f"{letter}_weight" for letter in letters)):
        return None
    changed = {}
    for letter in letters:
        weight, bias = state.parameters[f"{letter}_weight"], state.parameters.get(f"{letter}_bias")
        size = weight.shape[1] if letter == "out" else weight.shape[0]
        if size % state.heads:
            return None
        index = _interleaving(size, state.heads, way)
        if letter == "out":
            changed["out_weight"] = weight.then(("columns", way, state.heads), lambda w, i=index: w[:, i])
            continue
        changed[f"{letter}_weight"] = Tensor.of_rows(("rows", way, state.heads), (weight,), index)
        if bias is not None:
            changed[f"{letter}_bias"] = Tensor.of_rows(("rows", way, state.heads), (bias,), index)
    return state.with_parameters(**changed)


def _interleaving(size: int, heads: int, way: str) -> np.ndarray:
    shape = (size // heads, heads) if way == "d, H" else (heads, size // heads)
    return np.arange(size).reshape(shape).T.ravel()


def not_moved(case: Case) -> Iterator[Hypothesis]:
    """Features became heads, or heads features, by reshape alone, without moving the axes."""
    if case.state.heads == 1:
        return
    for order in ("batch first", "sequence first"):
        shape = "(N, T, H * d) as (N, H, T, d)" if order == "batch first" else "(T, N, H * d) as (N, H, T, d)"
        for split, merge in ((False, True), (True, False), (True, True)):
            what = " and ".join(["split"] * split + ["merged"] * merge)
            fault = Fault(
                "heads reshaped without transposing",
                what.replace(" and ", ", ").replace("merged", "merge"),
                f"heads were {what} by reshape alone, taking {shape}",
                "split: reshape to (N, T, H, d), then transpose to (N, H, T, d); merge: transpose back first",
            )
            changes = {"split": order if split else "", "merge": order if merge else ""}
            rare = order == "sequence first" or (split and merge)
            yield Hypothesis(fault, functools.partial(_set, changes=changes), rare)


def _set(state: State, changes: Mapping[str, Any]) -> State:
    return state.but(**changes)


def wrong_number(case: Case) -> Iterator[Hypothesis]:
    """Another number of heads, with the scale that goes with it, or with the right one."""
    spec, masks = case.spec, case.state.masks
    if not case.state.has(*(f"{letter}_weight" for letter in LETTERS)) or case.state.bias_row:
        return
    tensors = [tensor for mask in masks for tensor in (mask.blocked, mask.added) if tensor is not None]
    if any(tensor.shape[1] != 1 for tensor in tensors):
        return
    sizes = [spec.num_heads * spec.q_head_dim, spec.num_heads * spec.v_head_dim]
    candidates = {1, spec.num_heads * 2, spec.num_heads // 2, spec.q_head_dim, 4, 8, 12, 16}
    for heads in sorted(candidates - {spec.num_heads, 0}):
        if any(size % heads for size in sizes):
            continue
        fault = Fault(
            "wrong number of heads",
            "num_heads",
            f"the layer had {heads} heads instead of {spec.num_heads}",
            f"num_heads: {spec.num_heads}, not {heads}",
        )
        usual = {"heads": heads, "scale": (heads / sizes[0]) ** 0.5}
        yield Hypothesis(fault, functools.partial(_set, changes=usual), rare=heads not in (1, 2 * spec.num_heads))


# -- another order -----------------------------------------------------------------------------------------------------


def permutations(bench: Bench, state: State) -> Iterator[Hypothesis]:
    """The orders of heads that explain best what was observed, one for each set of projections it may have happened to.

    Args:
        bench: where to look.
        state: what else is known to have gone wrong, or the clean one.
    """
    heads = state.heads
    plain = not (state.split or state.merge) and state.axis in (-1, -2)
    if not 1 < heads <= _LARGEST or not plain or "output" not in bench.observed:
        return
    for letters in _SUBSETS:
        if not state.has(*(f"{letter}_weight" for letter in letters)):
            continue
        with np.errstate(all="ignore"):
            order = _matched(bench, state, letters)
        if order is None or (order == np.arange(heads)).all() or len(set(order.tolist())) < heads:
            continue
        yield _permuted(letters, order)


def _permuted(letters: tuple[str, ...], order: np.ndarray) -> Hypothesis:
    names = ", ".join(f"{letter}_weight" for letter in letters)
    shown = ", ".join(str(int(each)) for each in order)
    what = "columns" if letters == ("out",) else "rows"
    fault = Fault(
        "heads permuted",
        names,
        f"the heads of {', '.join(letters)} stand in the order {shown}",
        f"{names}: reorder the {what} by head; they stand as {shown}",
    )
    return Hypothesis(fault, lambda state: _reorder(state, letters, order))


def _reorder(state: State, letters: tuple[str, ...], order: np.ndarray) -> State | None:
    if len(order) != state.heads:
        return None
    changed = {}
    key = ("order", tuple(order.tolist()))
    for letter in letters:
        weight, bias = state.parameters.get(f"{letter}_weight"), state.parameters.get(f"{letter}_bias")
        if weight is None:
            return None
        size = weight.shape[1] if letter == "out" else weight.shape[0]
        index = np.arange(size).reshape(len(order), -1)[order].ravel()
        if letter == "out":
            changed["out_weight"] = weight.then((*key, "columns"), lambda w, i=index: w[:, i])
            continue
        changed[f"{letter}_weight"] = Tensor.of_rows(key, (weight,), index)
        if bias is not None:
            changed[f"{letter}_bias"] = Tensor.of_rows(key, (bias,), index)
    return state.with_parameters(**changed)


def _matched(bench: Bench, state: State, letters: tuple[str, ...]) -> np.ndarray | None:
    """For each head the one whose part of those projections it has."""
    attention = _attention(bench, state, letters)
    if bench.case.per_head and {"q", "k"} & set(letters):
        observed = bench.observed["attn_weights"]
        if observed.shape != attention[0].shape:
            return None
        error = np.stack([np.nan_to_num(np.square(each - observed)).sum(axis=(0, 2, 3)) for each in attention])
        return np.asarray(error.argmin(axis=0))
    return _by_least_squares(bench, state, _terms(bench, state, letters, attention))


def _attention(bench: Bench, state: State, letters: tuple[str, ...]) -> list[np.ndarray]:
    """For each source head i: (N, H, L, S') with i's part in the place of every head's."""
    computer = bench.computer
    q, k = computer.heads("q", state), computer.heads("k", state)
    if not {"q", "k"} & set(letters):
        return [computer.attention(state)] * state.heads
    extra = int(state.bias_row) + int(state.zero_row)
    found = []
    for i in range(state.heads):
        query = np.broadcast_to(q[:, i : i + 1], q.shape) if "q" in letters else q
        key = k
        if "k" in letters:
            key = np.broadcast_to(k[:, i : i + 1], k.shape)
            if extra:  # the appended positions keep their heads
                key = np.concatenate([key[:, :, :-extra], k[:, :, -extra:]], axis=2)
        found.append(computer.softmax(computer.score(query, key, state), state))
    return found


def _terms(bench: Bench, state: State, letters: tuple[str, ...], attention: list[np.ndarray]) -> np.ndarray:
    """What head h would add to the output with the source head i: (N * L * F, H, H), i last."""
    value = bench.computer.heads("v", state)
    extra = int(state.bias_row) + int(state.zero_row)
    terms = []
    if letters == ("out",):
        # Head h's context meets the columns i. What is made here head by head is context i through the columns h, so
        # the axes are exchanged: left as they are they give the inverse of the order.
        context = np.matmul(attention[0], value)
        each = [np.broadcast_to(context[:, i : i + 1], context.shape) for i in range(state.heads)]
        return np.stack([_projected(bench, state, part) for part in each], axis=1)
    for i in range(state.heads):
        part = value
        bench.computer.work += attention[i].size * value.shape[-1]
        if "v" in letters:
            part = np.broadcast_to(value[:, i : i + 1], value.shape)
            if extra:
                part = np.concatenate([part[:, :, :-extra], value[:, :, -extra:]], axis=2)
        terms.append(_projected(bench, state, np.matmul(attention[i], part)))
    return np.stack(terms, axis=-1)


def _projected(bench: Bench, state: State, context: np.ndarray) -> np.ndarray:
    """(N, H, L, d) through each head's columns of the output projection: (N * L * F, H)."""
    heads, size = context.shape[1], context.shape[3]
    weight = state.parameters.get("out_weight")
    features = bench.cut.features
    matrix = np.eye(heads * size) if weight is None else weight.array
    matrix = matrix if features is None else matrix[features]
    columns = matrix.reshape(len(matrix), heads, size).transpose(1, 2, 0)
    bench.computer.work += context.size * len(matrix)
    return np.asarray(np.matmul(context, columns[None]).transpose(0, 2, 3, 1).reshape(-1, heads))


def _by_least_squares(bench: Bench, state: State, terms: np.ndarray) -> np.ndarray | None:
    heads = state.heads
    blank = state.with_parameters(out_bias=None).but(residual=False)
    rest = bench.computer.output(state) - bench.computer.output(blank)
    wanted = (bench.observed["output"] - rest).ravel()
    matrix = terms.reshape(len(wanted), heads * heads)
    good = np.flatnonzero(np.isfinite(wanted) & np.isfinite(matrix).all(axis=1))
    if len(good) > _EQUATIONS:
        good = good[np.linspace(0, len(good) - 1, _EQUATIONS).astype(int)]
    if len(good) < heads:
        return None
    matrix, wanted = matrix[good], wanted[good]
    unknowns = heads * heads
    bench.computer.work += (matrix.shape[0] + unknowns / 3.0) * unknowns**2 / LARGE
    normal = matrix.T @ matrix
    ridge = 1e-9 * max(float(np.trace(normal)) / len(normal), 1e-300)
    try:
        factors = np.linalg.solve(normal + ridge * np.eye(len(normal)), matrix.T @ wanted)
    except np.linalg.LinAlgError:
        return None
    return np.asarray(factors.reshape(heads, heads).argmax(axis=1))
