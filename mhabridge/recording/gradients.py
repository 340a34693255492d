"""The gradients of what is recorded: of inputs and outputs by aliases that only the layer sees, of parameters by hooks.

Each is written when the model's backward comes to it. A parameter's belongs to its layer's latest call: it is the sum
over all calls in that backward.

Also part of the record kit (Python 3.8, the standard library only).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mhabridge.recording.calls import Arguments, Running
    from mhabridge.recording.ledger import Ledger

_SHOWN = 5


class Gradients:
    """What is known of one recording's gradients.

    Args:
        adapter: the recording module of the model's framework.
        ledger: where they are written.
    """

    def __init__(self, adapter: Any, ledger: Ledger) -> None:
        self.adapter, self.ledger = adapter, ledger
        self._kept: set[tuple[int, str]] = set()
        self._due: dict[int, str] = {}

    def tap_arguments(self, running: Running, arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the layer, whose gradients are seen; one tensor stays one."""
        originals = dict(arguments.named)  # kept alive: they are looked up by identity
        tapped: dict[int, tuple[str, Any]] = {}

        def change(name: str, value: Any) -> Any:
            if id(value) not in tapped:
                tapped[id(value)] = name, self.tap(running, f"arguments/{name}", value)
            first, tap = tapped[id(value)]
            if first != name and tap is not value:
                same = {"same_as": f"arguments/{first}"}
                running.entry.setdefault("grads", {})[f"arguments/{name}"] = same
            return tap

        changed = arguments.replaced(change)
        originals.clear()
        return changed

    def tap(self, running: Running, what: str, value: Any) -> Any:
        """What goes on in the place of a value, so that its gradient is seen; the value itself if it has none."""
        tap = None
        if self.adapter.is_tensor(value):
            index = running.index
            tap = self.adapter.tap(value, lambda grad: self.keep(index, what, grad))
        if tap is None:
            return value
        self._due.setdefault(running.index, running.name)
        return tap

    def watch_parameters(
        self, layer: Any, names: Sequence[str], latest: Callable[[], int]
    ) -> tuple[Callable[[], None], str]:
        """See the gradients of a layer's parameters.

        Args:
            layer: the framework's own.
            names: of the parameters.
            latest: gives the index of the layer's latest call.

        Returns:
            What ends it, and why it is not possible.
        """

        def tell(name: str, grad: Any) -> None:
            self.keep(latest(), f"parameters/{name}", grad)

        watched: tuple[Callable[[], None], str] = self.adapter.watch_parameters(layer, names, tell)
        return watched

    def keep(self, index: int, what: str, grad: Any) -> None:
        """Write a gradient of a call."""
        with own_failure(self.ledger):
            if not self.ledger.writable or index < 0:
                return
            name = f"calls/{index:06d}/grads/{what}"
            if (index, what) in self._kept:
                self.ledger.leave_out(f"{name}: a second backward")
                return
            self._kept.add((index, what))
            self._due.pop(index, None)
            self.ledger.event({"grads": {"index": index, "grads": {what: self.ledger.keep(name, grad)}}})

    def say_what_is_missing(self) -> None:
        """Leave out, by name, the calls that no backward reached."""
        names = list(self._due.values())
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(names[:_SHOWN]) + more
            self.ledger.leave_out(f"gradients of {shown}: backward did not reach them in the block")


@contextlib.contextmanager
def own_failure(ledger: Ledger) -> Any:
    """What goes wrong in the recorder ends the recording, not the model's run."""
    try:
        yield
    except Exception as error:
        if ledger.failure is None:
            ledger.failure = error
