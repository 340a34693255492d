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
    spec: MHASpec, framework: str, weights: MHAWeights | None = None, mode: str = "auto", device: Any = None
) -> Any:
    """A native layer of a framework that is importable here.

    Args:
        spec: what to build.
        framework: "torch", "mindspore" or "megengine".
        weights: its parameters; None keeps the framework's own initial values.
        mode: "auto" or "native": the framework's own class, or UnsupportedError. ("composed" layers do not exist yet.)
        device: where the framework shall put it; None for its default.

    Raises:
        UnsupportedError: the native class cannot express the spec.
        BackendError: the framework is not importable here.
        WeightsError: the weights do not fit the spec.

    Example:
        >>> spec = MHASpec(8, 2, batch_first=True)
        >>> layer = build(spec, "torch", MHAWeights.random(spec))
        >>> type(layer).__name__, layer.batch_first
        ('MultiheadAttention', True)
    """
    if mode not in ("auto", "native", "composed"):
        raise ArgumentError("mode", given=repr(mode), expected="auto, native or composed")
    if mode == "composed":
        raise UnsupportedError(
            "mode", given="'composed'", expected="'auto' or 'native'", advice="Composed layers do not exist yet."
        )
    if weights is not None:
        weights.check(spec)
    return adapter(framework).build(spec, weights, mode=mode, device=device)


def adapter(framework: str) -> ModuleType:
    """The adapter of a framework, imported now.

    Raises:
        ArgumentError: no such framework.
        BackendError: it is not installed here, or does not import.
    """
    table = mapping.table(mapping.parse_name(framework)[0])["framework"]
    try:
        return importlib.import_module(f"mhabridge.adapters.{table['module']}")
    except ImportError as error:
        raise BackendError(
            framework,
            given=f"{type(error).__name__}: {error}",
            expected=f"{table['title']}, importable in this interpreter",
            advice=f"Install it here (pip install 'mhabridge[{framework}]'), or run calls on it in a worker: "
            f"`mhabridge backends install {framework}`, then mb.backend({framework!r}).run(...).",
        ) from error
