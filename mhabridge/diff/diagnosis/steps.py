"""Steps of the computation that went wrong: the scale, the softmax, what comes after, what is returned, the inputs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

from mhabridge.diff.diagnosis.evidence import Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.hypotheses import Hypothesis
from mhabridge.diff.diagnosis.state import State


def scale(case: Case) -> Iterator[Hypothesis]:
    """The factor on the scores."""
    right, spec = case.spec.score_scale, case.spec
    size = "scale of the wrong size"
    candidates = [
        (1.0, "scale missing", "the scores were not scaled"),
        (right * right, "scale doubled", "the scores were scaled twice"),
        (1.0 / math.sqrt(spec.embed_dim), size, "the scale was 1 / sqrt(embed_dim)"),
        (1.0 / math.sqrt(spec.num_heads), size, "the scale was 1 / sqrt(num_heads)"),
        (1.0 / spec.embed_dim, size, "the scale was 1 / embed_dim"),
        (math.sqrt(abs(right)), size, "only one of query and key was scaled, by the root of the scale"),
        (spec.default_scale, size, "the scale was the usual one"),
        (1.0 / right if right else 1.0, size, "the scores were divided by the scale"),
    ]
    seen = [right]
    for value, name, words in candidates:
        if any(math.isclose(value, other, rel_tol=1e-12) for other in seen):
            continue
        seen.append(value)
        fault = Fault(name, "scale", f"{words}: a factor of {value:.6g} instead of {right:.6g}", f"scale: {right:.6g}")
        yield Hypothesis(fault, functools.partial(_scaled, value=value))


def _scaled(state: State, value: float) -> State | None:
    return None if state.scale == value else state.but(scale=value)


def softmax_axis(case: Case) -> Iterator[Hypothesis]:
    """The softmax over the target, the heads or the batch."""
    for axis, name in ((-2, "the target (L)"), (1, "the heads"), (0, "the batch")):
        if case.state.returned.startswith("scores"):
            continue
        fault = Fault(
            "softmax over the wrong axis",
            "softmax",
            f"the softmax ran over {name} instead of the source (S)",
            "softmax: over the last axis (S)",
        )
        yield Hypothesis(fault, functools.partial(State.but, axis=axis), rare=axis == 0)


def residual(case: Case) -> Iterator[Hypothesis]:
    """The query, added to the output or not."""
    spec = case.spec
    if spec.out_features != spec.embed_dim:
        return
    words = "the query was not added to the output" if spec.residual else "the query was added to the output"
    name = "residual forgotten" if spec.residual else "residual added"
    fault = Fault(name, "residual", words, f"residual: {spec.residual}")
    yield Hypothesis(fault, lambda state: state.but(residual=not spec.residual))


def output_projection(case: Case) -> Iterator[Hypothesis]:
    """The output is the concatenated heads."""
    spec = case.spec
    if not case.state.has("out_weight") or spec.num_heads * spec.v_head_dim != spec.out_features:
        return
    names = ["out_weight", *(["out_bias"] if case.state.has("out_bias") else [])]
    fault = Fault(
        "output projection missing", "out_weight", "the output is the heads as they are", "out_proj.weight: apply it"
    )
    yield Hypothesis(fault, lambda state: state.with_parameters(**dict.fromkeys(names)))


_INPUTS = ("query", "key", "value")


def inputs(case: Case) -> Iterator[Hypothesis]:
    """Query, key and value passed in another order, or one of them twice."""
    shapes = [getattr(case.state, name).shape for name in _INPUTS]
    arrays = [getattr(case.state, name).array for name in _INPUTS]
    for order in itertools.product(range(3), repeat=3):
        if order == (0, 1, 2) or [shapes[i] for i in order] != shapes or len(set(order)) == 1:
            continue
        if all(i == order[i] or (arrays[i] == arrays[order[i]]).all() for i in range(3)):
            continue
        found = ", ".join(_INPUTS[i] for i in order)
        fault = Fault(
            "inputs in another order",
            "query, key, value",
            f"the layer was called with {found}",
            "query, key, value: call it with them in this order",
        )
        yield Hypothesis(fault, functools.partial(_called, order=order), rare=True)


def _called(state: State, order: tuple[int, ...]) -> State:
    tensors = [getattr(state, name) for name in _INPUTS]
    return state.but(**{name: tensors[order[i]] for i, name in enumerate(_INPUTS)})


def returned(case: Case) -> Iterator[Hypothesis]:
    """The attention weights of each head, their mean or their sum, or the scores before the softmax."""
    if "attn_weights" not in case.observed:
        return
    right = case.state.returned
    words = {
        "mean": ("weights averaged", "the attention weights are averaged over heads"),
        "heads": ("weights not averaged", "the attention weights are those of each head, not their average"),
        "sum": ("weights summed", "the attention weights are added up over heads, not averaged"),
        "scores": ("weights before the softmax", "the scores were returned as attention weights"),
        "scores mean": ("weights before the softmax", "the averaged scores were returned as attention weights"),
    }
    for how, (name, text) in words.items():
        if how == right:
            continue
        mend = "return each head's" if right == "heads" else "return the mean over heads"
        yield Hypothesis(
            Fault(name, "attn_weights", text, f"attn_weights: {mend}, after the softmax"),
            functools.partial(State.but, returned=how),
        )
