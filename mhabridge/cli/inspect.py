"""``mhabridge inspect``: the tensors of a checkpoint, its attention layers, and what else is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mhabridge.checkpoint.inspection import CheckpointInfo
    from mhabridge.checkpoint.planning.layers import Block

_USUAL = ("embed_dim", "num_heads", "dtype", "dropout", "batch_first")  # shown elsewhere, or in no file


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--num-heads", type=click.IntRange(1), help="Of all attention layers.")
@click.option("--spec", "spec_file", metavar="FILE", help="The attention layers' spec as JSON, or specs by prefix.")
@click.option("--nested", multiple=True, metavar="KEY", help="Where the state dict lies; '' for the top. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(file: str, num_heads: int | None, spec_file: str | None, nested: tuple[str, ...], as_json: bool) -> None:
    """Show the tensors of a checkpoint, its attention layers and their specs, and what else is in it.

    Reads any of the formats, without any framework; no number of a tensor is read, and nothing is executed.

    Example: mhabridge inspect model.ckpt
    """
    from mhabridge.checkpoint.inspection import inspect_checkpoint
    from mhabridge.cli.rules import read_spec

    spec = read_spec(spec_file) if spec_file else None
    keys = [key for key in nested if key] if nested else None
    info = inspect_checkpoint(file, spec, num_heads, keys)
    if as_json:
        click.echo(info.to_json())
    else:
        show(info)


def show(info: CheckpointInfo) -> None:
    """Print what is in a checkpoint."""
    from mhabridge.cli.plans import size
    from mhabridge.cli.tables import Column, print_table, printable

    count = len(info.tensors)
    total = size(sum(tensor.bytes for tensor in info.tensors))
    where = f" under {'.'.join(info.nested)}" if info.nested else ""
    columns = [Column("tensor", fold=True), Column("dtype"), Column("shape"), Column("bytes", "right", drop=1)]
    tied = any(tensor.tied for tensor in info.tensors)
    rows = [
        [tensor.name, tensor.dtype, str(tensor.shape), str(tensor.bytes), *([", ".join(tensor.tied)] if tied else [])]
        for tensor in info.tensors
    ]
    if tied:
        columns.append(Column("tied with", fold=True))
    title = f"{info.path}: {info.format}, {count} {'tensor' if count == 1 else 'tensors'}, {total}{where}"
    print_table(columns, rows, title=title)
    if info.blocks:
        _show_blocks(info.blocks)
    for line in _words(info):
        click.echo(printable(line))


def _show_blocks(blocks: tuple[Block, ...]) -> None:
    from mhabridge.cli.tables import Column, print_table

    columns = [
        Column("attention layer", fold=True),
        Column("layout"),
        Column("E", "right"),
        Column("H", "right"),
        Column("dtype", drop=1),
        Column("not as usual", drop=2, fold=True),
    ]
    print_table(columns, [_row(block) for block in blocks])


def _row(block: Block) -> list[str]:
    from mhabridge.spec import MHASpec

    spec = block.spec
    usual = MHASpec(spec.embed_dim, spec.num_heads).to_dict()
    odd = [f"{name}={value}" for name, value in spec.to_dict().items() if name not in _USUAL and value != usual[name]]
    heads = str(spec.num_heads) if block.heads_known else "?"
    return [block.prefix or "(the whole file)", block.layout, str(spec.embed_dim), heads, spec.dtype, ", ".join(odd)]


def _words(info: CheckpointInfo) -> list[str]:
    from mhabridge.cli.plans import notes

    lines = [f"{name} = {text}" for name, text in info.objects.items()]
    lines += [f"metadata {name}: {text:.200}{'...' if len(text) > 200 else ''}" for name, text in info.metadata.items()]
    if any(not block.heads_known for block in info.blocks):
        lines.append("H is in no state dict: a config.json beside the file or --num-heads can tell it.")
    return [*lines, *notes(info.notes)]
