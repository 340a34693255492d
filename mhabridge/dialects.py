"""What a dialect's arguments mean: a constructor call to a spec and back, and one call to another framework's.

The tables in mappings/ say which argument is which canonical field; ``OPERATIONS`` names the few rules that are more
than a copy. A dialect never says less than it was given: what it has no argument for is refused.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mhabridge import dtypes
from mhabridge.arguments import CALL_FIELDS, Argument, Dialect, Fixed, dialect, literal
from mhabridge.binding import bind, require
from mhabridge.errors import ArgumentError, ArgumentTypeError, MHABridgeError, UnsupportedError
from mhabridge.spec import MHASpec

_BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")
_POSITIONAL = ("query", "key", "value")  # MindSpore takes them by position only (IndexError otherwise)
_ELSEWHERE = 'The "numpy" backend computes every spec, in float64.'


def _follows_bias(spec: MHASpec, field: str) -> bool:
    """A projection's own bias where only the shorthand ``bias`` is given."""
    return spec.bias is not False and getattr(spec, field.replace("bias", "proj_size")) != 0


def _scale_of_embed_dim(spec: MHASpec) -> float:
    """MegEngine's functional form: ``embed_dim // num_heads`` even when qproj_size is another (facts of 1.13)."""
    head = spec.embed_dim if spec.q_proj_size == 0 else spec.embed_dim // spec.num_heads
    if head == 0:
        raise ArgumentError(
            "embed_dim", given=f"{spec.embed_dim} with num_heads={spec.num_heads}", expected="at least num_heads"
        )
    return 1.0 / math.sqrt(head)


# The rules that tables may name.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "is_given": lambda tensor: tensor is not None,
    "last_axis": lambda tensor: int(tensor.shape[-1]),
    "dtype_of": lambda tensor: dtypes.canonical(tensor.dtype),
    "follows_bias": _follows_bias,
    "scale_of_embed_dim": _scale_of_embed_dim,
}


# -- a layer's arguments -------------------------------------------------------------------------------------------


def spec_from_kwargs(name: str, args: Sequence[Any], kwargs: dict[str, Any], version: str | None = None) -> MHASpec:
    """The spec that a framework's constructor call describes; see ``MHASpec.from_kwargs``.

    Arguments that are no part of a layer's description (``device``, MegEngine's ``name``) are accepted and left out. A
    function that takes the layer's and the call's arguments together (``megengine.functional``) may be given all of
    them; what it reads from its tensors comes from ``key``, ``value`` and ``io_weight_bias`` when they are given, and
    may be said by the keywords ``kdim``, ``vdim`` and ``dtype`` when they are not. PyTorch's ``dtype=None`` is its
    global default, and stands for float32.

    Raises:
        UnsupportedError: the dialect, in this version, has no such argument.
        ArgumentTypeError: too many positional arguments, one given twice, a required one missing, or a wrong type.
        ArgumentError: a value out of range, or a version before those that are known.

    Example:
        >>> spec_from_kwargs("megengine", (8, 2), {"attn_dropout": 0.1}).dropout
        0.1
    """
    spoken = dialect(name, version)
    from_tensors = [entry for entry in spoken.fixed if entry.tensor]
    hints = tuple(entry.field for entry in from_tensors)
    given = bind(spoken, spoken.constructor_arguments(), args, kwargs, hints)
    parameters = spoken.of_role("parameter")
    require(spoken, parameters, given)
    fields: dict[str, Any] = {}
    for argument in parameters:
        if argument.field is not None:
            _add(fields, argument, _canonical(spoken, argument, given))
    fields.update({entry.field: literal(entry.value) for entry in _fixed_fields(spoken) if entry.value is not None})
    fields.update({entry.field: _from_tensor(entry, given) for entry in from_tensors})
    try:
        spec = MHASpec(**{field: value for field, value in fields.items() if value is not None})
    except MHABridgeError as error:
        raise _in_words_of(spoken, error) from None
    for entry in _fixed_fields(spoken):
        if entry.operation and not entry.tensor:
            spec = spec.replace(**{entry.field: OPERATIONS[entry.operation](spec)})
    return spec


def _add(fields: dict[str, Any], argument: Argument, value: Any) -> None:
    field = argument.field or ""
    if field in fields and fields[field] != value:
        raise ArgumentError(
            argument.name, given="without its partner", expected="bias_k and bias_v together, or neither of them"
        )
    fields[field] = value


def _canonical(spoken: Dialect, argument: Argument, given: dict[str, Any]) -> Any:
    """An argument's canonical value, or that of its default."""
    if argument.operation == "is_given":
        return OPERATIONS["is_given"](given.get(argument.name))
    if argument.name not in given:
        return argument.default_meaning
    value = given[argument.name]
    if value is None and (argument.required or argument.default_meaning is not None) and argument.means is None:
        raise ArgumentTypeError(
            argument.name,
            given="None",
            expected=f"a value such as {argument.default}" if argument.default else "a value",
            advice=f"{spoken.label} gives None no meaning here.",
        )
    if value is None:
        return argument.none_meaning
    return dtypes.canonical(value, argument.name) if argument.field == "dtype" else value


def _fixed_fields(spoken: Dialect) -> list[Fixed]:
    return [entry for entry in spoken.fixed if entry.field not in CALL_FIELDS]


def _from_tensor(entry: Fixed, given: dict[str, Any]) -> Any:
    """What a function reads from one of its tensors; None when neither the tensor nor the keyword is given."""
    said = given.get(entry.field)
    if said is not None and entry.field == "dtype":
        said = dtypes.canonical(said)
    tensor = given.get(entry.tensor or "")
    if tensor is None:
        return said
    try:
        read = OPERATIONS[entry.operation or ""](tensor)
    except AttributeError:
        raise ArgumentTypeError(
            entry.tensor or "",
            given=f"{tensor!r} ({type(tensor).__name__})",
            expected="a tensor with a shape and a dtype",
        ) from None
    if said is not None and said != read:
        raise ArgumentError(entry.field, given=f"{said} with a {entry.tensor} that says {read}", expected="one of them")
    return read


def _in_words_of(spoken: Dialect, error: MHABridgeError) -> MHABridgeError:
    """The same error under the dialect's own argument names."""
    words = {argument.field: argument.name for argument in spoken.of_role("parameter") if argument.field}
    subject = ", ".join(words.get(part, part) for part in error.subject.split(", "))
    return type(error)(subject, given=error.given, expected=error.expected, advice=error.advice)


def spec_to_kwargs(spec: MHASpec, name: str, version: str | None = None) -> dict[str, Any]:
    """The constructor's keyword arguments for a spec; see ``MHASpec.to_kwargs``.

    Only what the framework itself accepts is written, and only real arguments: what a function reads from its tensors
    (kdim, vdim and dtype for ``megengine.functional``) is said by those tensors.

    Raises:
        UnsupportedError: the dialect cannot say it.
        ArgumentError: a version before those that are known.

    Example:
        >>> spec_to_kwargs(MHASpec(8, 2, dropout=0.1, batch_first=True), "megengine")
        {'embed_dim': 8, 'num_heads': 2, 'attn_dropout': 0.1}
    """
    spoken = dialect(name, version)
    _check_fixed(spec, spoken)
    kwargs = {}
    for argument in spoken.of_role("parameter"):
        if argument.field is None or (argument.field == "bias" and _says_each_bias(spec, spoken)):
            continue
        value = getattr(spec, argument.field)
        if argument.only is not None:
            _check_only(spec, spoken, argument)
        elif argument.required or value != _when_left_out(spec, argument):
            kwargs[argument.name] = value
    return kwargs


def _says_each_bias(spec: MHASpec, spoken: Dialect) -> bool:
    """Whether the biases differ and the dialect has an argument for each."""
    if spec.bias is not None:
        return False
    if spoken.argument_for("q_bias") is None:
        raise UnsupportedError(
            ", ".join(_BIASES),
            given=", ".join(str(getattr(spec, field)) for field in _BIASES) + f" for {spoken.label}",
            expected="one value: it has a single argument for all four",
            advice="Use spec.replace(bias=True), and zeros for the biases that are missing. " + _ELSEWHERE,
        )
    return True


def _when_left_out(spec: MHASpec, argument: Argument) -> Any:
    if argument.operation == "follows_bias":
        return OPERATIONS["follows_bias"](spec, argument.field)
    return argument.default_meaning


def _check_fixed(spec: MHASpec, spoken: Dialect) -> None:
    for entry in _fixed_fields(spoken):
        if entry.tensor:
            continue
        value = getattr(spec, entry.field)
        if entry.operation:
            value, holds = spec.score_scale, OPERATIONS[entry.operation](spec)
        else:
            holds = literal(entry.value or "None")
        if value != holds:
            raise UnsupportedError(
                entry.field,
                given=f"{value!r} for {spoken.label}",
                expected=f"{holds!r}: {entry.reason}",
                advice=entry.advice or _ELSEWHERE,
            )


def _check_only(spec: MHASpec, spoken: Dialect, argument: Argument) -> None:
    holds = _canonical(spoken, argument, {argument.name: literal(argument.only or "None")})
    value = getattr(spec, argument.field or "")
    if value != holds:
        raise UnsupportedError(
            argument.name,
            given=f"{argument.field}={value!r} for {spoken.label}",
            expected=f"{argument.field}={holds!r}: {argument.reason}",
            advice=_ELSEWHERE,
        )


# -- a call's arguments --------------------------------------------------------------------------------------------


def translate_call(
    source: str, target: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One forward call's arguments in another framework's names, order and defaults.

    Values pass through untouched, whatever tensors they are: a name is translated, never an array. Query, key and
    value come back positional, the rest as keywords. A default that differs is made explicit (MegEngine's need_weights
    is False, PyTorch's True). The axis order (``batch_first``) is not a call's argument: it belongs to the layer, and
    inputs stay as they are. A mask of a dtype that the target does not take is refused, and so are two masks that it
    takes only one by one.

    ``megengine.functional`` takes the layer's arguments in the same call. As a source, those are for
    ``MHASpec.from_kwargs("megengine.functional", *args, **kwargs)`` and are left out here; ``training`` is refused,
    unless both dropouts are 0 or the target has it too, since elsewhere it is the layer's mode. As a target, add the
    layer's arguments with ``**spec.to_kwargs("megengine.functional")``, the weights as ``io_weight_bias``, and
    ``training``.

    Args:
        source: the dialect of the call, with or without a version.
        target: the dialect to say it in.
        args: the positional arguments, in the source's order.
        kwargs: the others.

    Returns:
        Positional and keyword arguments for the target's call.

    Raises:
        UnsupportedError: an argument that the source does not have, or a value that the target cannot say.
        ArgumentTypeError: too many positional arguments, one given twice, or a required one missing.

    Example:
        >>> args, kwargs = translate_call("megengine", "torch", ("q", "k", "v", None, "mask"))
        >>> args
        ('q', 'k', 'v')
        >>> kwargs
        {'key_padding_mask': None, 'need_weights': False, 'attn_mask': 'mask', 'average_attn_weights': False}
    """
    heard, spoken = dialect(source), dialect(target)
    given = bind(heard, heard.call_arguments(), args, kwargs or {})
    require(heard, heard.of_role("input"), given)
    values = _call_values(heard, given)
    for field, value in values.items():
        _check_not_lost(heard, spoken, field, value, given)
        _check_hint(heard, spoken, field, values)
        _check_mask(spoken, field, values)
    _check_masks_together(spoken, values)
    positional = tuple(values[field] for field in _POSITIONAL)
    keywords = {}
    for argument in spoken.of_role("input"):
        if argument.field in _POSITIONAL or argument.field not in values:
            continue
        asked = heard.argument_for(argument.field)
        explicit = asked is not None and asked.name in given
        if explicit or not _equal(values[argument.field], argument.default_value):
            keywords[argument.name] = values[argument.field]
    return positional, keywords


def _call_values(heard: Dialect, given: dict[str, Any]) -> dict[str, Any]:
    """Each canonical argument's value in a call: as given, by default, or as it always is."""
    values = {}
    for field in CALL_FIELDS:
        argument, fixed = heard.argument_for(field), heard.fixed_for(field)
        if argument is not None:
            values[field] = given.get(argument.name, argument.default_value)
        elif fixed is not None and fixed.value is not None:
            values[field] = literal(fixed.value)
    return values


def _check_not_lost(heard: Dialect, spoken: Dialect, field: str, value: Any, given: dict[str, Any]) -> None:
    """Refuse a value for which the target has no argument."""
    fixed = spoken.fixed_for(field)
    if fixed is None:
        return
    said = heard.argument_for(field)
    if said is not None and _has_no_effect(heard, said, given):
        return
    differs = _is_said(said, given) if fixed.value is None else not _equal(value, literal(fixed.value))
    if differs:
        holds = "nothing" if fixed.value is None else fixed.value
        name = said.name if said is not None else field
        raise _unsaid(name, repr(value), spoken, f"{holds}: {fixed.reason}", fixed.advice)


def _check_hint(heard: Dialect, spoken: Dialect, field: str, values: dict[str, Any]) -> None:
    """Refuse is_causal where it would only say something about a mask that is not there, or is another one."""
    said, argument = heard.argument_for(field), spoken.argument_for(field)
    if argument is None or not argument.hint or _equal(values[field], False):
        return
    if values["attn_mask"] is None or (said is not None and not said.hint):
        advice = "Give the causal mask as attn_mask (True where j > i) and leave is_causal out."
        raise _unsaid(argument.name, repr(values[field]), spoken, f"False: {argument.note}", advice)


def _check_mask(spoken: Dialect, field: str, values: dict[str, Any]) -> None:
    """Refuse a mask of a dtype that the target does not take, or takes for something else."""
    argument = spoken.argument_for(field)
    if argument is None or not argument.dtypes or _equal(values["cudnn_style_mask"], True):
        return
    kind = _mask_kind(values[field])
    if kind is not None and kind not in argument.dtypes:
        advice = "A bool mask (True: may not attend) is taken everywhere; mhabridge.masks.canonical makes one."
        raise _unsaid(argument.name, f"a {kind} mask", spoken, f"one of {', '.join(argument.dtypes)}", advice)


def _check_masks_together(spoken: Dialect, values: dict[str, Any]) -> None:
    """Refuse two masks of kinds that the target takes one by one, and misreads together."""
    rule = spoken.masks_together
    kinds = [_mask_kind(values[field]) for field in ("key_padding_mask", "attn_mask")]
    if rule is None or None in kinds or any(set(kinds) <= set(group) for group in rule.kinds):
        return
    groups = ", or ".join("both " + " or ".join(group) for group in rule.kinds)
    given = f"a {kinds[0]} key_padding_mask with a {kinds[1]} attn_mask"
    raise _unsaid("key_padding_mask, attn_mask", given, spoken, f"{groups}: {rule.reason}", rule.advice)


def _unsaid(name: str, given: str, spoken: Dialect, expected: str, advice: str) -> UnsupportedError:
    return UnsupportedError(name, given=f"{given} for {spoken.label}", expected=expected, advice=advice)


def _has_no_effect(heard: Dialect, argument: Argument, given: dict[str, Any]) -> bool:
    """Whether all that an argument depends on is off: an average without weights, training without dropout."""
    defaults = {entry.name: entry.default_value for entry in heard.arguments}
    others = [given.get(name, defaults[name]) for name in argument.matters_with]
    return bool(others) and all(_equal(other, 0) for other in others)


def _is_said(argument: Argument | None, given: dict[str, Any]) -> bool:
    """Whether a call gives an argument, or what makes its default matter (a dropout, for ``training``)."""
    return argument is not None and any(name in given for name in (argument.name, *argument.matters_with))


def _equal(value: Any, other: Any) -> bool:
    """Equal plain values; a tensor is equal to nothing, and is never asked."""
    if value is None or other is None:
        return value is other
    return isinstance(value, (bool, int, float, str, np.bool_)) and bool(value == other)


def _mask_kind(mask: Any) -> str | None:
    """One of "bool", "uint8", "int" and "float"; None for what is no tensor."""
    name = str(getattr(mask, "dtype", "")).rsplit(".", 1)[-1].lower()
    if name.startswith(("float", "bfloat", "half", "double")):
        return "float"
    if name.startswith("bool") or name == "uint8":
        return name.rstrip("_")
    return "int" if name.startswith(("int", "uint")) else None
