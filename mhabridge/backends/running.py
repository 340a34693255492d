"""One call on one backend: what the user gave becomes canonical, and the answer becomes the user's again.

    arguments -> prepare -> Call -> backend -> Result -> finish -> the user's shapes

Everything that can be wrong with the arguments is found in ``prepare``, before any framework is called, so the error
is the
same whichever backend was asked. ``finish`` refuses an answer that has the wrong shape, or NaN where none belongs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge import dtypes, mapping, masks
from mhabridge.calls import Call, Result
from mhabridge.checks import check_flag, check_mode, check_shapes, sizes_of
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, MHABridgeError, UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

if TYPE_CHECKING:
    from mhabridge.backends import Backend


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call in canonical form, and what is needed to turn the answer back.

    Args:
        spec: the layer.
        call: the canonical call.
        masks: the masks that it came from.
        batched: the user's query had a batch axis.
        dead: bool (N, H, L): rows that are fully masked.
        finite: every input and weight is finite, so NaN has only one honest source.
    """

    spec: MHASpec
    call: Call
    masks: masks.Masks
    batched: bool
    dead: np.ndarray
    finite: bool

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """From the user's layout, (L, N, E), (N, L, E) or (L, E), to (N, L, E)."""
        if not self.batched:
            return array[None]
        return array if self.spec.batch_first else array.swapaxes(0, 1)

    def restore(self, array: np.ndarray) -> np.ndarray:
        """The inverse of ``canonical``."""
        if not self.batched:
            return np.asarray(array[0])
        return array if self.spec.batch_first else array.swapaxes(0, 1)


def run_on(
    backend: Backend,
    spec: MHASpec,
    weights: MHAWeights,
    query: Any,
    key: Any,
    value: Any,
    *,
    timeout: float | None = None,
    **options: Any,
) -> Result:
    """Run one call on a backend; the arguments are those of ``Backend.run``."""
    prepared = prepare(spec, weights, query, key, value, any_dtype=backend.framework == mapping.REFERENCE, **options)
    payload = {
        "spec": spec.to_dict(),
        "weights": {name: dtypes.to_words(array) for name, array in weights.arrays().items()},
        "call": _words(prepared.call.to_tree()),
    }
    try:
        answer = backend.call("run", payload, timeout=timeout)
    except MHABridgeError:
        raise
    except Exception as error:  # a framework in this process raises its own; a worker's arrives as a BackendError
        raise BackendError(
            backend.info.name,
            given=f"{type(error).__name__}: {error}",
            expected="an answer",
            advice="The framework refused a call that mhabridge took to be fine; please report it.",
        ) from error
    return finish(prepared, Result.from_tree(answer), backend.info.name)


def _words(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: dtypes.to_words(item) if isinstance(item, np.ndarray) else item for name, item in tree.items()}


# -- from the user -----------------------------------------------------------------------------------------------------


def prepare(
    spec: MHASpec,
    weights: MHAWeights,
    query: Any,
    key: Any,
    value: Any,
    *,
    key_padding_mask: Any = None,
    attn_mask: Any = None,
    is_causal: bool = False,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    fully_masked: str = "nan",
    mode: str = "auto",
    training: bool = False,
    grad_output: Any = None,
    grad_attn_weights: Any = None,
    any_dtype: bool = False,
) -> Prepared:
    """Check every argument and make the call canonical.

    Args:
        spec: the layer.
        weights: its parameters.
        query: (L, N, E), (N, L, E) with ``spec.batch_first``, or (L, E).
        key: (S, N, kdim), (N, S, kdim) or (S, kdim).
        value: as key, with vdim features.
        key_padding_mask: see ``masks.canonical``.
        attn_mask: see ``masks.canonical``.
        is_causal: see ``masks.canonical``.
        need_weights: return the attention weights too.
        average_attn_weights: averaged over heads.
        fully_masked: "nan", "zero" or "error".
        mode: "auto", "native" or "composed".
        training: dropout is active.
        grad_output: array in the output's shape, or None.
        grad_attn_weights: array in the returned weights' shape, or None.
        any_dtype: inputs may have another float dtype than the spec (the reference computes in float64 anyway).

    Raises:
        ArgumentError: a value or a shape is wrong.
        ArgumentTypeError: not a NumPy array, or not one of the four float dtypes.
        WeightsError: the weights do not fit the spec.
    """
    _check_layer(spec, weights)
    given = {"query": query, "key": key, "value": value}
    arrays = {name: _checked_array(array, name, spec, any_dtype) for name, array in given.items()}
    query, key, value = arrays.values()
    batched = check_shapes(spec, query, key, value)
    flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "training": training}
    for name, flag in flags.items():
        check_flag(flag, name)
    check_mode(mode)
    masks.check_policy(fully_masked)
    sizes = sizes_of(spec, query, key, batched)
    canonical_masks = masks.canonical(key_padding_mask, attn_mask, is_causal, sizes=sizes)
    dead = canonical_masks.fully_masked(spec.extra_columns)
    if fully_masked == "error":
        masks.refuse_fully_masked(dead)
    finite = all(dtypes.all_finite(array) for array in (*arrays.values(), *weights.arrays().values()))
    bare = Prepared(spec, Call(query, key, value), canonical_masks, batched, dead, finite)
    grads = {"grad_output": grad_output, "grad_attn_weights": grad_attn_weights}
    grad_output, grad_attn_weights = _checked_grads(bare, sizes, need_weights, average_attn_weights, grads)
    call = Call(
        query=bare.canonical(query),
        key=bare.canonical(key),
        value=bare.canonical(value),
        blocked=canonical_masks.blocked,
        added=canonical_masks.added,
        need_weights=bool(need_weights),
        average_attn_weights=bool(average_attn_weights),
        fully_masked="nan" if fully_masked == "error" else fully_masked,
        mode=mode,
        training=bool(training),
        grad_output=None if grad_output is None else bare.canonical(grad_output),
        grad_attn_weights=_batch(grad_attn_weights, batched),
        mask_grad=bool(canonical_masks.float_masks) and (grad_output is not None or grad_attn_weights is not None),
    )
    return dataclasses.replace(bare, call=call)


def _check_layer(spec: Any, weights: Any) -> None:
    if not isinstance(spec, MHASpec):
        raise ArgumentTypeError("spec", given=type(spec).__name__, expected="an MHASpec")
    if not isinstance(weights, MHAWeights):
        raise ArgumentTypeError(
            "weights", given=type(weights).__name__, expected="MHAWeights", advice="MHAWeights.random(spec) makes some."
        )
    weights.check(spec)


def _checked_array(array: Any, name: str, spec: MHASpec, any_dtype: bool) -> np.ndarray:
    """The array, in this machine's byte order."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise ArgumentTypeError(
            name,
            given=f"{type(array).__module__}.{type(array).__name__}",
            expected="a NumPy array",
            advice="Use np.asarray; a framework's own tensors go to its own layer.",
        )
    found = dtypes.name_of(array)
    if found not in dtypes.FLOATS:
        raise ArgumentTypeError(name, given=found, expected="one of " + ", ".join(dtypes.FLOATS))
    if found != spec.dtype and not any_dtype:
        raise ArgumentError(
            name,
            given=found,
            expected=f"{spec.dtype}, the dtype of the spec",
            advice="Convert one of the two on purpose; mhabridge never changes a dtype by itself.",
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _checked_grads(
    bare: Prepared, sizes: masks.Sizes, need_weights: bool, average: bool, grads: dict[str, Any]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    batch = (sizes.batch,) if bare.batched else ()
    heads = () if average else (sizes.heads,)
    shapes: dict[str, tuple[int, ...]] = {
        "grad_output": (*bare.call.query.shape[:-1], bare.spec.out_features),
        "grad_attn_weights": (*batch, *heads, sizes.target, sizes.source + bare.spec.extra_columns),
    }
    found: dict[str, np.ndarray | None] = dict.fromkeys(shapes)
    for name, shape in shapes.items():
        if grads[name] is None:
            continue
        grad = found[name] = _checked_array(grads[name], name, bare.spec, True)
        if grad.shape != shape:
            raise ArgumentError(name, given=f"shape {grad.shape}", expected=f"{shape}, as what it is the gradient of")
    if grads["grad_attn_weights"] is not None and not need_weights:
        raise ArgumentError(
            "grad_attn_weights", given="an array, with need_weights=False", expected="need_weights=True"
        )
    return found["grad_output"], found["grad_attn_weights"]


def _batch(array: Any, batched: bool) -> Any:
    return array if array is None or batched else array[None]


# -- to the user -------------------------------------------------------------------------------------------------------


def finish(prepared: Prepared, result: Result, name: str) -> Result:
    """Check a backend's answer and give it the user's shapes.

    Raises:
        BackendError: something is missing or has the wrong shape.
        UnsupportedError: NaN where none belongs, or none where the policy says NaN.
    """
    _check_answer(prepared, result, name)
    notes = result.notes
    if not prepared.finite:
        notes = (*notes, "inputs or weights hold NaN or inf, so NaN in the answer was not judged")
    return restore(prepared, dataclasses.replace(result, notes=notes))


def restore(prepared: Prepared, result: Result) -> Result:
    """A canonical result in the user's shapes, without any check."""
    grads = {key: dtypes.to_public(grad) for key, grad in result.grads.items() if key != "mask"}
    for key in ("query", "key", "value"):
        if key in grads:
            grads[key] = prepared.restore(grads[key])
    if "mask" in result.grads:
        grads.update(prepared.masks.gradients(dtypes.to_float64(result.grads["mask"])))
    attention = None if result.attn_weights is None else dtypes.to_public(result.attn_weights)
    if attention is not None and not prepared.batched:
        attention = attention[0]
    return Result(prepared.restore(dtypes.to_public(result.output)), attention, grads, result.notes)


def _check_answer(prepared: Prepared, result: Result, name: str) -> None:
    spec, call = prepared.spec, prepared.call
    n, length, _ = call.query.shape
    dead = prepared.dead if call.fully_masked == "nan" else np.zeros_like(prepared.dead)
    columns = call.key.shape[1] + spec.extra_columns
    shape: tuple[int, ...]
    _check_one(prepared, "output", result.output, (n, length, spec.out_features), dead.any(axis=1)[..., None], name)
    if call.need_weights:
        shape = (n, length, columns) if call.average_attn_weights else (n, spec.num_heads, length, columns)
        rows = dead.any(axis=1) if call.average_attn_weights else dead
        _check_one(prepared, "attn_weights", result.attn_weights, shape, rows[..., None], name)
    if not call.wants_grads:
        return
    shapes: dict[str, tuple[int, ...]] = {
        "query": call.query.shape,
        "key": call.key.shape,
        "value": call.value.shape,
        **spec.parameter_shapes(),
    }
    for key, size in shapes.items():
        _check_one(prepared, f"grads[{key}]", result.grads.get(key), size, None if dead.any() else False, name)


def _check_one(prepared: Prepared, subject: str, array: Any, shape: tuple[int, ...], nan_rows: Any, name: str) -> None:
    """Right shape, and NaN exactly in ``nan_rows`` (None: not judged)."""
    if not isinstance(array, np.ndarray) or array.shape != shape:
        given = "nothing" if array is None else f"shape {getattr(array, 'shape', '?')}"
        raise BackendError(
            subject, given=f"{given} from {name}", expected=f"shape {shape}", advice="Report this as a bug."
        )
    if not prepared.finite or nan_rows is None:
        return
    found = np.isnan(dtypes.to_float64(array))
    wrong = found != nan_rows
    if wrong.any():
        index = tuple(int(axis[0]) for axis in np.nonzero(wrong))
        what = "NaN where none belongs" if found[index] else "no NaN in a fully masked row"
        raise UnsupportedError(
            subject,
            given=f"{what} from {name}, first at {index}",
            expected="NaN in fully masked rows only",
            advice=f"{name} does not answer this call rightly; use another backend, or smaller scores.",
        )
