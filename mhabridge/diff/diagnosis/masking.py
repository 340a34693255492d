"""Masks: inverted, ignored, added as numbers, multiplied, at the wrong corner, on the wrong axis."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from mhabridge.diff.diagnosis.evidence import Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.hypotheses import Hypothesis
from mhabridge.diff.diagnosis.state import Mask, State, Tensor

_CAUSAL = "is_causal"


def _each(case: Case, fault: Fault, name: str, change: Callable[[Mask], Mask | None], rare: bool = False) -> Hypothesis:
    def changed(state: State) -> State | None:
        mask = state.mask(name)
        made = None if mask is None else change(mask)
        return None if made is None else state.with_mask(name, made)

    return Hypothesis(fault, changed, rare)


def _given(case: Case) -> list[Mask]:
    return [mask for mask in case.state.masks if mask.name != _CAUSAL]


def inverted(case: Case) -> Iterator[Hypothesis]:
    """True was read as "may attend", or given as that; is_causal too, with torch.tril(...) where True blocks."""
    for mask in case.state.masks:
        if mask.blocked is not None:
            fault = Fault(
                "causal mask inverted" if mask.name == _CAUSAL else "mask inverted",
                mask.name,
                f"{mask.name} was read the other way round: what it blocks was open, and only that",
                f"{mask.name}: invert",
            )
            yield _each(case, fault, mask.name, _inverted)


def _inverted(mask: Mask) -> Mask | None:
    if mask.blocked is None:
        return None
    return dataclasses.replace(mask, blocked=mask.blocked.then("not", np.logical_not))


def ignored(case: Case) -> Iterator[Hypothesis]:
    """A mask that was not looked at; is_causal too."""
    for mask in case.state.masks:
        name = "causal mask missing" if mask.name == _CAUSAL else "mask ignored"
        fault = Fault(name, mask.name, f"{mask.name} was not applied", f"{mask.name}: apply it")
        yield Hypothesis(fault, functools.partial(_dropped, name=mask.name))
    given = _given(case)
    if len(case.state.masks) > 1:
        fault = Fault("mask ignored", "all masks", "no mask was applied", "all masks: apply them")
        yield Hypothesis(fault, lambda state: state.but(masks=()), rare=len(given) < 2)


def _dropped(state: State, name: str) -> State | None:
    return None if state.mask(name) is None else state.with_mask(name, None)


def added(case: Case) -> Iterator[Hypothesis]:
    """A bool mask taken for numbers: 1.0 is added to the scores."""
    for mask in case.state.masks:
        if mask.blocked is None or mask.added is not None:
            continue
        for where, turn in (("blocked", False), ("open", True)):
            fault = Fault(
                "mask added as 1.0",
                mask.name,
                f"{mask.name} was added to the scores as 1.0 at {where} positions, and blocked nothing",
                f"{mask.name}: put -inf where it blocks, or pass bool",
            )
            yield _each(case, fault, mask.name, functools.partial(_as_numbers, turn=turn), rare=turn)


def _as_numbers(mask: Mask, turn: bool) -> Mask | None:
    if mask.blocked is None or mask.added is not None:
        return None
    tensor = mask.blocked.then(("1.0", turn), lambda blocked: (blocked != turn).astype(np.float64))
    return dataclasses.replace(mask, blocked=None, added=tensor)


def multiplied(case: Case) -> Iterator[Hypothesis]:
    """A mask that became a factor."""
    uses = {
        "scores": "the scores were multiplied by 0 where it blocks, which leaves exp(0)",
        "scores by mask": "the scores were multiplied by 1 where it blocks and by 0 elsewhere",
        "probabilities": "the softmax was multiplied by 0 where it blocks, and its rows no longer add up to 1",
    }
    for mask in case.state.masks:
        for use, words in uses.items():
            if mask.blocked is None:
                continue
            fault = Fault(
                "mask multiplied",
                mask.name,
                f"{mask.name}: {words}",
                f"{mask.name}: put -inf into the scores before the softmax",
            )
            yield _each(case, fault, mask.name, functools.partial(_used, use=use), rare=use == "scores by mask")


def _used(mask: Mask, use: str) -> Mask | None:
    return dataclasses.replace(mask, use=use) if mask.blocked is not None and mask.use == "block" else None


# -- causal ------------------------------------------------------------------------------------------------------------


def causal(case: Case) -> Iterator[Hypothesis]:
    """The triangle at another corner, with its diagonal, turned round, or where none was asked for."""
    length, source = case.sizes.target, case.sizes.source
    there = case.state.mask(_CAUSAL) is not None
    kinds = {
        "strict": ("causal mask strict", "the diagonal was blocked too", "leave the diagonal open", 0),
        "turned": ("causal mask inverted", "the past was blocked instead of the future", "block j > i", None),
    }
    if length != source:
        text = f"it was aligned bottom right (j > i + {source - length})"
        kinds["corner"] = ("causal mask at the other corner", text, "align it top left (j > i)", 1 + source - length)
    if not there:
        text = "a causal mask was applied that was not asked for"
        kinds = {"added": ("causal mask not asked for", text, "turn it off", 1)}
        if length != source:
            kinds["added at the other corner"] = (*kinds["added"][:3], 1 + source - length)
    for kind, (name, words, mend, diagonal) in kinds.items():
        fault = Fault(name, _CAUSAL, f"is_causal: {words}", f"is_causal: {mend}")
        tensor = _triangle(case, kind, diagonal)
        yield Hypothesis(fault, functools.partial(State.with_mask, name=_CAUSAL, changed=Mask(_CAUSAL, tensor)))


def _triangle(case: Case, kind: str, diagonal: int | None) -> Tensor:
    ones = np.ones((case.sizes.target, case.sizes.source), bool)
    blocked = np.tril(ones, -1) if diagonal is None else np.triu(ones, diagonal)
    return Tensor.of((_CAUSAL, kind), blocked[None, None], case.memo)


# -- float masks -------------------------------------------------------------------------------------------------------


def float_masks(case: Case) -> Iterator[Hypothesis]:
    """A float mask that was scaled with the scores, subtracted, added twice, or read as yes and no."""
    for mask in _given(case):
        if mask.added is None:
            continue
        for name, words, mend, change in (
            ("mask scaled", "was added before the scores were scaled", "add it after scaling", _early),
            ("mask subtracted", "was subtracted", "add it", _negated),
            ("mask doubled", "was added twice", "add it once", _doubled),
            ("mask read as bool", "was read as bool: whatever is not 0 was blocked", "add it to the scores", _as_bool),
            ("mask read as bool", "was read as bool: 0 was blocked", "add it to the scores", _as_open),
        ):
            fault = Fault(name, mask.name, f"{mask.name} {words}", f"{mask.name}: {mend}")
            yield _each(case, fault, mask.name, change)


def _early(mask: Mask) -> Mask | None:
    return None if mask.added is None or mask.early else dataclasses.replace(mask, early=True)


def _negated(mask: Mask) -> Mask | None:
    return None if mask.added is None else dataclasses.replace(mask, added=mask.added.then("negative", np.negative))


def _doubled(mask: Mask) -> Mask | None:
    return None if mask.added is None else dataclasses.replace(mask, added=mask.added.then("twice", _twice))


def _twice(array: np.ndarray) -> np.ndarray:
    return 2.0 * array


def _as_bool(mask: Mask) -> Mask | None:
    return _read_as_bool(mask, np.not_equal)


def _as_open(mask: Mask) -> Mask | None:
    return _read_as_bool(mask, np.equal)


def _read_as_bool(mask: Mask, compare: np.ufunc) -> Mask | None:
    if mask.added is None:
        return None
    if mask.blocked is None:
        blocked = mask.added.then(("bool", compare.__name__), lambda values: compare(values, 0.0))
    else:
        infinite = mask.blocked
        blocked = mask.added.then(
            ("bool", compare.__name__), lambda values, block: compare(np.where(block, -np.inf, values), 0.0), infinite
        )
    return dataclasses.replace(mask, added=None, blocked=blocked)


# -- axes --------------------------------------------------------------------------------------------------------------


def turned(case: Case) -> Iterator[Hypothesis]:
    """A mask on other axes: (L, S) as (S, L), (N * H) as (H * N), keys' padding on the queries."""
    sizes = case.sizes
    for mask in _given(case):
        if mask.name == "attn_mask" and sizes.target == sizes.source:
            fault = Fault(
                "mask transposed", mask.name, "attn_mask was read as (S, L)", "attn_mask: (L, S), not transposed"
            )
            yield _each(case, fault, mask.name, lambda mask: _moved(mask, "(S, L)", lambda a: a.swapaxes(-1, -2)))
        tensor = mask.added if mask.blocked is None else mask.blocked
        if tensor is not None and tensor.shape[:2] == (sizes.batch, sizes.heads) and min(tensor.shape[:2]) > 1:
            words = "attn_mask's first axis was read as (H, N) instead of (N, H)"
            fault = Fault("mask transposed", mask.name, words, "attn_mask: its first axis goes by (N, H)")
            yield _each(case, fault, mask.name, lambda mask: _moved(mask, "(H, N)", _head_first))
        if mask.name == "key_padding_mask" and sizes.target == sizes.source:
            words = "key_padding_mask was applied to the queries instead of the keys"
            fault = Fault("mask on the wrong axis", mask.name, words, "key_padding_mask: (N, 1, 1, S), over the keys")
            yield _each(case, fault, mask.name, lambda mask: _moved(mask, "queries", lambda a: a.swapaxes(-1, -2)))


def _moved(mask: Mask, what: str, function: Callable[[np.ndarray], np.ndarray]) -> Mask:
    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.then(what, function)

    return dataclasses.replace(mask, blocked=of(mask.blocked), added=of(mask.added))


def _head_first(array: np.ndarray) -> np.ndarray:
    n, heads = array.shape[:2]
    return array.reshape(heads, n, *array.shape[2:]).swapaxes(0, 1)


def fully_masked(case: Case) -> Iterator[Hypothesis]:
    """What a row gives whose positions are all blocked."""
    gives = {
        "nan": "gave NaN",
        "zero": "gave weights of zero",
        "uniform": "gave equal weights, as masks of large finite numbers do",
    }
    right = case.state.fully_masked
    for policy, words in gives.items():
        if policy != right and case.state.masks:
            fault = Fault(
                "fully masked rows",
                "fully_masked",
                f'a row with every position blocked {words}; the policy is "{right}"',
                f"fully_masked: {right}",
            )
            yield Hypothesis(fault, functools.partial(State.but, fully_masked=policy), latent=True)
