"""``mhabridge convert``: checkpoints to another format, another framework's names and layouts, or both."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mhabridge.cli import progress, rules
from mhabridge.cli.main import explain
from mhabridge.errors import ArgumentError, MHABridgeError, WeightsError

if TYPE_CHECKING:
    from mhabridge.checkpoint.conversion import ConversionReport

EXAMPLES = """\b
Examples:
  mhabridge convert model.pth model.ckpt --to mindspore
  mhabridge convert model.safetensors model.pkl --to megengine --dry-run
  mhabridge convert model.ckpt model.pth --to torch --rename 'backbone.*=*' --drop 'moment*'
  mhabridge convert a.pth b.pth folder --format safetensors
"""
_AT_ONCE = 2  # files


@click.command(epilog=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, metavar="IN...")
@click.argument("target", metavar="OUT")
@click.option("--to", metavar="FRAMEWORK", help="Whose names and layouts: torch, mindspore, mindspore.mint, megengine, "
              "or mindspore@2.0; without it they stay.")  # fmt: skip
@click.option("--layout", help="Another layout for attention, such as hf-bert.")
@click.option("--from", "source_framework", metavar="FRAMEWORK", help="Whose checkpoint it is, when not recognised.")
@click.option("--format", "ending", help="The ending of the new files, when OUT is a folder: ckpt, safetensors, ...")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing target.")
@click.option("--no-verify", is_flag=True, help="Do not read the target back and compare it bit for bit.")
@click.option("--num-heads", type=click.IntRange(1), help="Of all attention layers.")
@click.option("--spec", "spec_file", metavar="FILE", help="The attention layers' spec as JSON, or specs by prefix.")
@click.option("--rename", multiple=True, metavar="RULE", help="'module.*=*': names, before all else. Repeatable.")
@click.option(
    "--rules", "rules_file", metavar="FILE", help="TOML: rename, drop, allow_missing, kinds, num_heads, spec."
)
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave tensors out. Repeatable.")
@click.option("--allow-missing", multiple=True, metavar="PATTERN", help="Names of --names-of that may stay empty.")
@click.option("--kind", "kinds", multiple=True, metavar="PATTERN=KIND", help="What a layer is: 'tokens=embedding'.")
@click.option("--names-of", metavar="FILE|MODULE:FUNCTION", help="A checkpoint or model that must be filled exactly.")
@click.option("--nested", multiple=True, metavar="KEY", help="Where the state dict lies; '' for the top. Repeatable.")
@click.option("--ignore-objects", is_flag=True, help="Leave out, and list, what would take code to make.")
@click.option("--shard-size", metavar="SIZE", help="Of one file, when OUT is *.index.json.  [default: 5GB]")
@click.option("--verbose", is_flag=True, help="Show every tensor, not only groups of alike ones.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(**options: Any) -> None:
    """Convert checkpoints to another format, another framework's names and layouts, or both.

    No framework is needed and nothing in a file is executed. The ending of OUT says its format: .safetensors, .pt,
    .pth, .bin, .ckpt, .pkl, .npz or .safetensors.index.json. Several INs go to a folder OUT. The result is read back
    and compared with the source bit for bit before it takes its name.

    Exit code 0: done; 1: a tensor would be lost, or the result was wrong; 2: it could not be done.
    """
    pairs = _pairs(options["sources"], options["target"], options["ending"])
    arguments = {**_arguments(options), **_sharding(options["shard_size"], pairs)}
    quiet = options["quiet"] or options["as_json"]
    with progress.bars(not quiet) as bars:
        outcomes = list(_outcomes(pairs, arguments, bars))
    from mhabridge.cli.tables import printable

    if options["as_json"]:
        _print_json(pairs, outcomes)
    elif not options["quiet"]:
        _print(outcomes, options)
    for (source, _), outcome in zip(pairs, outcomes, strict=True):
        if isinstance(outcome, MHABridgeError):
            if len(pairs) > 1:
                click.echo(f"mhabridge: {printable(source)} was not converted:", err=True)
            explain(outcome)
    sys.exit(max(_exit_code(outcome) for outcome in outcomes))


def _pairs(sources: tuple[str, ...], target: str, ending: str | None) -> list[tuple[str, pathlib.Path]]:
    """Each source with its target."""
    out = pathlib.Path(target)
    if len(sources) == 1 and not out.is_dir():
        if ending:
            raise ArgumentError("--format", given=ending, expected="a folder to write to", advice="OUT names a file.")
        return [(sources[0], out)]
    if not out.is_dir():
        raise ArgumentError(
            "OUT", given=f"{target}, which is no folder", expected="an existing folder for several files"
        )
    if not ending:
        raise ArgumentError("--format", given="nothing", expected="the ending of the new files, such as ckpt")
    pairs = [(source, out / f"{_stem(source)}.{ending.lstrip('.')}") for source in sources]
    names = [path.name for _, path in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(
            ", ".join(twice), given="several sources that get this name", expected="a name for each",
            advice="Convert them one by one.",
        )  # fmt: skip
    return pairs


def _stem(source: str) -> str:
    """A file's name without the ending that says its format."""
    from mhabridge.checkpoint.formats.known import FORMATS

    name = pathlib.Path(source).name
    endings = [ending for one in FORMATS for ending in one.endings if name.lower().endswith(ending)]
    stem = name[: -max(map(len, endings))] if endings else name
    return stem.removesuffix(".safetensors")


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What ``convert_checkpoint`` gets: options come before what a rules file says."""
    said = rules.read_rules(options["rules_file"]) if options["rules_file"] else {}
    spec = rules.read_spec(options["spec_file"]) if options["spec_file"] else said.get("spec")
    return {
        "to": options["to"],
        "layout": options["layout"],
        "source": options["source_framework"],
        "spec": spec,
        "num_heads": options["num_heads"] or said.get("num_heads"),
        "rename": [*options["rename"], *said.get("rename", [])] or None,
        "drop": [*options["drop"], *said.get("drop", [])],
        "allow_missing": [*options["allow_missing"], *said.get("allow_missing", [])],
        "kinds": {**rules.kinds_of(options["kinds"]), **said.get("kinds", {})},
        "names_of": rules.names_of(options["names_of"]) if options["names_of"] else None,
        "nested": [key for key in options["nested"] if key] if options["nested"] else None,
        "ignore_objects": options["ignore_objects"],
        "force": options["force"],
        "dry_run": options["dry_run"],
        "verify": not options["no_verify"],
    }


def _sharding(size: str | None, pairs: list[tuple[str, pathlib.Path]]) -> dict[str, int]:
    """The size of one file, where the target has several."""
    from mhabridge.checkpoint.formats import known, sharded

    if size is None:
        return {}
    found = {"shard_size": rules.size_of(size)}
    for _, target in pairs:
        format = known.by_name(target)
        if format is not None and format.name != sharded.NAME:
            raise ArgumentError(
                "--shard-size",
                given=f"{size}, and {target.name}, which is one file",
                expected=f"it for an index, NAME.safetensors{sharded.ENDING}, only",
            )
    return found


def _outcomes(
    pairs: list[tuple[str, pathlib.Path]], arguments: dict[str, Any], bars: progress.Bars
) -> Iterator[ConversionReport | MHABridgeError]:
    """A report, or the error, for each pair in their order: a file that fails keeps no other from being converted."""
    from mhabridge.checkpoint.conversion import convert_checkpoint
    from mhabridge.checkpoint.storage.parallel import usual_count
    from mhabridge.cli.tables import printable

    stop = progress.Stop()
    # Four threads on two processors take a tenth longer than two (measured).
    workers = usual_count(beside=min(len(pairs), _AT_ONCE))

    def convert(source: str, target: pathlib.Path) -> ConversionReport | MHABridgeError:
        watched = stop.watching(bars(printable(target.name)))
        try:
            return convert_checkpoint(source, target, progress=watched, workers=workers, **arguments)
        except MHABridgeError as error:
            return error

    yield from _each(convert, pairs, stop)


def _each(
    convert: Callable[..., ConversionReport | MHABridgeError],
    pairs: list[tuple[str, pathlib.Path]],
    stop: progress.Stop,
) -> Iterator[ConversionReport | MHABridgeError]:
    if len(pairs) == 1:  # in the main thread, where Ctrl-C arrives at once
        yield convert(*pairs[0])
        return
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(convert, *pair) for pair in pairs]
        try:
            for one in waiting:
                yield one.result()
        except BaseException:
            stop.now()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _exit_code(outcome: ConversionReport | MHABridgeError) -> int:
    if isinstance(outcome, MHABridgeError):
        return 1 if isinstance(outcome, WeightsError) else 2
    return 0 if outcome.ok else 1


def _print(outcomes: list[ConversionReport | MHABridgeError], options: dict[str, Any]) -> None:
    from mhabridge.cli.plans import show

    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, MHABridgeError):
            continue
        if number:
            click.echo()
        show(outcome, to=options["to"], dry_run=options["dry_run"], verbose=options["verbose"])


def _print_json(pairs: list[tuple[str, pathlib.Path]], outcomes: list[ConversionReport | MHABridgeError]) -> None:
    """One object for one file, else a list of them; an error is an object, too."""
    found = []
    for (source, _), outcome in zip(pairs, outcomes, strict=True):
        if isinstance(outcome, MHABridgeError):
            found.append({"ok": False, "source": source, "error": outcome.to_dict()})
        else:
            found.append(json.loads(outcome.to_json()))
    click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2))
