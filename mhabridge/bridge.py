"""Live layers: ``extract`` the canonical form of one, ``build`` one from it, ``attend`` with one."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from mhabridge import mapping
from mhabridge.checks import check_mode
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, UnsupportedError
from mhabridge.live import Options
from mhabridge.spec import MHASpec
from mhabridge.transformer import TransformerSpec
from mhabridge.transformer_weights import TransformerWeights
from mhabridge.weights import MHAWeights


def extract(layer: Any) -> tuple[Any, Any]:
    """The spec and the weights (as copies) of any framework's attention layer, transformer layer or stack of these.

    No framework is imported: a layer's own class says where it comes from.

    Args:
        layer: a ``torch.nn.MultiheadAttention``, ``mindspore.nn.MultiheadAttention`` or
            ``megengine.module.MultiHeadAttention``; a TransformerEncoderLayer, TransformerDecoderLayer,
            TransformerEncoder, TransformerDecoder or Transformer of PyTorch or MindSpore; or what
            ``mhabridge.adapters`` has in their place.

    Returns:
        ``MHASpec`` and ``MHAWeights``, for a transformer ``TransformerSpec`` and ``TransformerWeights``.

    Raises:
        ArgumentTypeError: not such a layer.
        UnsupportedError: something in it is not the plain layer: a forward of its own, another activation or norm.
        WeightsError: its parameters are not those of such a layer.

    Example:
        >>> import torch
        >>> spec, weights = extract(torch.nn.MultiheadAttention(8, 2))
        >>> weights.q_weight.shape
        (8, 8)
    """
    found: tuple[Any, Any] = _handler(layer).extract(layer)
    return found


def convert(layer: Any, to: str, notes: list[str] | None = None) -> Any:
    """The same layer in another framework that is importable here: weights bit for bit, and its state.

    Args:
        layer: an attention layer, a transformer layer or a stack of these, as for ``extract``.
        to: "torch", "mindspore" or "megengine".
        notes: a list that is filled with which of the two it is, why, and what it has beyond the old one.

    Returns:
        The framework's native layer where it can hold this one, else our drop-in (see ``build``); in the same mode
        (train or evaluation), with the same parameters frozen, on the same kind of device.

    Raises:
        BackendError: the framework is not importable here; the message names the way through a file.
        UnsupportedError: the layer, or which of its parameters are frozen, cannot be said there.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(8, 2).eval()
        >>> again = convert(layer, to="torch")
        >>> again.training, extract(again) == extract(layer)
        (False, True)
    """
    source = _handler(layer)
    spec, weights = source.extract(layer)
    try:
        target = adapter(to)
    except BackendError as error:
        error.advice += (
            " To move the layer itself, go through a file: np.savez the arrays of mb.extract(layer)[1].to_layout(...)"
            " here, and load them there."
        )
        raise
    found = source.traits(layer)
    moved = build(spec, to, weights, notes=notes)
    _room(target, spec).set_traits(moved, found)
    return moved


def attend(
    layer: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    attn_mask: Any = None,
    is_causal: bool = False,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    fully_masked: str = "nan",
    mode: str = "auto",
    notes: list[str] | None = None,
) -> tuple[Any, Any]:
    """Call a live layer of any framework by one set of rules: native tensors in and out.

    The layer's hooks are not called: they belong to calls of the layer itself.

    Args:
        layer: a native attention layer, or a drop-in of ``mhabridge.adapters``.
        query: (L, N, E), or (N, L, E) for a layer that is batch first, or (L, E).
        key: (S, N, kdim), (N, S, kdim) or (S, kdim).
        value: as key, with vdim features.
        key_padding_mask: (N, S) or (S,): bool (True: may not attend), byte (non-zero: may not), integers 0 and 1, or
            float (added).
        attn_mask: (L, S) or (N * H, L, S), for an unbatched call (H, L, S); likewise.
        is_causal: block j > i (aligned top left), together with the masks.
        need_weights: return the attention weights too.
        average_attn_weights: averaged over heads.
        fully_masked: what a row without any open position gives: "nan", "zero" or "error".
        mode: "auto", "native" or "composed".
        notes: a list that is filled with what was native or composed, and why.

    Returns:
        The output in the query's layout, and the weights: (N, L, S) averaged, (N, H, L, S) by head, None when not
        asked for.

    Raises:
        ArgumentError: a wrong shape, dtype or option.
        ArgumentTypeError: not a layer, or not a tensor of its framework.
        UnsupportedError: no form that the mode allows answers this call rightly, or the layer's forward is its own.

    Example:
        >>> import torch
        >>> x = torch.ones(3, 1, 8)
        >>> output, weights = attend(torch.nn.MultiheadAttention(8, 2), x, x, x, is_causal=True)
        >>> weights[0, 0].tolist()
        [1.0, 0.0, 0.0]
    """
    module = _adapter_of(layer)
    module.require_plain(layer)
    options = Options(is_causal, need_weights, average_attn_weights, fully_masked, mode, training=bool(layer.training))
    answer: tuple[Any, Any] = module.attend(
        layer, (query, key, value), key_padding_mask, attn_mask, options, [] if notes is None else notes
    )
    return answer


def _adapter_of(layer: Any) -> ModuleType:
    """The adapter of an attention layer."""
    module = framework_of(layer)
    if module is not None and module.is_layer(layer):
        return module
    raise ArgumentTypeError(
        "layer",
        given=f"{type(layer).__module__}.{type(layer).__qualname__}",
        expected="a native multi-head attention layer of " + ", ".join(mapping.FRAMEWORKS),
        advice="For a larger model pass its attention layer, such as encoder.layers[0].self_attn.",
    )


def _handler(layer: Any) -> ModuleType:
    """What knows the layer: an adapter, or its module for transformers."""
    module = framework_of(layer)
    if module is not None and module.transformer.is_layer(layer):
        handler: ModuleType = module.transformer
        return handler
    return _adapter_of(layer)


def _room(module: ModuleType, spec: MHASpec | TransformerSpec) -> Any:
    return module.transformer if isinstance(spec, TransformerSpec) else module


def framework_of(layer: Any) -> ModuleType | None:
    """The adapter of the framework that an object's class comes from; None if it is of no known one."""
    kind: Any = type(layer)
    return _framework_of_class(kind)


@functools.lru_cache(maxsize=256)
def _framework_of_class(kind: Any) -> ModuleType | None:
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    for framework in mapping.FRAMEWORKS:
        if mapping.table(framework)["framework"]["module"] in roots:
            return adapter(framework)
    return None


def build(
    spec: MHASpec | TransformerSpec,
    framework: str,
    weights: MHAWeights | TransformerWeights | None = None,
    mode: str = "auto",
    device: Any = None,
    notes: list[str] | None = None,
) -> Any:
    """A layer of a framework that is importable here: its own class, or the drop-in of ``mhabridge.adapters``.

    The drop-in is that framework's own module too, with the same parameters by the same names. It is composed from the
    spec, so it also holds what the native class may not: either ``batch_first``, added columns, and a scale, a dropout
    on the output or a residual of the spec's own.

    Where only some projections have a bias, both classes have all of them, and those beyond the spec are zero.

    For a ``TransformerSpec`` the native form is the framework's own layer or stack, and the composed one the same with
    drop-ins as its attentions. MegEngine has no such layers: there it is ``mhabridge.adapters.megengine``'s.

    Args:
        spec: what to build.
        framework: "torch", "mindspore" or "megengine"; with a version ("torch@2.13.0") only if that is the one here.
        weights: its parameters; None for initial values: the framework's own for its class, PyTorch's for the drop-in.
        mode: "auto": the native class where it can express the spec, else the drop-in; "native" or "composed": that.
        device: where the framework shall put it; None for its default.
        notes: a list that is filled with which of the two it is, why, and what it has beyond the spec.

    Raises:
        UnsupportedError: nothing that the mode allows can express the spec.
        BackendError: the framework is not importable here.
        WeightsError: the weights do not fit the spec.
        ArgumentError: there is no such framework, mode or device.

    Example:
        >>> spec = MHASpec(8, 2, batch_first=True)
        >>> layer = build(spec, "torch", MHAWeights.random(spec))
        >>> type(layer).__name__, layer.batch_first
        ('MultiheadAttention', True)
        >>> notes = []
        >>> layer = build(MHASpec(8, 2, residual=True), "torch", notes=notes)
        >>> notes[0][:39]
        'composed: the drop-in: residual is True'
    """
    _check_build(spec, weights, mode)
    module = adapter(framework)
    if isinstance(spec, TransformerSpec):
        return module.transformer.build(spec, weights, device=device, notes=notes, mode=mode)
    assert weights is None or isinstance(weights, MHAWeights)
    said: list[str] = []
    why = "asked for"
    if mode != "composed":
        try:
            layer = _build_native(module, spec, weights, device, said)
        except UnsupportedError as error:
            if mode == "native":
                raise
            why = f"{error.subject} is {error.given}; the native class takes {error.expected}"
        else:
            return _noted(layer, notes, "native: the framework's own class", said)
    layer = module.build_dropin(spec, weights, device=device, notes=said)
    return _noted(layer, notes, f"composed: the drop-in: {why}", said)


def _build_native(module: ModuleType, spec: MHASpec, weights: MHAWeights | None, device: Any, notes: list[str]) -> Any:
    if weights is None and spec.bias is None:
        # The native class has all biases: those that the spec has not must be zero, whatever their initial values are.
        whole = module.build(spec.replace(bias=True, q_bias=True, k_bias=True, v_bias=True, out_bias=True))
        initial = module.extract(whole)[1].arrays()
        weights = MHAWeights(**{name: initial[name] for name in spec.parameter_shapes()})
    return module.build(spec, weights, device=device, notes=notes)


def _noted(layer: Any, notes: list[str] | None, form: str, said: list[str]) -> Any:
    if notes is not None:
        notes.extend([form, *said])
    return layer


def _check_build(spec: Any, weights: Any, mode: str) -> None:
    kinds: dict[type, Any] = {MHASpec: MHAWeights, TransformerSpec: TransformerWeights}
    if type(spec) not in kinds:
        raise ArgumentTypeError("spec", given=type(spec).__name__, expected="an MHASpec or a TransformerSpec")
    check_mode(mode)
    if weights is None:
        return
    expected = kinds[type(spec)]
    if not isinstance(weights, expected):
        raise ArgumentTypeError("weights", given=type(weights).__name__, expected=f"{expected.__name__}, or None")
    weights.check(spec)


def adapter(framework: str) -> ModuleType:
    """The adapter of a framework, imported now.

    Args:
        framework: its name; with a version ("torch@2.13.0") the one here must be of that version.

    Raises:
        ArgumentError: no such framework.
        BackendError: it is not installed here, does not import, or is of another version.
    """
    name, version = mapping.parse_name(framework)
    if name not in mapping.FRAMEWORKS:
        raise ArgumentError("framework", given=repr(framework), expected="one of " + ", ".join(mapping.FRAMEWORKS))
    table = mapping.table(name)["framework"]
    try:
        module = importlib.import_module(f"mhabridge.adapters.{name}")
    except ImportError as error:
        raise BackendError(
            name,
            given=f"{type(error).__name__}: {error}",
            expected=f"{table['title']}, importable in this interpreter",
            advice=f"Install it here (pip install 'mhabridge[{name}]'), or run calls on it in a worker: "
            f"`mhabridge backends install {name}`, then mb.backend({name!r}).run(...).",
        ) from error
    if version and mapping.version_key(version) != mapping.version_key(module.version()):
        raise BackendError(
            framework,
            given=f"{name} {module.version()} in this interpreter",
            expected=f"version {version}",
            advice=f"A live layer is of the version that is here; mb.backend({framework!r}) runs calls on another.",
        )
    return module
