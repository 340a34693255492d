"""Recordings: what the layers of a running model were given and what they answered, in one file.

``mb.record`` makes one with whatever framework the model is of; ``mhabridge record-kit`` writes the same code as one
file for machines where nothing but that framework and NumPy is installed.

All but ``kit`` and ``reading`` runs on Python 3.8 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from mhabridge.recording.recorder import Recorder

__all__ = ["record"]


def record(
    model: Any,
    path: str | os.PathLike[str],
    layers: str | type | Sequence[str | type] | None = None,
    *,
    grads: bool = False,
    attn_weights: bool = True,
    parameters: bool = True,
    limit: int = 4 << 30,
    inputs_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Recorder:
    """Record what a model's attention layers compute while a ``with`` block runs, and what the model itself answers.

    Every tensor is written to ``<path>.journal`` at once, so memory stays bounded and a killed process leaves what it
    had recorded; when the block ends, the journal becomes one safetensors file. Both kinds of file can be compared:
    ``mhabridge diff recordings A B``.

    Args:
        model: a module of PyTorch, a cell of MindSpore or a module of MegEngine.
        path: the file to make.
        layers: which layers: None for the attention layers, and of the model itself what it answers; "all"; a pattern
            of paths (``encoder.*.ffn``), a class, or a list of these.
        grads: also the gradients of the layers' inputs, outputs and parameters, if the model's backward runs in the
            block.
        attn_weights: keep the attention weights where a layer returns them; no layer is asked for what the model does
            not ask it for.
        parameters: keep the layers' parameters, as at their first call, and again what has changed at a later one.
        limit: bytes of tensors; what goes beyond is left out and named.
        inputs_from: another recording, whose inputs each matching layer is given in the place of its own, so that an
            early error does not drown the later ones (*single-step mode*).
        overwrite: whether an old recording (or journal) of that name may be replaced.

    Returns:
        The recorder, to be used in a ``with`` statement; it has ``path``, ``calls`` (how many, of layers) and
        ``left_out``.

    Raises:
        ArgumentTypeError: not a model of a known framework.
        ArgumentError: a layer that is asked for is not there, or an option is wrong.
        BackendError: the model's framework cannot be imported here.
        CheckpointError: on entering, if the file exists or cannot be made; on leaving, if it could not be written.

    Example:
        >>> import tempfile, pathlib, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> model, x = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.ones(1, 3, 8)
        >>> with record(model, folder / "a.safetensors") as recorder:
        ...     y = model(x)
        >>> recorder.calls, [file.name for file in folder.iterdir()]
        (1, ['a.safetensors'])
    """
    from mhabridge.recording.dispatch import adapter_of
    from mhabridge.recording.recorder import Options, Recorder

    options = Options(layers, grads, attn_weights, parameters, limit, inputs_from, overwrite)
    return Recorder(adapter_of(model), model, path, options)
