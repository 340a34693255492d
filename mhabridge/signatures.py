"""The installed framework's real signatures, and what a table says otherwise.

``signatures`` runs where the framework is installed and gives plain text; ``complaints`` holds a dialect's table
against it.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from mhabridge import mapping
from mhabridge.arguments import Argument, Dialect, literal


def signatures(framework: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """The signatures of all that a framework's dialects name, as installed here.

    Args:
        framework: a table's name, such as "torch".
        payload: unused; backends call every function with one.

    Returns:
        ``version``, and under ``paths`` for each class, method or function the list of its parameters, each with
        ``name``, ``kind`` and ``default`` (its ``repr``, or None when there is none). ``self`` is left out.

    Raises:
        ImportError: the framework is not installed here.

    Example:
        >>> signatures("numpy")["paths"]["mhabridge.MHASpec"][0]["name"]
        'embed_dim'
    """
    table = mapping.table(framework)
    module = importlib.import_module(table["framework"]["module"])
    keys = ("constructor", "call", "function")
    paths = [entry[key] for entry in table["dialects"].values() for key in keys if key in entry]
    return {"version": str(module.__version__), "paths": {path: _parameters(path) for path in paths}}


def _parameters(path: str) -> list[dict[str, Any]]:
    found = _find(path)
    # A class's own signature may be hidden by a metaclass or a decorator; its __init__ is what runs.
    signature = inspect.signature(found.__init__ if inspect.isclass(found) else found)
    return [
        {
            "name": parameter.name,
            "kind": parameter.kind.name,
            "default": None if parameter.default is parameter.empty else repr(parameter.default),
        }
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]


def _find(path: str) -> Any:
    """The object at a documented path: packages are imported on the way, then attributes are followed."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:index]))
        found = getattr(found, part)
    return found


def complaints(spoken: Dialect, found: dict[str, Any]) -> list[str]:
    """Where a dialect's table and the installed framework differ; empty when they agree.

    Args:
        spoken: the dialect, in the installed version.
        found: what ``signatures`` gave.

    Example:
        >>> from mhabridge.arguments import dialect
        >>> spec = {"mhabridge.MHASpec": signatures("numpy")["paths"]["mhabridge.MHASpec"][1:]}
        >>> complaints(dialect("numpy"), {"paths": spec})[0]
        'mhabridge.MHASpec: the table has embed_dim, the signature does not'
    """
    places = [
        (spoken.constructor, spoken.constructor_arguments()),
        (spoken.call, spoken.call_arguments()),
        (spoken.function, spoken.arguments),
    ]
    said = []
    for path, arguments in places:
        if path in found["paths"]:
            parameters = [entry for entry in found["paths"][path] if entry["name"] not in spoken.call_ignores]
            said += [f"{path}: {text}" for text in _compare(arguments, parameters)]
    return said


def _compare(arguments: tuple[Argument, ...], parameters: list[dict[str, Any]]) -> list[str]:
    named = {entry["name"]: entry for entry in parameters if not entry["kind"].startswith("VAR_")}
    takes_more = any(entry["kind"] == "VAR_KEYWORD" for entry in parameters)
    table = {argument.name: argument for argument in arguments}
    said = [f"the signature has {name}, the table does not" for name in named if name not in table]
    said += [
        f"the table has {name}, the signature does not"
        for name, argument in table.items()
        if name not in named and not (argument.position is None and takes_more)
    ]
    real = [name for name, entry in named.items() if entry["kind"] != "KEYWORD_ONLY"]
    ours = [name for name, argument in table.items() if argument.position is not None]
    if not said and real != ours:
        said.append(f"the positional arguments are {', '.join(real)}, in the table {', '.join(ours)}")
    return said + [text for name in table if name in named for text in _compare_default(table[name], named[name])]


def _compare_default(argument: Argument, entry: dict[str, Any]) -> list[str]:
    if argument.required or entry["default"] is None:
        if argument.required == (entry["default"] is None):
            return []
    elif argument.default_value == literal(entry["default"]):
        return []
    real = entry["default"] or "none (required)"
    return [f"the default of {argument.name} is {real}, in the table {argument.default or 'none (required)'}"]
