"""A real checkpoint in each framework's file format and layout, and back: all-MiniLM-L6-v2, with nothing lost.

    python examples/checkpoints.py [FOLDER]

Each conversion is verified by mhabridge; the fingerprints are equal; the way back gives the very tensors of the start.
Then each framework loads its file with its own functions (examples/load_attention.py, in an interpreter of its own),
and runs the attention layers on a real sentence's hidden states, judged against float64. Exit code 0 when all is so.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from minilm import SENTENCES, Encoder, model_folder, tokenise

import mhabridge as mb
from mhabridge import reference
from mhabridge.backends.running import prepare, restore
from mhabridge.checkpoint import open_tensors
from mhabridge.cli.tables import VERDICTS, Column, print_table
from mhabridge.diff import Distance, judge
from mhabridge.diff.rounding import accuracy, bounds, named

# framework -> its file; each is made from the one before it, and the first from the original
WAY = {"torch": "minilm.pth", "mindspore": "minilm.ckpt", "megengine": "minilm.pkl"}
LOADER = pathlib.Path(__file__).parent / "load_attention.py"


def convert(source: pathlib.Path, folder: pathlib.Path) -> list[tuple[str, mb.ConversionReport]]:
    """There and back: each framework in turn, then the original's layout and names."""
    reports = []
    for framework, name in WAY.items():
        reports.append((framework, mb.convert_checkpoint(source, folder / name, to=framework)))
        source = folder / name
    back = mb.convert_checkpoint(source, folder / "back.safetensors", to="torch", layout="hf-bert")
    return [*reports, ("hf-bert", back)]


def show_files(source: pathlib.Path, reports: list[tuple[str, mb.ConversionReport]]) -> bool:
    """A row for each file; True when all were verified and have one fingerprint."""
    prints = [mb.fingerprint(source)]
    rows = [["hf-bert", source.name, "safetensors", str(prints[0].tensors), "", *_short(prints[0])]]
    for names, report in reports:
        assert report.target is not None
        prints.append(mb.fingerprint(report.target))
        count, verified = str(prints[-1].tensors), "every bit" if report.verified else "NO"
        rows.append(
            [names, pathlib.Path(report.target).name, report.target_format, count, verified, *_short(prints[-1])]
        )
    columns = [
        Column(name) for name in ("names of", "file", "format", "tensors", "verified", "attention", "all weights")
    ]
    columns[3] = Column("tensors", "right", drop=1)
    print_table(columns, rows, styles={"every bit": "green", "NO": "red"})
    verified = all(report.verified for _, report in reports)
    equal = len({(one.attention, one.all) for one in prints}) == 1
    print("fingerprints: " + ("all equal" if equal else "NOT equal"))
    return verified and equal


def _short(found: mb.Fingerprint) -> list[str]:
    return [found.attention[:12], found.all[:12]]


def same_tensors(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Whether two files have the same names, dtypes, shapes and bits."""
    with open_tensors(first) as a, open_tensors(second) as b:
        return sorted(a) == sorted(b) and all(
            a.dtype_names[name] == b.dtype_names[name] and a[name].tobytes() == b[name].tobytes() and
            a[name].shape == b[name].shape for name in a
        )  # fmt: skip


def ask(backend: mb.BackendInfo, checkpoint: pathlib.Path, questions: pathlib.Path) -> dict[str, np.ndarray]:
    """What the attention layers answer that the framework loaded from its file."""
    if not backend.ok:
        sys.exit(f"checkpoints: {backend.reason}")
    answers = questions.with_name(f"{backend.framework}.npz")
    command = [backend.python, str(LOADER), backend.framework, str(checkpoint), str(questions), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        sys.exit(f"checkpoints: {backend.name} could not load {checkpoint.name}:\n{done.stderr[-2000:]}")
    with np.load(answers) as found:
        return {name: found[name] for name in found.files}


def judged(
    encoder: Encoder, inputs: list[np.ndarray], answers: dict[str, np.ndarray], framework: str
) -> list[Distance]:
    """Each layer's answer, held against the float64 reference by what rounding justifies."""
    found = []
    for (spec, weights), x, answer in zip(encoder.layers, inputs, answers.values(), strict=True):
        prepared = prepare(spec, weights, x, x, x)
        exact = restore(prepared, reference.attend(spec, weights, prepared.call))
        limit = bounds(prepared, weights, named(exact), accuracy(framework, spec.dtype))["output"]
        found.append(judge(answer, exact.output, limit))
    return found


def layers_and_inputs(source: pathlib.Path) -> tuple[Encoder, list[np.ndarray]]:
    """The model around the original's attention layers, and what goes into each of them, (N, L, E)."""
    config = json.loads((source.parent / "config.json").read_text(encoding="utf-8"))
    ids, padding = tokenise(source.parent, SENTENCES[:1])
    with open_tensors(source) as tensors:
        encoder = Encoder(tensors, config, source)
        return encoder, list(encoder.hidden_states(ids, padding))


def questions_for(encoder: Encoder, inputs: list[np.ndarray], folder: pathlib.Path) -> pathlib.Path:
    """The file that load_attention.py reads."""
    path = folder / "questions.npz"
    named = {f"encoder.layer.{i}.attention": x for i, x in enumerate(inputs)}
    np.savez(path, num_heads=encoder.layers[0][0].num_heads, **named)
    return path


def show_answers(source: pathlib.Path, folder: pathlib.Path) -> bool:
    """A row for each framework, which loaded its file by itself; True when rounding explains every difference."""
    encoder, inputs = layers_and_inputs(source)
    questions = questions_for(encoder, inputs, folder)
    backends = {info.name: info for info in mb.backends()}
    rows = []
    for framework, name in WAY.items():
        found = judged(encoder, inputs, ask(backends[framework], folder / name, questions), framework)
        verdict = max((one.verdict for one in found), key=["equal", "rounding", "off", "broken"].index)
        worst = max(found, key=lambda one: one.times_bound)
        percent = f"{100 * worst.times_bound:.0f} %"
        rows.append([framework, name, str(len(found)), f"{worst.max_error:.1e}", percent, verdict])
    columns = [Column("loaded by"), Column("file"), Column("layers", "right"), Column("max error", "right")]
    print_table([*columns, Column("of bound", "right"), Column("verdict")], rows, styles=VERDICTS)
    return all(row[-1] in ("equal", "rounding") for row in rows)


def main(arguments: list[str]) -> int:
    source = model_folder() / "model.safetensors"
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments[0] if arguments else temporary)
        print("all-MiniLM-L6-v2: its checkpoint in each framework's format, and back")
        same = show_files(source, convert(source, folder))
        back = same_tensors(source, folder / "back.safetensors")
        print("back.safetensors: " + ("the original's tensors, bit for bit" if back else "NOT the original's tensors"))
        ran = show_answers(source, folder)
    print("each framework's own loader and layer: " + ("rounding explains every difference" if ran else "NOT ok"))
    return 0 if same and back and ran else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
