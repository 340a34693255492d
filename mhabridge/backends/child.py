"""The first code of ours in a worker: takes over the modules that the parent hands over, then answers calls.

Nothing of mhabridge needs to be installed in the worker's environment; if some version of it is, it is not used. The
parent sends this file's source through execnet, so it stands alone, and it runs in the main thread (MegEngine works
nowhere else).

Standard library only, until the modules are there. Runs inside workers (Python 3.8).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import traceback
from typing import Any

TRACEBACK_CHARACTERS = 4000


class Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports modules from their sources in memory; ``get_source`` lets tracebacks show their lines."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources
        self.packages = {name.rpartition(".")[0] for name in sources}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Found here, or refused here: never half of an mhabridge that happens to be installed."""
        if fullname in self.sources:
            return importlib.util.spec_from_loader(
                fullname, self, origin="<mhabridge>", is_package=self.is_package(fullname)
            )
        if fullname.partition(".")[0] == "mhabridge":
            raise ModuleNotFoundError(f"{fullname} was not handed over to this worker", name=fullname)
        return None

    def is_package(self, fullname: str) -> bool:
        """Whether the module is a package: others lie in it."""
        return fullname in self.packages

    def get_source(self, fullname: str) -> str:
        """The module's source."""
        return self.sources[fullname]

    def get_code(self, fullname: str) -> Any:
        """The module's code, under a file name that says where it came from."""
        return compile(self.sources[fullname], f"<parent>/{fullname}", "exec", dont_inherit=True)


def main(channel: Any) -> None:
    """Take over what the parent hands over, then answer calls until the parent closes the channel."""
    given = channel.receive()
    sys.meta_path.insert(0, Importer(given["modules"]))

    from mhabridge import mapping
    from mhabridge.backends import line, wire

    mapping.provide(given["tables"])
    outbox = wire.Outbox(given["places"]) if given["places"] else None
    put, get = channel.send, channel.receive
    if given["line"]:
        connected = line.connect(given["line"])
        put, get = connected.put, connected.get
        channel.send("connected")
    while True:
        try:
            request = wire.receive(get)
        except EOFError:
            return
        reply = answer(request, given["framework"])
        try:
            wire.send(put, reply, outbox)
        except Exception as error:
            wire.send(put, failure(request["number"], error), outbox)
        del request, reply  # arrays are not kept until the next call


def answer(request: dict[str, Any], framework: str) -> dict[str, Any]:
    """One call's reply: its result, or what went wrong."""
    from mhabridge.backends import service

    try:
        result = service.serve(request["function"], framework, request["payload"])
    except (Exception, SystemExit) as error:
        return failure(request["number"], error)
    return {"number": request["number"], "result": result}


def failure(number: int, error: BaseException) -> dict[str, Any]:
    """An error as plain values: one of ours by its fields, any other by type, text and traceback."""
    from mhabridge.errors import MHABridgeError

    if isinstance(error, MHABridgeError):
        return {"number": number, "error": error.to_dict()}
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {
        "number": number,
        "failure": {"type": type(error).__name__, "text": str(error), "traceback": text[-TRACEBACK_CHARACTERS:]},
    }


if __name__ == "__channelexec__":
    main(channel)  # type: ignore[name-defined]  # noqa: F821  # execnet puts it here
