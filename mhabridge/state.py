"""What a live model holds, whatever its framework: the places that a checkpoint's tensors can go to.

Each framework's ``state`` module in ``mhabridge.adapters`` describes and fills a model in these terms.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from mhabridge.errors import UnsupportedError
from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter or buffer of a model.

    Args:
        names: those that it has in the framework's own checkpoints of the model; several when it is tied.
        shape: in such a checkpoint.
        dtype: NumPy's name of it, "bfloat16", or a name that no checkpoint has.
        aliases: other names for it, which a checkpoint of another framework may use.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()

    @property
    def every_name(self) -> tuple[str, ...]:
        """Its names, then its aliases."""
        return (*self.names, *self.aliases)


def specs_of(
    parts: Iterable[tuple[str, Any]],
    is_layer: Callable[[Any], bool],
    require_plain: Callable[[Any], None],
    spec_of: Callable[[Any], MHASpec],
) -> dict[str, MHASpec]:
    """The spec of each attention layer among a model's parts, by path; what others compute is not known."""
    found = {}
    for path, part in parts:
        if is_layer(part):
            try:
                require_plain(part)
            except UnsupportedError:
                continue
            found[path] = spec_of(part)
    return found
