"""Live layers: ``extract`` the canonical form of one, ``build`` one from it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from mhabridge import mapping
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, UnsupportedError
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
    roots = {base.__module__.partition(".")[0] for base in type(layer).__mro__}
    for framework in mapping.FRAMEWORKS:
        if mapping.table(framework)["framework"]["module"] in roots:
            module = adapter(framework)
            if module.is_layer(layer):
                found: tuple[MHASpec, MHAWeights] = module.extract(layer)
                return found
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
        mode: "auto" or "native": the framework's own class, or UnsupportedError. ("composed" layers do not exist yet.)
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


def _check_build(spec: Any, weights: Any, mode: str) -> None:
    if not isinstance(spec, MHASpec):
        raise ArgumentTypeError("spec", given=type(spec).__name__, expected="an MHASpec")
    if mode not in ("auto", "native", "composed"):
        raise ArgumentError("mode", given=repr(mode), expected="auto, native or composed")
    if mode == "composed":
        raise UnsupportedError(
            "mode", given="'composed'", expected="'auto' or 'native'", advice="Composed layers do not exist yet."
        )
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
