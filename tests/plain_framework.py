"""A framework of a page, in NumPy, for tests of the recorder that need no real one: layers, tensors and its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FRAMEWORK = "plain"
WHY_NOT_CALLED = "nobody wanted it."


class Tensor:
    def __init__(self, array: Any) -> None:
        self.array = np.asarray(array)

    def __add__(self, other: Tensor) -> Tensor:
        return Tensor(self.array + other.array)


class Layer:
    """Calls go through ``forward``, which hooks can wrap; public attributes that are layers are its parts."""

    training = False

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Attention(Layer):
    def forward(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *, need_weights: bool = True) -> Any:
        return query + value, (key if need_weights else None)


class Linear(Layer):
    def forward(self, x: Any) -> Any:
        return x + self.weight


class Chain(Layer):
    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x, x, x)[0] if isinstance(layer, Attention) else layer(x)
        return x


def version() -> str:
    return "1.0"


def is_model(model: Any) -> bool:
    return isinstance(model, Layer)


def parts(model: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, model
    for name, value in vars(model).items():
        items = {name: value} if isinstance(value, Layer) else {}
        if isinstance(value, list):
            items = {f"{name}.{number}": item for number, item in enumerate(value)}
        for key, item in items.items():
            yield from parts(item, f"{path}.{key}" if path else key)


def is_attention(layer: Any) -> bool:
    return isinstance(layer, Attention)


def names(layer: Any) -> dict[str, str]:
    return {"class": f"plain.{type(layer).__name__}", "kind": type(layer).__name__}


def method(layer: Any) -> Any:
    return type(layer).forward


def training(layer: Any) -> bool:
    return bool(layer.training)


def settings(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name != "forward"}


def parameters(layer: Any) -> list[tuple[str, Any]]:
    return [
        (f"{path}.{name}" if path else name, value)
        for path, part in parts(layer)
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    ]


def environment(model: Any) -> dict[str, str]:
    return {"device": "none"}


@contextlib.contextmanager
def plain_python(model: Any) -> Iterator[dict[str, str]]:
    yield {}


def hook(layer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    forward = layer.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(args, kwargs)
        return after(forward(*args, **kwargs))

    layer.forward = wrapped
    return lambda: vars(layer).pop("forward")


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tensor.array.shape


def nbytes(tensor: Tensor) -> int:
    return int(tensor.array.nbytes)


def is_floating(tensor: Tensor) -> bool:
    return tensor.array.dtype.kind == "f"


def to_numpy(tensor: Tensor) -> tuple[str, np.ndarray]:
    if tensor.array.dtype.hasobject:
        raise RuntimeError("its memory is gone")
    return tensor.array.dtype.name, tensor.array


def like(array: np.ndarray, old: Tensor) -> Tensor:
    return Tensor(array.astype(old.array.dtype))
