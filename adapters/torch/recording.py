"""What the recorder needs of PyTorch: a model's layers, hooks on them, and tensors as bytes.

Why it is built so:
- Hooks see keyword arguments since 2.0; before that the layer's ``forward`` is wrapped.
- An encoder layer's fast path computes everything in one kernel and calls no attention layer, and a whole encoder makes
  nested tensors for it. Hooks alone stop the first and not the second, so both are off while such a model is recorded.
- What ``torch.compile`` made before the hooks were there does not call them, so it runs uncompiled meanwhile.
- A gradient is that of an alias which only this layer sees: a hook on the tensor itself would also see what flows
  round the layer.

The recorder, this module and NumPy are also what the record kit is made of: no other module of mhabridge is used here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from typing import Any, Callable, Iterator

import numpy as np
import torch

FRAMEWORK = "torch"
WHY_NOT_CALLED = "a layer round it computes without it, or the model does not use it, or was traced or scripted."
_WRAPPER = "_orig_mod"  # the name under which torch.compile's wrapper holds the module


def version() -> str:
    """PyTorch's version."""
    return str(torch.__version__)


def is_model(model: Any) -> bool:
    """Whether this is a module whose parts can be watched."""
    return isinstance(model, torch.nn.Module)


def parts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module in the model by path, those that are there twice twice."""
    often = {"remove_duplicate": False} if "remove_duplicate" in _parameters_of(model.named_modules) else {}
    for path, layer in model.named_modules(**often):
        if _WRAPPER not in layer._modules:
            yield ".".join(name for name in path.split(".") if name != _WRAPPER), layer


def is_attention(layer: Any) -> bool:
    """Whether this is a multi-head attention of PyTorch or the drop-in."""
    return isinstance(layer, torch.nn.MultiheadAttention)


def names(layer: Any) -> dict[str, str]:
    """The layer's class and kind."""
    kind = type(layer)
    own = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.") and base != torch.nn.Module]
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
        found.setdefault("batch_first", False)  # 1.8.1 has none
    return found


def parameters(layer: Any) -> list[tuple[str, Any]]:
    """The parameters and buffers, by the names of the state dict."""
    return [*layer.named_parameters(), *layer.named_buffers()]


def environment(model: Any) -> dict[str, str]:
    """Where the model runs."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return {
        "device": "cpu" if tensor is None else str(tensor.device),
        "threads": str(torch.get_num_threads()),
        "cuda": str(torch.version.cuda),
    }


@contextlib.contextmanager
def plain_python(model: Any) -> Iterator[dict[str, str]]:
    """While the block runs, every layer is called from Python; gives what that changes."""
    notes: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        fast: Any = getattr(torch.backends, "mha", None)
        encoders = (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer)
        if hasattr(fast, "set_fastpath_enabled") and any(isinstance(layer, encoders) for layer in model.modules()):
            stack.callback(fast.set_fastpath_enabled, fast.get_fastpath_enabled())
            fast.set_fastpath_enabled(False)
            notes["fast path"] = "off while recording: it does not call the attention layers"
        compiler: Any = getattr(torch, "compiler", None)
        if "torch._dynamo" in sys.modules and hasattr(compiler, "set_stance"):  # importing it takes seconds
            stack.enter_context(compiler.set_stance("force_eager"))
            notes["torch.compile"] = "off while recording: what was compiled before calls no hooks"
        yield notes


def hook(layer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    """Have ``before(args, kwargs)`` give the arguments of each call, and ``after(outputs)`` its outputs.

    Returns:
        What ends it.
    """
    if "with_kwargs" not in _parameters_of(layer.register_forward_hook):
        return _wrap(layer, before, after)

    def prepare(module: Any, args: Any, kwargs: Any) -> Any:
        return before(args, kwargs) if _is_it(module, layer) else None

    def changed(module: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        new = after(outputs) if _is_it(module, layer) else outputs
        return None if new is outputs else new

    first = layer.register_forward_pre_hook(prepare, with_kwargs=True)
    last = layer.register_forward_hook(changed, with_kwargs=True)

    def remove() -> None:
        first.remove()
        last.remove()

    return remove


def _is_it(module: Any, layer: Any) -> bool:
    """Whether a module is the one that is watched, or its replica on another device; a copy has the hooks too."""
    return module is layer or bool(getattr(module, "_is_replica", False))


def _wrap(layer: Any, before: Callable[..., Any], after: Callable[..., Any]) -> Callable[[], None]:
    own, forward = vars(layer).get("forward"), layer.forward

    layer.forward = _Wrapped(layer, forward, before, after)

    def remove() -> None:
        del layer.forward
        if own is not None:
            layer.forward = own

    return remove


class _Wrapped:
    """The forward of a layer that is watched; a copy of the layer gets that of its class."""

    def __init__(self, layer: Any, forward: Any, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self.layer, self.forward, self.before, self.after = layer, forward, before, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.before(args, kwargs)
        return self.after(self.forward(*args, **kwargs))

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self.layer))
        return self.forward if copied is None else types.MethodType(type(copied).forward, copied)


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor."""
    return isinstance(value, torch.Tensor)


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its shape."""
    return tuple(int(size) for size in tensor.shape)


def nbytes(tensor: torch.Tensor) -> int:
    """The bytes of its values."""
    return int(tensor.numel() * tensor.element_size())


def is_floating(tensor: torch.Tensor) -> bool:
    """Whether its numbers are floating."""
    return bool(tensor.is_floating_point())


def to_numpy(tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """The dtype's name and the values, bfloat16 as its bits; perhaps still the tensor's own memory.

    Raises:
        TypeError: it has no values in rows and columns (nested, sparse, meta, quantised).
    """
    if getattr(tensor, "is_nested", False):
        raise TypeError("a nested tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"a tensor of layout {tensor.layout}, dtype {tensor.dtype}, on {tensor.device}")
    tensor = tensor.detach().cpu().contiguous()
    for resolve in ("resolve_conj", "resolve_neg"):
        tensor = getattr(tensor, resolve)() if hasattr(tensor, resolve) else tensor
    if tensor.dtype == torch.bfloat16:
        return "bfloat16", tensor.view(torch.int16).numpy().view(np.uint16)
    array = tensor.numpy()
    return array.dtype.name, array


def like(array: np.ndarray, old: torch.Tensor) -> torch.Tensor:
    """These values as a tensor of another's dtype, on its device, taking part in gradients as it does."""
    tensor = torch.from_numpy(np.array(array)).to(dtype=old.dtype, device=old.device)
    return tensor.requires_grad_(old.requires_grad)


def tap(tensor: torch.Tensor, tell: Callable[[Any], None]) -> Any:
    """An alias whose gradient is told; None where there is none to come."""
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return None
    alias = tensor.view_as(tensor)
    alias.register_hook(tell)
    return alias


def watch_parameters(layer: Any, wanted: list[str], tell: Callable[[str, Any], None]) -> tuple[Callable[[], None], str]:
    """Have ``tell(name, gradient)`` called for parameters; gives what ends it, and why it is not possible."""
    handles = [
        parameter.register_hook(functools.partial(tell, name))
        for name, parameter in layer.named_parameters()
        if name in wanted and parameter.requires_grad
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove, ""


def _parameters_of(function: Any) -> Any:
    return inspect.signature(function).parameters
