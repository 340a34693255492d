"""What several test files read off the pages in docs/."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of a page's tables below a heading whose first cell is an id: the cells behind id and description."""
    below = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^\| `.*\|$", below, re.MULTILINE):
        name, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert name not in found, f"{page} has {name} twice"
        found[name.strip("`")] = cells
    return found
