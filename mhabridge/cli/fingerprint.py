"""``mhabridge fingerprint``: hashes that are equal for equal weights, whatever the framework and the file format."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from mhabridge.cli.main import about

if TYPE_CHECKING:
    from mhabridge.checkpoint.fingerprints import Fingerprint


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--equal", is_flag=True, help="Exit with 1 when the files differ.")
@click.option("--spec", "spec_file", metavar="FILE", help="The attention layers' spec as JSON, or specs by prefix.")
@click.option("--num-heads", type=click.IntRange(1), help="Of all attention layers; it does not change the hashes.")
@click.option("--nested", multiple=True, metavar="KEY", help="Where the state dict lies; '' for the top. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    files: tuple[str, ...],
    equal: bool,
    spec_file: str | None,
    num_heads: int | None,
    nested: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print two hashes of each file: of its attention weights, and of all its weights.

    Names, layouts, the order of layers and the file format do not count; values, dtypes and shapes do.

    Example: mhabridge fingerprint model.pth model.ckpt --equal
    """
    from mhabridge.checkpoint.fingerprints import fingerprint
    from mhabridge.cli.rules import read_spec

    spec = read_spec(spec_file) if spec_file else None
    keys = [key for key in nested if key] if nested else None
    found = {}
    for file in files:
        with about(file):
            found[file] = fingerprint(file, spec, num_heads, keys)
        if not as_json:
            click.echo(_line(file, found[file]))
    if as_json:
        click.echo(json.dumps({file: json.loads(one.to_json()) for file, one in found.items()}, indent=2))
    if equal:
        sys.exit(_compare(list(found.values()), quiet=as_json))


def _line(file: str, found: Fingerprint) -> str:
    from mhabridge.cli.tables import printable

    layers = f"attention {found.attention}" if found.layers else "no attention layers"
    return f"{printable(file)}: {layers} all {found.all}"


def _compare(found: list[Fingerprint], quiet: bool) -> int:
    attention = len({one.attention for one in found}) == 1
    same = attention and len({one.all for one in found}) == 1
    if not quiet:
        other = "differ, but not in the attention layers" if attention else "differ in the attention layers"
        click.echo("all weights are equal" if same else f"the files {other}")
    return 0 if same else 1
