"""The recorder: a ``with`` block in which layers are watched, and the file that it leaves.

It knows no framework. What it needs of one is in that framework's ``recording`` module in ``mhabridge.adapters``, with
the same names in each. A failure of the recorder's own never reaches the model: it ends the recording, and is raised
when the block has ended without an error of its own.

Also part of the record kit (Python 3.8, NumPy only).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError
from mhabridge.recording.contents import FORMAT
from mhabridge.recording.finishing import finish
from mhabridge.recording.gradients import own_failure
from mhabridge.recording.journal import ENDING
from mhabridge.recording.ledger import Ledger
from mhabridge.recording.replaying import Replay
from mhabridge.recording.selecting import select
from mhabridge.recording.watching import Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Options:
    """What is recorded; see ``mhabridge.recording.record``."""

    layers: Any = None
    grads: bool = False
    attn_weights: bool = True
    parameters: bool = True
    limit: int = 4 << 30
    inputs_from: Any = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise for a limit that is none."""
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 0:
            raise ArgumentError("limit", given=repr(self.limit), expected="a number of bytes")


class Recorder:
    """Records while its ``with`` block runs. Made by ``record``.

    Attributes:
        path: the file that it makes.
        journal: what is written meanwhile, beside it.
    """

    def __init__(self, adapter: Any, model: Any, path: str | os.PathLike[str], options: Options) -> None:
        options.check()
        if not isinstance(path, (str, os.PathLike)):
            raise ArgumentTypeError("path", given=repr(path), expected="a path: a string or a pathlib.Path")
        self.adapter, self.model, self.options = adapter, model, options
        self.path = Path(path)
        self.journal = self.path.with_name(self.path.name + ENDING)
        self._exit = contextlib.ExitStack()
        self._watcher: Watcher | None = None

    @property
    def calls(self) -> int:
        """How many calls were recorded."""
        return 0 if self._watcher is None else self._watcher.calls

    @property
    def left_out(self) -> list[str]:
        """What is not in the recording, and why."""
        return [] if self._watcher is None else self._watcher.ledger.left_out

    def __enter__(self) -> Recorder:
        if self._watcher is not None:
            raise ArgumentError("record", given="a recorder that was used", expected="a new one for each block")
        chosen = select(self.adapter, self.model, self.options.layers)
        self._make_room()
        with contextlib.ExitStack() as undo:
            undo.push(self._exit)
            undo.enter_context(self._explained())
            ledger = self._open(undo)
            replay = None
            if self.options.inputs_from is not None:
                replay = Replay(self.options.inputs_from, [one.path for one in chosen])
                self._exit.callback(replay.close)
            self._watcher = Watcher(self.adapter, ledger, chosen, self.options, replay)
            self._begin(self._watcher)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watcher = self._watcher
        assert watcher is not None
        self._exit.close()
        with own_failure(watcher.ledger):
            watcher.say_what_is_missing()
            watcher.ledger.end(complete=error is None)
        watcher.ledger.close()
        problem = self._finish(watcher.ledger)
        if problem is not None and error is None:
            raise problem from watcher.ledger.failure
        if problem is not None:  # the block's own error goes on its way
            warnings.warn(str(problem), RuntimeWarning, stacklevel=2)
        elif not watcher.calls and error is None:
            text = f"{self.path}: nothing was recorded. {' '.join(self.left_out[:_SHOWN])}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _make_room(self) -> None:
        """Refuse names that are taken; an old journal may be all that is left of a run."""
        broken_off = "It is a recording that broke off, and can be read as it is; overwrite=True removes it."
        for file, advice in ((self.path, "Name another file, or use overwrite=True."), (self.journal, broken_off)):
            if os.path.lexists(file) and not self.options.overwrite:
                raise CheckpointError(str(file), given="a file that exists", expected="a new name", advice=advice)
        if not self.path.parent.is_dir():
            raise CheckpointError(str(self.path), given="a folder that does not exist", expected="an existing folder")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            given, expected = str(error.strerror), "a file that can be written"
            raise CheckpointError(str(self.journal), given=given, expected=expected) from error

    def _open(self, undo: contextlib.ExitStack) -> Ledger:
        if os.path.lexists(self.journal):
            self.journal.unlink()
        ledger = Ledger(self.journal, self.adapter, self.options.limit)
        undo.callback(self.journal.unlink)
        undo.callback(ledger.close)
        return ledger

    def _begin(self, watcher: Watcher) -> None:
        notes = self._exit.enter_context(self.adapter.plain_python(self.model))
        environment = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "platform": platform.platform(),
            **self.adapter.environment(self.model),
            **notes,
        }
        start = {"format": FORMAT, "framework": self.adapter.FRAMEWORK, "version": self.adapter.version()}
        start["environment"] = environment
        if self.options.inputs_from is not None:
            start["inputs_from"] = Path(self.options.inputs_from).name
        watcher.ledger.event({"start": start})
        for one in watcher.layers:
            watcher.watch(one, self._exit.callback)

    def _finish(self, ledger: Ledger) -> CheckpointError | None:
        """Make the file of the journal; what went wrong, if something did."""
        failure, where = ledger.failure, self.path
        try:
            finish(self.journal, self.path, self.options.overwrite)
        except CheckpointError as error:
            advice = f"What was recorded is in {self.journal}, which can be read as it is."
            return CheckpointError(error.subject, given=error.given, expected=error.expected, advice=advice)
        except OSError as error:
            failure, where = failure or error, self.journal
        if failure is None:
            return None
        what = str(failure.strerror) if isinstance(failure, OSError) else f"{type(failure).__name__}: {failure}"
        return CheckpointError(
            str(self.path),
            given=f"a recording that ended early: {what}",
            expected="that everything could be recorded",
            advice=f"What was recorded until then is in {where}.",
        )
