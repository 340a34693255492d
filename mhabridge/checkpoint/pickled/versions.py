"""The versions of module classes that PyTorch sets on every state dict, as its attribute ``_metadata``.

``load_state_dict`` looks at them to bring the state of old classes up to date. They are kept as a text of JSON in the
metadata of an open file, by the path of each module: ``{"": {"version": 1}, "bn": {"version": 2}}``.
"""

from __future__ import annotations

import json
from typing import Any

from mhabridge.checkpoint.pickled import emitting
from mhabridge.checkpoint.storage import checking

KEY = "_metadata"
_PLAIN = (bool, int, float, str, type(None))


def text_of(value: Any) -> str | None:
    """Versions as JSON; None for what is not of their form.

    Example:
        >>> text_of({"bn": {"version": 2}}), text_of({"bn": 2})
        ('{"bn": {"version": 2}}', None)
    """
    return json.dumps(value) if _is_versions(value) else None


def attribute(text: str | None) -> bytes:
    """The operations that set the attribute on a dict that was just made; none for what ``text_of`` did not give."""
    found = parsed(text)
    if found is None:
        return b""
    inner = b"".join(emitting.value(path) + emitting.value(versions) for path, versions in found.items())
    made = emitting.ORDERED_DICT + emitting.MARK + inner + emitting.SET_ITEMS
    return b"}(" + emitting.value(KEY) + made + emitting.SET_ITEMS + emitting.BUILD


def parsed(text: str | None) -> dict[str, dict[str, Any]] | None:
    """What ``text_of`` gave as a text; None for any other.

    Example:
        >>> parsed('{"bn": {"version": 2}}'), parsed("[]"), parsed(None)
        ({'bn': {'version': 2}}, None, None)
    """
    if text is None:
        return None
    try:
        found = checking.json_of(text)
    except ValueError:
        return None
    return found if _is_versions(found) else None


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(path, str) and isinstance(one, dict) and all(isinstance(part, _PLAIN) for part in one.values())
        for path, one in value.items()
    )
