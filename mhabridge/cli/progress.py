"""A progress bar with bytes, rate and time left, on a terminal only; and an end to work in threads on Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

Advance = Callable[[int, int], None]


class Bars(Protocol):
    """Gives each file a bar."""

    def __call__(self, name: str) -> Advance | None:
        """A function to call with the bytes done and the bytes in all; None where nothing is shown."""


@contextlib.contextmanager
def bars(wanted: bool) -> Iterator[Bars]:
    """Bars on stderr while the ``with`` block runs, when that is a terminal and they are wanted."""
    if not wanted or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:

        def bar(name: str) -> Advance:
            task = shown.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                text = f"{name}: verifying" if done >= total else name
                shown.update(task, completed=done, total=total, description=text)

            return advance

        yield bar


class Stop:
    """Ends what runs in threads at its next report of progress, as Ctrl-C ends what runs in the main one."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def now(self) -> None:
        """From now on whatever reports progress is ended."""
        self._event.set()

    def watching(self, advance: Advance | None) -> Advance:
        """The same report of progress, which also sees the end."""

        def watched(done: int, total: int) -> None:
            if self._event.is_set():
                raise KeyboardInterrupt
            if advance is not None:
                advance(done, total)

        return watched
