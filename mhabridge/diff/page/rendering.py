"""The page's text: templates, one style sheet and one script, and the policy that allows nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
from typing import TYPE_CHECKING

from mhabridge.diff.page import colours, contents, text
from mhabridge.diff.page.layers import Group
from mhabridge.diff.report import DiffReport
from mhabridge.errors import BackendError

if TYPE_CHECKING:
    import jinja2

STYLES = ("page.css", "layers.css", "pictures.css", "print.css")
SCRIPTS = ("list.js", "maps.js", "page.js")
GLYPHS = {"equal": "=", "rounding": "≈", "off": "≠", "broken": "✕", "failed": "?", "none": "·"}


def render(report: DiffReport) -> str:
    """The whole page.

    Raises:
        BackendError: jinja2 or Pillow is not installed.
    """
    style, script = _joined(STYLES), _joined(SCRIPTS)
    return _environment().get_template("page.html").render(
        page=contents.contents(report),
        policy=_policy(style, script),
        style=style,
        script=script,
        palettes=[base64.b64encode(each.tobytes()).decode() for each in (colours.SEQUENTIAL, colours.DIVERGING)],
    )  # fmt: skip


def _policy(style: str, script: str) -> str:
    """Only this very style sheet and script, and images that are part of the page."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode()


def _joined(names: tuple[str, ...]) -> str:
    """Some of our own files, one after another; they stand in the page as they are."""
    return "\n".join(_source(name) for name in names)


def _source(name: str) -> str:
    return (importlib.resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    try:
        import jinja2
        import PIL.Image  # noqa: F401  # the heat maps need it; better to know at once
    except ImportError as error:
        raise BackendError(
            "the report page",
            given=str(error),
            expected="jinja2 and Pillow",
            advice="Install them with: pip install 'mhabridge[report]'",
        ) from error

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        visible=text.visible,
        number=text.number,
        exact=text.exact,
        cosine=text.cosine,
        size=text.size,
        place=text.place,
        counted=text.counted,
        fraction=contents.fraction,
    )
    environment.globals["glyphs"] = GLYPHS
    environment.tests["group"] = lambda member: isinstance(member, Group)
    return environment
