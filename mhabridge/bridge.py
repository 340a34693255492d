"""Live layers: ``extract`` the canonical form of one, ``build`` one from it, ``attend`` with one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from mhabridge import mapping
from mhabridge.checks import check_mode
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, UnsupportedError
from mhabridge.live import Options
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


def extract(layer: Any) -> tuple[MHASpec, MHAWeights]:
    """The spec and the weights (as copies) of any framework's native attention layer.

    No framework is imported: a layer's own class says where it comes from.

    Args:
        layer: a ``torch.nn.MultiheadAttention``, ``mindspore.nn.MultiheadAttention`` or
            ``megengine.module.MultiHeadAttention``.

    Raises:
        ArgumentTypeError: not such a layer.
        WeightsError: its parameters are not those of such a layer.

    Example:
        >>> import torch
        >>> spec, weights = extract(torch.nn.MultiheadAttention(8, 2))
        >>> weights.q_weight.shape
        (8, 8)
    """
    found: tuple[MHASpec, MHAWeights] = _adapter_of(layer).extract(layer)
    return found


def convert(layer: Any, to: str, notes: list[str] | None = None) -> Any:
    """The same layer in another framework that is importable here: weights bit for bit, and its state.

    Args:
        layer: a native attention layer, or a drop-in of ``mhabridge.adapters``.
        to: "torch", "mindspore" or "megengine".
        notes: a list that is filled with what the new layer has beyond the old one.

    Returns:
        The framework's native layer where it can hold this one, else our drop-in; in the same mode (train or
        evaluation), with
        the same parameters frozen, on the same kind of device.

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
    source = _adapter_of(layer)
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
    target.set_traits(moved, found)
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
        UnsupportedError: no form that the mode allows answers this call rightly.

    Example:
        >>> import torch
        >>> x = torch.ones(3, 1, 8)
        >>> output, weights = attend(torch.nn.MultiheadAttention(8, 2), x, x, x, is_causal=True)
        >>> weights[0, 0].tolist()
        [1.0, 0.0, 0.0]
    """
    module = _adapter_of(layer)
    options = Options(is_causal, need_weights, average_attn_weights, fully_masked, mode, training=bool(layer.training))
    answer: tuple[Any, Any] = module.attend(
        layer, (query, key, value), key_padding_mask, attn_mask, options, [] if notes is None else notes
    )
    return answer


def _adapter_of(layer: Any) -> ModuleType:
    roots = {base.__module__.partition(".")[0] for base in type(layer).__mro__}
    for framework in mapping.FRAMEWORKS:
        if mapping.table(framework)["framework"]["module"] in roots:
            module = adapter(framework)
            if module.is_layer(layer):
                return module
    raise ArgumentTypeError(
        "layer",
        given=f"{type(layer).__module__}.{type(layer).__qualname__}",
        expected="a native multi-head attention layer of " + ", ".join(mapping.FRAMEWORKS),
        advice="For a larger model pass its attention layer, such as encoder.layers[0].self_attn.",
    )


def build(
    spec: MHASpec,
    framework: str,
    weights: MHAWeights | None = None,
    mode: str = "auto",
    device: Any = None,
    notes: list[str] | None = None,
) -> Any:
    """A native layer of a framework that is importable here.

    Args:
        spec: what to build.
        framework: "torch", "mindspore" or "megengine"; with a version ("torch@2.13.0") only if that is the one here.
        weights: its parameters; None keeps the framework's own initial values.
        mode: "auto" or "native": the framework's own class, or UnsupportedError. ("composed": see the drop-ins.)
        device: where the framework shall put it; None for its default.
        notes: a list that is filled with what the native layer has beyond the spec, such as a bias of zeros.

    Raises:
        UnsupportedError: the native class cannot express the spec.
        BackendError: the framework is not importable here.
        WeightsError: the weights do not fit the spec.
        ArgumentError: there is no such framework or device.

    Example:
        >>> spec = MHASpec(8, 2, batch_first=True)
        >>> layer = build(spec, "torch", MHAWeights.random(spec))
        >>> type(layer).__name__, layer.batch_first
        ('MultiheadAttention', True)
    """
    _check_build(spec, weights, mode)
    module = adapter(framework)
    if weights is None and spec.bias is None:
        # The native class has all biases: those that the spec has not must be zero, whatever their initial values are.
        whole = module.build(spec.replace(bias=True, q_bias=True, k_bias=True, v_bias=True, out_bias=True))
        initial = module.extract(whole)[1].arrays()
        weights = MHAWeights(**{name: initial[name] for name in spec.parameter_shapes()})
    return module.build(spec, weights, device=device, notes=notes)


_DROPINS = "mhabridge.adapters.<framework>.MultiheadAttention is the composed layer, with PyTorch's constructor."


def _check_build(spec: Any, weights: Any, mode: str) -> None:
    if not isinstance(spec, MHASpec):
        raise ArgumentTypeError("spec", given=type(spec).__name__, expected="an MHASpec")
    check_mode(mode)
    if mode == "composed":
        raise UnsupportedError("mode", given="'composed'", expected="'auto' or 'native'", advice=_DROPINS)
    if weights is None:
        return
    if not isinstance(weights, MHAWeights):
        raise ArgumentTypeError("weights", given=type(weights).__name__, expected="MHAWeights, or None")
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
