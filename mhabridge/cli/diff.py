"""``mhabridge diff``: the same layer on several backends, judged against float64; and the group of the other diffs."""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Any

import click

from mhabridge.cli import outputs
from mhabridge.cli.lazy import LazyGroup
from mhabridge.mapping import FRAMEWORKS

if TYPE_CHECKING:
    from mhabridge.cli.tables import Column
    from mhabridge.diff import DiffReport, Entry, Run
    from mhabridge.spec import MHASpec
    from mhabridge.weights import MHAWeights

EXAMPLES = """\b
Examples:
  mhabridge diff --embed-dim 64 --num-heads 8 --masks padding+causal
  mhabridge diff --backends torch,megengine --dtype float16 --json
  mhabridge diff --weights model.safetensors --prefix encoder.layer.0.attention --html report.html
  mhabridge diff checkpoints model.pt converted.ckpt
  mhabridge diff recordings torch.safetensors mindspore.safetensors
"""
POSITIVE = click.IntRange(1)
COMMANDS = {
    "checkpoints": ("mhabridge.cli.diff_checkpoints", "Compare the weights of two checkpoints of any format."),
    "recordings": ("mhabridge.cli.diff_recordings", "Compare two recorded runs; find the first divergence."),
}


@click.group(cls=LazyGroup, table=COMMANDS, invoke_without_command=True, epilog=EXAMPLES)
@click.option("--backends", default=",".join(FRAMEWORKS), show_default=True, help="Names, joined by commas.")
@click.option("--embed-dim", type=int, help="E.  [default: 64]")
@click.option(
    "--num-heads", type=int, help="H; for --weights the default is in the config.json beside it.  [default: 8]"
)
@click.option("--kdim", type=int, help="Features of the key, when not E.")
@click.option("--vdim", type=int, help="Features of the value, when not E.")
@click.option("--no-bias", is_flag=True, help="A layer without biases.")
@click.option("--add-bias-kv", is_flag=True, help="Append a learned vector to keys and values.")
@click.option("--add-zero-attn", is_flag=True, help="Append a zero vector to keys and values.")
@click.option("--batch-first", is_flag=True, help="Inputs are (N, L, E).")
@click.option("--spec", "spec_file", type=click.Path(), help="A spec as JSON, instead of the options above.")
@click.option(
    "--weights", "weights_file", type=click.Path(), help="A checkpoint (.safetensors, .npz); otherwise random."
)
@click.option("--prefix", default="", help="Where the layer stands in the checkpoint.")
@click.option("--layout", help="How it is packed there; otherwise recognised by names and shapes.")
@click.option("--dtype", help="Compute in float16, bfloat16, float32 or float64.")
@click.option(
    "--masks", default="none", show_default=True, help="none, padding, bool, float, per-head, causal; join with +."
)
@click.option("--fully-masked", default="nan", show_default=True, help="nan, zero or error.")
@click.option("--no-weights", is_flag=True, help="Do not ask for the attention weights.")
@click.option("--per-head", is_flag=True, help="Compare the weights of each head, not their average.")
@click.option("--grads", is_flag=True, help="Also compare gradients.")
@click.option("--steps", type=click.IntRange(0), default=0, help="Also train every side for so many steps.")
@click.option("--batch", type=POSITIVE, default=2, show_default=True, help="N.")
@click.option("--target-length", type=POSITIVE, default=5, show_default=True, help="L.")
@click.option("--source-length", type=POSITIVE, default=7, show_default=True, help="S.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="For random weights, inputs and masks.",
)
@click.option("--timeout", type=float, help="Seconds that a backend may take.")
@outputs.options
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Run the same layer on several backends and judge the difference.

    Each answer is held against a float64 reference, by what rounding in the dtype justifies for this very computation.
    Exit code 0: rounding explains all; 1: a difference; 2: a backend could not be asked.
    """
    if context.invoked_subcommand is not None:
        _refuse_before(context)
        return
    outputs.check(options, (options["weights_file"], options["spec_file"]))
    if not all(name.strip() for name in options["backends"].split(",")):
        raise click.UsageError("--backends: names of backends, joined by commas; `mhabridge backends` lists them.")
    from mhabridge.diff import diff
    from mhabridge.diff.inputs import random_inputs, random_masks

    spec, weights, notes = _layer(options)
    sizes = {"batch": options["batch"], "target": options["target_length"], "source": options["source_length"]}
    report = diff(
        spec,
        options["backends"],
        weights,
        random_inputs(spec, options["seed"], **sizes),
        options["seed"],
        grads=options["grads"],
        steps=options["steps"],
        pictures=outputs.wants_pictures(options),
        need_weights=not options["no_weights"],
        average_attn_weights=not (options["per_head"] or outputs.wants_pictures(options)),
        fully_masked=options["fully_masked"],
        timeout=options["timeout"],
        **random_masks(options["masks"], spec, options["seed"], **sizes),
    )
    outputs.give(report, options, lambda: show(report, notes))
    sys.exit(report.exit_code)


def _refuse_before(context: click.Context) -> None:
    """An option before the name of another diff would go unheard."""
    heard = [
        name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if heard:
        option = "--" + heard[0].replace("_", "-")
        raise click.UsageError(
            f"{option} belongs to `mhabridge diff` itself; options of {context.invoked_subcommand} come after it."
        )


def _layer(options: dict[str, Any]) -> tuple[MHASpec, MHAWeights | None, list[str]]:
    """The spec and weights that the options describe, in the dtype that they ask for."""
    from mhabridge.spec import MHASpec

    if options["weights_file"]:
        return _from_checkpoint(options)
    _refuse_together("without --weights", options, ("prefix", "layout"))
    if options["spec_file"]:
        _refuse_together("together with --spec, which says it all", options, (*_FIELDS, "num_heads", "batch_first"))
        spec = MHASpec.from_json(_read(options["spec_file"]))
    else:
        names = ("kdim", "vdim", "add_bias_kv", "add_zero_attn", "batch_first")
        spec = MHASpec(
            64 if options["embed_dim"] is None else options["embed_dim"],
            8 if options["num_heads"] is None else options["num_heads"],
            bias=not options["no_bias"],
            **{name: options[name] for name in names},
        )
    return (spec.replace(dtype=options["dtype"]) if options["dtype"] else spec), None, []


def _from_checkpoint(options: dict[str, Any]) -> tuple[MHASpec, MHAWeights | None, list[str]]:
    from mhabridge.checkpoint import read_attention

    flags = ("no_bias", "add_bias_kv", "add_zero_attn", "spec_file")
    _refuse_together("together with --weights, which says it", options, flags)
    # Sizes that a packed vector's length does not say; for other layouts they must agree with the file.
    known = {name: options[name] for name in ("embed_dim", "kdim", "vdim") if options[name] is not None}
    heads, layout = options["num_heads"], options["layout"]
    spec, weights, notes = read_attention(options["weights_file"], options["prefix"], heads, layout, **known)
    spec = spec.replace(batch_first=options["batch_first"])
    if options["dtype"]:
        spec = spec.replace(dtype=options["dtype"])
        weights = weights.astype(options["dtype"])
    return spec, weights, list(notes)


_FIELDS = ("embed_dim", "kdim", "vdim", "no_bias", "add_bias_kv", "add_zero_attn")


def _refuse_together(given: str, options: dict[str, Any], names: tuple[str, ...]) -> None:
    from mhabridge.errors import ArgumentError

    clash = [f"--{name.removesuffix('_file').replace('_', '-')}" for name in names if options[name]]
    if clash:
        raise ArgumentError(", ".join(clash), given=given, expected="one or the other", advice="Leave it away.")


def _read(path: str) -> str:
    from mhabridge.errors import CheckpointError

    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(path, given=str(error), expected="a readable JSON file") from error


def show(report: DiffReport, notes: list[str]) -> None:
    """Print the report as a table, with the worst pair, every reason and every diagnosis below it."""
    from mhabridge.cli.tables import VERDICTS, print_table

    rows = []
    for run in report.runs:
        entries = [entry for entry in report.entries if entry.backend == run.backend]
        rows += [_row(run, entry) for entry in entries]
        if not entries:
            rows.append([run.backend, run.version, run.where, *[""] * 8, run.status])
    spec = report.spec
    layer = f"E={spec.embed_dim} H={spec.num_heads} " if spec else ""
    print_table(_columns(), rows, title=f"{layer}{report.dtype}, against the float64 reference", styles=VERDICTS)
    for line in _words(report, notes):
        click.echo(line)


def _columns() -> list[Column]:
    from mhabridge.cli.tables import Column

    return [
        Column("backend"),
        Column("version", drop=2),
        Column("where", drop=3),
        Column("native", drop=1),
        Column("tensor"),
        Column("max error", "right"),
        Column("mean error", "right", drop=5),
        Column("max relative", "right", drop=7),
        Column("cosine", "right", drop=6),
        Column("of bound", "right"),
        Column("worst at", drop=4),
        Column("verdict"),
    ]


def _row(run: Run, entry: Entry) -> list[str]:
    distance, comparison = entry.distance, entry.comparison
    return [
        run.backend,
        run.version,
        run.where,
        "yes" if run.native else "no",
        entry.tensor,
        f"{distance.max_error:.2e}",
        f"{distance.mean_error:.2e}",
        f"{comparison.max_rel:.1e}",
        f"{comparison.cosine:.6f}",
        f"{100 * max(distance.times_bound, distance.times_mean_bound):.0f} %",
        str(distance.index),
        comparison.verdict,
    ]


def _words(report: DiffReport, notes: list[str]) -> list[str]:
    lines = []
    if report.worst_pair:
        lines.append(f"worst pair: {_pair_in_words(report.worst_pair)}")
    lines += [f"{entry.backend} {entry.tensor}: {entry.distance.reason}" for entry in report.entries if not entry.ok]
    lines += [f"{run.backend} {run.status}: {run.reason}" for run in report.runs if run.reason]
    lines += [f"{each.side}: {each.words}" for each in report.diagnoses]
    lines += [f"  mend: {fault.mend}" for each in report.diagnoses for fault in each.faults]
    lines += steps_in_words(report)
    return [*lines, *notes, "verdict: " + ("rounding explains every difference" if report.ok else "NOT ok")]


def _pair_in_words(pair: Entry) -> str:
    found = pair.comparison
    return (
        f"{pair.first} and {pair.second} differ by {found.max_abs:.2e} in {pair.tensor} "
        f"at {found.index} ({found.values[0]:.7g}, {found.values[1]:.7g})"
    )


def steps_in_words(report: DiffReport) -> list[str]:
    """One line for each two sides that were trained: where they part, or that they stay together."""
    lines = []
    for sides in dict.fromkeys((step.first, step.second) for step in report.steps):
        steps = [step for step in report.steps if (step.first, step.second) == sides]
        parted = next((step for step in steps if not step.explained), None)
        last = parted or steps[-1]
        found = f"part at step {last.step}" if parted else f"stay together over {len(steps)} steps"
        lines.append(
            f"trained, {sides[0]} and {sides[1]} {found}: {last.apart:.2e} apart, where one rounding of the weights "
            f"grows to {last.grown:.2e} ({last.tensor}: {last.times:.3g} times)"
        )
    return lines
