"""The record kit: the recorder as one file, for machines where only a framework, NumPy and Python 3.8 are.

It is made of the sources that mhabridge itself runs, each as it is, in the frame of ``embedded.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mhabridge
from mhabridge import __version__, mapping
from mhabridge.backends import shipping
from mhabridge.errors import ArgumentError

# All that the recorder imports; a test imports the kit where there is no mhabridge.
PARTS = (
    "mhabridge.errors",
    "mhabridge.checkpoint.storage.atomic",
    "mhabridge.recording",
    "mhabridge.recording.journal",
    "mhabridge.recording.contents",
    "mhabridge.recording.ledger",
    "mhabridge.recording.selecting",
    "mhabridge.recording.calls",
    "mhabridge.recording.replaying",
    "mhabridge.recording.gradients",
    "mhabridge.recording.watching",
    "mhabridge.recording.finishing",
    "mhabridge.recording.recorder",
)
_FRAME = "mhabridge.recording.embedded"
_TABLES = ("FRAMEWORKS: dict[str, str] = {}\n", "SOURCES: dict[str, str] = {}\n")
_COMMENT = "# In mhabridge this file is the frame of the kit: `mhabridge.recording.kit` fills in the two tables.\n"


def compose(frameworks: Sequence[str] = mapping.FRAMEWORKS) -> str:
    """The source of the kit.

    Args:
        frameworks: those whose models it shall record.

    Raises:
        ArgumentError: there is no such framework.

    Example:
        >>> len(compose(["torch"])) < len(compose())
        True
    """
    for name in frameworks:
        if name not in mapping.FRAMEWORKS:
            raise ArgumentError("framework", given=repr(name), expected="one of " + ", ".join(mapping.FRAMEWORKS))
    roots = {mapping.table(name)["framework"]["module"]: name for name in frameworks}
    sources = {name: _source(name) for name in PARTS}
    for name in frameworks:
        part = f"mhabridge.adapters.{name}.recording"
        sources[part] = shipping.sources(name)[part]
    titles = ", ".join(mapping.table(name)["framework"]["title"] for name in frameworks)
    said = f"# Written by `mhabridge record-kit` {__version__}, for {titles}.\n"
    text = _source(_FRAME)
    filled = (f"FRAMEWORKS: dict[str, str] = {roots!r}\n", "SOURCES: dict[str, str] = {}\n" + _entries(sources))
    for old, new in ((_COMMENT, said), *zip(_TABLES, filled, strict=True)):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def _source(name: str) -> str:
    """A module's source, read without an import of the packages round it."""
    place = Path(mhabridge.__file__).parent.joinpath(*name.split(".")[1:])
    return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text(encoding="utf-8")


def _entries(sources: dict[str, str]) -> str:
    """Assignments that a reader of the kit can read: each source as it is, between quotes that it does not have."""
    entries = []
    for name, text in sources.items():
        assert "'''" not in text, name
        assert not text.endswith("\\"), name
        entries.append(f"\n# {'-' * 100}\nSOURCES[{name!r}] = r'''{text}'''\n")
    return "".join(entries)
