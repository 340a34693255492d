"""``mhabridge record-kit``: the recorder as one file, to be copied to where the model runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

EXAMPLE = """\b
Use it there as mb.record:
  import mhabridge_record
  with mhabridge_record.record(model, "a.safetensors"):
      model(x)

\b
Example:
  mhabridge record-kit mhabridge_record.py --framework torch
"""


@click.command(epilog=EXAMPLE)
@click.argument("out", metavar="OUT.py")
@click.option("--framework", "frameworks", multiple=True, metavar="NAME", help="torch, mindspore or megengine; all.")
@click.option("--force", is_flag=True, help="Replace an old file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(out: str, frameworks: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Write the recorder as one file that needs nothing but Python 3.8, the framework and NumPy.

    Copy it beside the script that runs the model.
    """
    from mhabridge import mapping
    from mhabridge.checkpoint.storage.atomic import replacing
    from mhabridge.errors import ArgumentError
    from mhabridge.recording.kit import compose

    path = Path(out)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ArgumentError("OUT.py", given=repr(path.name), expected="a module's name", advice="mhabridge_record.py")
    chosen = tuple(dict.fromkeys(frameworks)) or mapping.FRAMEWORKS
    content = compose(chosen).encode("utf-8")
    with replacing(path, force) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    if as_json:
        click.echo(json.dumps({"path": str(path), "frameworks": list(chosen), "bytes": len(content)}, indent=2))
    else:
        click.echo(f"{path}: {len(content) / 1024:.0f} KiB, for {', '.join(chosen)}; `import {path.stem}` there.")
