"""What the recorder needs of MindSpore: a cell's layers, hooks on them, and tensors as bytes.

Why it is built so:
- Compiled cells and functions call no Python hooks, so everything runs in PyNative while the block does: MS_JIT=0 is
  MindSpore's own switch for that, and the mode is set beside it for versions in which cells do not ask the switch.
- The native attention notes whether its inputs are one tensor before hooks may change them, so this is said again.
- Gradients of inputs and outputs come from HookBackward, those of parameters from hooks on these (not in old versions).
- Hooks see keyword arguments in newer versions only; in the others these are not recorded.

The recorder, this module and NumPy are also what the record kit is made of: no other module of mhabridge is used here.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import threading
from typing import Any, Callable, Iterator

import mindspore
import numpy as np

FRAMEWORK = "mindspore"
WHY_NOT_CALLED = "the model does not use it, or a compiled function that was made before calls it."
_JIT = "MS_JIT"


def version() -> str:
    """MindSpore's version."""
    return str(mindspore.__version__)


def is_model(model: Any) -> bool:
    """Whether this is a cell whose parts can be watched."""
    return isinstance(model, mindspore.nn.Cell)


def parts(model: Any) -> Iterator[tuple[str, Any]]:
    """Every cell in the model by path."""
    yield from model.cells_and_names()


def is_attention(layer: Any) -> bool:
    """Whether this is a multi-head attention of MindSpore or the drop-in."""
    return isinstance(layer, mindspore.nn.MultiheadAttention)


def names(layer: Any) -> dict[str, str]:
    """The layer's class and kind."""
    kind = type(layer)
    own = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("mindspore.")]
    own = [name for name in own if name not in ("Cell", "Cell_")]
    known = "MultiheadAttention" if is_attention(layer) else [*own, kind.__name__][0]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "kind": known}


def method(layer: Any) -> Any:
    """The method that computes."""
    return type(layer).construct


def training(layer: Any) -> bool:
    """Whether the layer is in training mode."""
    return bool(layer.training)


def settings(layer: Any) -> dict[str, Any]:
    """The layer's public attributes, without those of every cell, and those that only a drop-in has."""
    of_all = vars(mindspore.nn.Cell())
    found = {name: value for name, value in vars(layer).items() if not name.startswith("_") and name not in of_all}
    found.update(found.pop("beyond", None) or {})
    if is_attention(layer):
        found.setdefault("batch_first", False)
    return found


def parameters(layer: Any) -> list[tuple[str, Any]]:
    """The parameters, moving means and variances among them, by their paths in the layer."""
    return [
        (name, parameter)
        for path, cell in layer.cells_and_names()
        for name, parameter in cell.parameters_and_names(name_prefix=path, expand=False)
    ]


def environment(model: Any) -> dict[str, str]:
    """Where the model runs."""
    return {"device": str(mindspore.get_context("device_target")).lower()}


@contextlib.contextmanager
def plain_python(model: Any) -> Iterator[dict[str, str]]:
    """While the block runs, every cell is called from Python; gives what that changes."""
    notes: dict[str, str] = {}
    before, mode = os.environ.get(_JIT), mindspore.get_context("mode")
    os.environ[_JIT] = "0"
    try:
        if mode != mindspore.PYNATIVE_MODE:
            mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
            notes["graph mode"] = "off while recording: compiled cells call no hooks"
        yield notes
    finally:
        if before is None:
            del os.environ[_JIT]
        else:
            os.environ[_JIT] = before
        if mode != mindspore.PYNATIVE_MODE:
            mindspore.set_context(mode=mode)


def hook(layer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Have ``before(args, kwargs)`` give the arguments of each call, and ``after(outputs)`` its outputs.

    Returns:
        What ends it.
    """

    def prepare(args: Any, kwargs: Any) -> Any:
        args, kwargs = before(args, kwargs)
        if hasattr(layer, "k_is_v") and hasattr(layer, "q_is_k") and len(args) >= 3:
            layer.q_is_k, layer.k_is_v = args[0] is args[1], args[1] is args[2]
        return args, kwargs

    if "with_kwargs" in inspect.signature(layer.register_forward_hook).parameters:
        first = layer.register_forward_pre_hook(
            lambda cell, args, kwargs: prepare(args, kwargs) if cell is layer else None, with_kwargs=True
        )
        last = layer.register_forward_hook(
            lambda cell, args, kwargs, outputs: after(outputs) if cell is layer else None, with_kwargs=True
        )
    else:
        said = f"{layer.cls_name}({id(layer)})"  # which old versions give instead of the cell

        def is_own(cell: Any) -> bool:
            return cell is layer or (isinstance(cell, str) and cell == said)

        first = layer.register_forward_pre_hook(lambda cell, args: prepare(args, {})[0] if is_own(cell) else None)
        last = layer.register_forward_hook(lambda cell, args, outputs: after(outputs) if is_own(cell) else None)

    def remove() -> None:
        first.remove()
        last.remove()

    return remove


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor."""
    return isinstance(value, mindspore.Tensor)


def shape(tensor: Any) -> tuple[int, ...]:
    """Its shape."""
    return tuple(int(size) for size in tensor.shape)


def nbytes(tensor: Any) -> int:
    """The bytes of its values."""
    return int(tensor.nbytes)


def is_floating(tensor: Any) -> bool:
    """Whether its numbers are floating."""
    return "float" in str(tensor.dtype).lower()


def to_numpy(tensor: Any) -> tuple[str, np.ndarray]:
    """The dtype's name and the values, bfloat16 as its bits."""
    array = tensor.asnumpy()
    _keep_ctrl_c()
    if str(tensor.dtype).lower() == "bfloat16":
        # Its own asnumpy gives ml_dtypes' bfloat16, or in older versions float32.
        bits = array.view(np.uint16) if array.itemsize == 2 else array.view(np.uint32) >> np.uint32(16)
        return "bfloat16", bits.astype(np.uint16)
    return array.dtype.name, array


def like(array: np.ndarray, old: Any) -> Any:
    """These values as a tensor of another's dtype."""
    return mindspore.Tensor(np.array(array)).astype(old.dtype)


def tap(tensor: Any, tell: Callable[[Any], None]) -> Any:
    """The same values in a tensor whose gradient is told; None where there is none to come."""
    if not is_floating(tensor):
        return None

    def told(grad: Any) -> None:
        grad = grad[0] if isinstance(grad, tuple) else grad
        # Old versions hand the hook the tensor of the C++ layer, which is no mindspore.Tensor.
        tell(grad if grad is None or is_tensor(grad) else mindspore.Tensor(grad))

    return mindspore.ops.HookBackward(told)(tensor)


def watch_parameters(layer: Any, wanted: list[str], tell: Callable[[str, Any], None]) -> tuple[Callable[[], None], str]:
    """Have ``tell(name, gradient)`` called for parameters; gives what ends it, and why it is not possible."""
    handles: list[Any] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    def teller(name: str) -> Callable[[Any], Any]:
        def told(grad: Any) -> Any:
            tell(name, grad)
            return grad

        return told

    for name, parameter in parameters(layer):
        if name not in wanted or not parameter.requires_grad:
            continue
        if not hasattr(parameter, "register_hook"):
            return remove, f"MindSpore {version()} does not tell them"
        handles.append(parameter.register_hook(teller(name)))
    return remove, ""


def _keep_ctrl_c() -> None:
    """MindSpore's first operation takes SIGINT over and ends the process with it; give it back to Python's handler."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
