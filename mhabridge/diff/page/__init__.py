"""The report as one HTML page that needs nothing else: no files, no network, and scripts only for comfort.

Everything on it comes from the report. Names in it come from files that may be hostile: the template escapes all text,
and the page's own policy allows no script, no style and no request but what was written here.
"""

from __future__ import annotations

import os

from mhabridge.checkpoint.storage.atomic import replacing
from mhabridge.diff.report import DiffReport


def write(report: DiffReport, path: str | os.PathLike[str]) -> None:
    """Write a report as one page; a file of that name is replaced once the new one is whole.

    Args:
        report: of any kind.
        path: of the page, in a folder that exists.

    Raises:
        BackendError: jinja2 or Pillow is not installed.
        CheckpointError: the file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> write(DiffReport((), ()), target)
        >>> "Nothing was compared." in target.read_text(encoding="utf-8")
        True
    """
    from mhabridge.diff.page.rendering import render

    text = render(report).encode("utf-8")
    with replacing(path, force=True) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(text)
