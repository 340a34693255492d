"""Fills a live model from a checkpoint of any format and any framework's layout: all of it, or nothing.

The same plan is made as for a conversion, to the model's own framework, version, names and shapes. The tensors are then
made one at a time, in memory, and handed to the framework.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from mhabridge import bridge, mapping, packing
from mhabridge.checkpoint.fitting import Fitting
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.in_memory import Arrays
from mhabridge.checkpoint.load_report import LoadReport, require_ok
from mhabridge.checkpoint.planning import origins, sidecar
from mhabridge.checkpoint.planning import plan as planning
from mhabridge.checkpoint.planning.plan import Options, Plan
from mhabridge.checkpoint.storage.stored import StoredFile
from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError, UnsupportedError, WeightsError
from mhabridge.spec import MHASpec


def load_into(
    model: Any,
    src: str | os.PathLike[str],
    prefix: str = "",
    strict: bool = True,
    spec: Any = None,
    rename: Any = None,
    drop: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    *,
    num_heads: int | None = None,
    source: str | None = None,
    kinds: Mapping[str, str] | None = None,
    nested: Sequence[str] | None = None,
    ignore_objects: bool = False,
) -> LoadReport:
    """Fill a live model from a checkpoint of any format, written for any framework.

    Names, shapes, dtypes and the file's own checksums are looked at before anything in the model is changed; only what
    goes wrong after that (the file is cut off meanwhile, the device is out of memory) leaves it half filled. Nothing is
    cast or reshaped. Buffers (a batch norm's running statistics) count like parameters; tied parameters are filled
    once. The model keeps its device, its mode, and which of its parameters are frozen. In memory at a time is one
    tensor (a transposed one twice).

    Args:
        model: a ``torch.nn.Module``, ``mindspore.nn.Cell`` or ``megengine.module.Module``.
        src: the checkpoint, as for ``convert_checkpoint``.
        prefix: take only what lies under it, such as "encoder.layers.0.self_attn" for a single attention layer, or
            "module" for what a wrapper put before all names.
        strict: raise when anything does not fit, as ``load_state_dict`` does; else fill what fits, leave the rest as it
            is, and return the report.
        spec: an ``MHASpec`` for all attention layers of the file, or a mapping from their prefixes to them; what
            neither it nor the file says of a packed vector is taken from the model's own layers.
        rename: a function, a mapping, or rules such as "module.*=*".
        drop: patterns of tensors of the file to leave out.
        allow_missing: patterns of the model's names that may keep the values that they have.
        num_heads: of all attention layers of the file; it must be that of the model's.
        source: the framework that the file is from; None to find out.
        kinds: what a layer is, by a pattern of paths.
        nested: the keys under which the state dict lies; None to find it.
        ignore_objects: leave out entries that would take code to make.

    Returns:
        What was filled, and what did not fit: ``missing``, ``unexpected``, ``mismatched`` and ``errors``.

    Raises:
        ArgumentError: an option that cannot be, or something about the file that has to be said.
        ArgumentTypeError: not a model of a framework that is known.
        CheckpointError: a file that cannot be read.
        UnsupportedError: attention that is no plain multi-head attention, or that the framework cannot hold.
        WeightsError: something does not fit; the message lists it, and the model is as it was.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import torch
        >>> from mhabridge import MHASpec, MHAWeights
        >>> file, spec = pathlib.Path(tempfile.mkdtemp()) / "a.npz", MHASpec(8, 2)
        >>> np.savez(file, **MHAWeights.random(spec).to_layout("megengine", spec, prefix="encoder.attn"))
        >>> report = load_into(torch.nn.MultiheadAttention(8, 2), file, prefix="encoder.attn")
        >>> report.ok, report.loaded
        (True, ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias'))
    """
    adapter = _adapter_of(model)
    slots, specs = adapter.state.slots(model), adapter.state.attentions(model)
    options = Options(
        to=origins.installed(adapter.FRAMEWORK, adapter.version()),
        source=source,
        spec=spec,
        num_heads=num_heads,
        rename=rename,
        drop=drop,
        allow_missing=allow_missing,
        kinds=kinds or {},
        names_of={name: slot.shape for slot in slots for name in slot.every_name},
        exact=False,
        prefix=prefix,
    )
    with open_checkpoint(src, nested, verify=True) as file:
        left_out = planning.require_inert_allowed(file, ignore_objects, options.drop)
        try:
            plan = _plan(file, options, specs)
        except (ArgumentError, CheckpointError, UnsupportedError, WeightsError) as error:
            if strict:
                raise
            return LoadReport(str(file.path), errors=(str(error),))
        fitting = Fitting(file, plan, slots, specs, options)
        report = fitting.report()
        if strict:
            require_ok(report)
        adapter.state.load_state(model, Arrays(fitting.chosen(report)))
    return dataclasses.replace(report, notes=(*report.notes, *left_out))


def names_and_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that the framework's own checkpoints of a model have.

    Args:
        model: a ``torch.nn.Module``, ``mindspore.nn.Cell`` or ``megengine.module.Module``.

    Raises:
        ArgumentTypeError: not a model of a framework that is known.
        UnsupportedError: an entry of its state that is no parameter or buffer.
        WeightsError: a tensor without memory.

    Example:
        >>> import torch
        >>> names_and_shapes(torch.nn.Linear(3, 2))
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: slot.shape for slot in _adapter_of(model).state.slots(model) for name in slot.names}


def _adapter_of(model: Any) -> ModuleType:
    module = bridge.framework_of(model)
    if module is not None and module.state.is_model(model):
        return module
    raise ArgumentTypeError(
        "model",
        given=f"{type(model).__module__}.{type(model).__qualname__}",
        expected="a model (a module or cell) of " + ", ".join(mapping.FRAMEWORKS),
    )


def _plan(file: StoredFile, options: Options, specs: Mapping[str, MHASpec]) -> Plan:
    """The plan; where packed vectors have several readings, with what the model's own layers say of them."""
    try:
        return planning.make(file, options)
    except ArgumentError:
        if isinstance(options.spec, MHASpec) or not specs:
            raise
        known = sidecar.known(file, options.spec).by_prefix
        own = {path: one for path, one in specs.items() if packing.join(options.prefix, path) not in known}
        return planning.make(file, dataclasses.replace(options, spec={**own, **(options.spec or {})}))
