"""What the recorder needs of MegEngine: a module's layers, a look at their calls, and tensors as bytes.

Why it is built so:
- Hooks do not see keyword arguments, by which masks are passed, so a layer's ``forward`` is wrapped meanwhile.
- No tensor knows whether gradients are wanted, and only a GradManager's own tensors get them. So a custom operator that
  changes nothing stands before each input and output, and before each parameter while the layer computes.

The recorder, this module and NumPy are also what the record kit is made of: no other module of mhabridge is used here.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any, Callable, Iterator

import megengine
import megengine.autodiff
import megengine.module
import numpy as np

FRAMEWORK = "megengine"
WHY_NOT_CALLED = "the model does not use it, or a trace that was made before calls it."


def version() -> str:
    """MegEngine's version."""
    return str(megengine.__version__)


def is_model(model: Any) -> bool:
    """Whether this is a module whose parts can be watched."""
    return isinstance(model, megengine.module.Module)


def parts(model: Any) -> Iterator[tuple[str, Any]]:
    """Every module in the model by path."""
    yield from model.named_modules()


def is_attention(layer: Any) -> bool:
    """Whether this is a multi-head attention of MegEngine, or the drop-in, which has the same packed parameter."""
    native = getattr(megengine.module, "MultiHeadAttention", ())
    return isinstance(layer, native) or (hasattr(layer, "io_weight_bias") and hasattr(layer, "num_heads"))


def names(layer: Any) -> dict[str, str]:
    """The layer's class and kind."""
    kind = type(layer)
    own = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("megengine.")]
    own = [name for name in own if name != "Module"]
    known = "MultiheadAttention" if is_attention(layer) else [*own, kind.__name__][0]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "kind": known}


def method(layer: Any) -> Any:
    """The method that computes."""
    return type(layer).forward


def training(layer: Any) -> bool:
    """Whether the layer is in training mode."""
    return bool(layer.training)


def settings(layer: Any) -> dict[str, Any]:
    """The layer's public attributes, and those that only a drop-in has."""
    found = {name: value for name, value in vars(layer).items() if not name.startswith("_") and name != "training"}
    found.update(found.pop("beyond", None) or {})
    if is_attention(layer):
        found.setdefault("batch_first", True)  # the native one always is
    return found


def parameters(layer: Any) -> list[tuple[str, Any]]:
    """The parameters and buffers, by the names of the state dict."""
    return [*layer.named_parameters(), *layer.named_buffers()]


def environment(model: Any) -> dict[str, str]:
    """Where the model runs."""
    tensor = next(iter(model.parameters()), None)
    return {"device": str(megengine.get_default_device() if tensor is None else tensor.device)}


@contextlib.contextmanager
def plain_python(model: Any) -> Iterator[dict[str, str]]:
    """Nothing to change: a trace that was made before cannot be opened, and its layers are said to be missing."""
    yield {}


def hook(layer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Have ``before(args, kwargs)`` give the arguments of each call, and ``after(outputs)`` its outputs.

    Returns:
        What ends it.
    """

    def around(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = before(args, kwargs)
        return after(forward(*args, **kwargs))

    return _wrap(layer, around)


def _wrap(layer: Any, around: Callable[..., Any]) -> Callable[[], None]:
    own, forward = vars(layer).get("forward"), layer.forward
    vars(layer)["forward"] = _Wrapped(layer, forward, around)

    def remove() -> None:
        del vars(layer)["forward"]
        if own is not None:
            vars(layer)["forward"] = own

    return remove


class _Wrapped:
    """The forward of a layer that is watched; a copy of the layer gets that of its class."""

    def __init__(self, layer: Any, forward: Any, around: Callable[..., Any]) -> None:
        self.layer, self.forward, self.around = layer, forward, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.forward, args, kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self.layer))
        return self.forward if copied is None else types.MethodType(type(copied).forward, copied)


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor."""
    return isinstance(value, megengine.Tensor)


def shape(tensor: Any) -> tuple[int, ...]:
    """Its shape."""
    return tuple(int(size) for size in tensor.shape)


def nbytes(tensor: Any) -> int:
    """The bytes of its values."""
    count = 1
    for size in shape(tensor):
        count *= size
    return count * int(np.dtype(tensor.dtype).itemsize)


def is_floating(tensor: Any) -> bool:
    """Whether its numbers are floating."""
    return np.dtype(tensor.dtype).kind == "f"


def to_numpy(tensor: Any) -> tuple[str, np.ndarray]:
    """The dtype's name and the values.

    Raises:
        TypeError: a quantised tensor, whose numbers mean something else than they say.
    """
    if np.dtype(tensor.dtype).metadata:
        raise TypeError(f"a tensor of {tensor.dtype.metadata}")
    array = np.asarray(tensor.numpy())
    return array.dtype.name, array


def like(array: np.ndarray, old: Any) -> Any:
    """These values as a tensor of another's dtype, on its device."""
    return megengine.tensor(np.array(array, np.dtype(old.dtype)), device=old.device)


class _Tap(megengine.autodiff.Function):  # type: ignore[misc]
    """Gives on what it is given, and tells the gradient."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, tensor: Any) -> Any:
        return tensor

    def backward(self, grad: Any) -> Any:
        self.tell(grad)
        return grad


def tap(tensor: Any, tell: Callable[[Any], None]) -> Any:
    """The same values in a tensor whose gradient is told; None where there is none to come."""
    return _Tap(tell)(tensor) if is_floating(tensor) else None


def watch_parameters(layer: Any, wanted: list[str], tell: Callable[[str, Any], None]) -> tuple[Callable[[], None], str]:
    """Have ``tell(name, gradient)`` called for parameters; gives what ends it, and why it is not possible."""
    modules = dict(layer.named_modules())
    places = [(name, modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in wanted]

    def around(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for name, owner, attribute in places:
                held: dict[str, Any] = {} if owner is None else owner.__dict__
                parameter = held.get(attribute)
                if isinstance(parameter, megengine.Parameter) and is_floating(parameter):
                    stack.callback(held.__setitem__, attribute, parameter)
                    held[attribute] = _Tap(functools.partial(tell, name))(parameter)
            return forward(*args, **kwargs)

    return _wrap(layer, around), ""
