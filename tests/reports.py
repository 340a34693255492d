"""Reports to show: of every kind and verdict, small and large, made from real comparisons of made-up tensors."""

from __future__ import annotations

import math

import numpy as np

from mhabridge.diff.comparing import Comparison, compare
from mhabridge.diff.diagnosis import Diagnosis, Fault
from mhabridge.diff.judge import Distance, judge
from mhabridge.diff.pictures import picture
from mhabridge.diff.report import REFERENCE, DiffReport, Entry, Layer, Picture, Run, Step
from mhabridge.diff.rounding import Bound
from mhabridge.spec import MHASpec

HOSTILE = "<script>alert('named')</script>\u202e\x00\ud800</style>"
SIDES = ("torch.safetensors", "mindspore.safetensors")
TENSORS = ("query", "key", "value", "attn_mask", "output", "attn_weights")
EXACT = Distance("equal", max_error=0.0, mean_error=0.0, times_bound=0.0, times_mean_bound=0.0)
TRANSPOSED = Fault(
    "projection transposed",
    "out_weight",
    "out_weight arrived as its transpose: Y = X @ W was computed where Y = X @ Wᵀ was meant.",
    "out_proj.weight: transpose",
)


def attention(shape: tuple[int, ...], seed: int = 0, causal: bool = False) -> np.ndarray:
    """Weights that look like attention: near positions, and some that all look at; float64."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[-2:]
    scores = rng.standard_normal(shape) * 0.8 + 2.5 * (rng.random((*shape[:-2], 1, columns)) > 0.9)
    reach = rng.uniform(1, 9, (*shape[:-2], 1, 1))
    scores = scores + 4 * np.exp(-(((np.arange(rows)[:, None] - np.arange(columns)) / reach) ** 2))
    powers = np.exp(scores) * (np.tri(rows, columns) if causal else 1.0)
    return powers / powers.sum(-1, keepdims=True)


def run(name: str, version: str, where: str = "here", **environment: str) -> Run:
    notes = (f"native: {name}.nn.MultiheadAttention",) if name == "torch" else ()
    return Run(name, name, version, where, "answered", "", notes, {"python": "3.11.7", "device": "cpu", **environment})


RUNS = (
    run("torch", "2.13.0"),
    run("mindspore", "2.10.0"),
    run("megengine", "1.13.0", "worker", python="3.10.12"),
)


def answers_of(
    output: np.ndarray, weights: np.ndarray, number: int, faulty: bool, strange: str
) -> dict[str, np.ndarray]:
    """What one backend gives: rounding, and in the second one swapped heads, in the third NaN."""
    rng = np.random.default_rng(number)
    weights = (weights * (1 + 3e-8 * rng.standard_normal(weights.shape))).astype(np.float32)
    output = (output + 3e-8 * rng.standard_normal(output.shape)).astype(np.float32)
    if faulty and number == 1:
        weights[1, [0, -1]] = weights[1, [-1, 0]]
        weights[1, 0, 0] = weights[1, 0, 0, ::-1]
        output[1] += np.float32(0.01)
    if strange == "nan" and number == 2:
        weights[0, 0, 5:9, 2] = np.nan
    return {"output": output, "attn_weights": weights}


def of_backends(
    heads: int = 16, faulty: bool = True, size: int = 40, strange: str = "", average: bool = False
) -> DiffReport:
    """Six comparisons: three backends, output and weights."""
    weights = attention((2, heads, size, size))
    if strange == "masked":
        weights[:, :, 3] = np.nan
    output = np.random.default_rng(0).standard_normal((2, size, 64))
    given = [answers_of(output, weights, number, faulty, strange) for number in range(len(RUNS))]
    if average:
        weights, given = weights.mean(1), [{**each, "attn_weights": each["attn_weights"].mean(1)} for each in given]
    exact = {"output": output, "attn_weights": weights}
    answers = {each.backend: answer for each, answer in zip(RUNS, given, strict=True)}
    entries = [
        judged(tensor, name, exact[tensor], array) for name in answers for tensor, array in answers[name].items()
    ]
    pictures = [
        picture("", tensor, a, name, exact[tensor], answers[name][tensor], index=each.comparison.index)
        for each in entries
        for a, name, tensor in [(each.first, each.second, each.tensor)]
    ]
    words = f"Heads 0 and {heads - 1} are swapped: this explains the attention weights and the output to rounding."
    swapped = Fault("heads permuted", "in_proj", "two heads changed places.", f"heads: swap 0 and {heads - 1}")
    return DiffReport(
        RUNS,
        tuple(entries),
        pairs=tuple(beside(entries, answers, exact)),
        diagnoses=(Diagnosis("", "mindspore", (swapped,), "certain", (), 0.31, 214, words),) if faulty else (),
        pictures=tuple(pictures),
        spec=MHASpec(64, heads),
        seed=7,
        dtype="float32",
    )


def judged(tensor: str, backend: str, exact: np.ndarray, array: np.ndarray) -> Entry:
    """An entry beside the reference."""
    distance = judge(array, exact, Bound(np.full(exact.shape, 3e-7), 1e-7))
    found = compare(exact.astype(array.dtype), array, distances=(EXACT, distance), allowed=np.isnan(exact))
    return Entry("", tensor, REFERENCE, backend, found)


def beside(
    entries: list[Entry], answers: dict[str, dict[str, np.ndarray]], exact: dict[str, np.ndarray]
) -> list[Entry]:
    """Each two backends beside each other."""
    known = {(entry.second, entry.tensor): entry.comparison.distances[1] for entry in entries}
    return [
        Entry("", tensor, a, b, compare(answers[a][tensor], answers[b][tensor],
              distances=(known[a, tensor], known[b, tensor]), allowed=np.isnan(exact[tensor])))
        for a, b in (("torch", "mindspore"), ("mindspore", "megengine"), ("torch", "megengine"))
        for tensor in exact
    ]  # fmt: skip


def tensors_of(tensor: str, number: int, layers: int, faulty: bool) -> tuple[np.ndarray, np.ndarray]:
    """What both sides recorded: one rolled output at three quarters of the depth, one NaN near the end."""
    rng = np.random.default_rng([1, number])
    exact = attention((1, 4, 24, 24), number, True) if tensor == "attn_weights" else rng.standard_normal((1, 24, 32))
    rounding = 3e-8 * rng.standard_normal(exact.shape) if tensor not in ("attn_mask", "key") else 0.0
    first, second = exact.astype(np.float32), (exact + rounding).astype(np.float32)
    if faulty and number == layers * 3 // 4 and tensor in ("output", "attn_weights"):
        second = np.ascontiguousarray(np.roll(second, 1, axis=-1))
    if faulty and number == layers - 2 and tensor == "value":
        second[0, 3, 4] = np.nan
    return first, second


def of_recordings(layers: int = 100, faulty: bool = True, names: str = "encoder.layers.{}.self_attn") -> DiffReport:
    """Six comparisons in each layer; from three quarters of the depth on the second side is off."""
    entries: list[Entry] = []
    pictures: list[Picture] = []
    for number in range(layers):
        name = names.format(number)
        for tensor in TENSORS:
            first, second = tensors_of(tensor, number, layers, faulty)
            entries.append(Entry(name, tensor, *SIDES, compare(first, second, justified=2e-6)))
            if tensor == "attn_weights" or not entries[-1].ok:
                pictures.append(picture(name, tensor, *SIDES, first, second))
    divergence = names.format(layers * 3 // 4) if faulty else None
    words = "The output projection was applied transposed; nothing before it differs."
    missing = Fault("bias missing", "out_bias", "out_bias was not added.", "out_proj.bias: add")
    diagnosis = Diagnosis(str(divergence), SIDES[1], (TRANSPOSED,), "likely", ((missing, TRANSPOSED),), 0.6, 388, words)
    runs = (
        Run(SIDES[0], "torch", "2.13.0", "", "answered", "", (), {"python": "3.11.7", "device": "cuda:0"}),
        Run(SIDES[1], "mindspore", "2.10.0", "", "answered", "", ("broke off",), {"python": "3.11.7", "device": "cpu"}),
    )
    return DiffReport(
        runs,
        tuple(entries),
        "recordings",
        layers=tuple(
            Layer(names.format(number), names.format(number).replace("self_attn", "attention"), "Attention", "rule")
            for number in range(layers)
        ),
        diagnoses=(diagnosis,) if faulty else (),
        pictures=tuple(pictures),
        first_divergence=divergence,
        notes=("The first side's inputs were fed to the second side's layers.",),
    )


def of_training(parts: int | None = 17, steps: int = 30) -> DiffReport:
    """Two trainings that part at a step, or never."""
    made = []
    for step in range(steps):
        explained = parts is None or step < parts
        grown = 2e-8 * 1.25**step
        apart = grown * (0.7 if explained else 3.0 ** (step - (parts or 0) + 2))
        made.append(Step(step, "in_proj_weight", "torch", "mindspore", apart, grown, apart / grown, explained))
    base = of_backends(2, faulty=False, size=8)
    return DiffReport(base.runs[:2], base.entries[:4], pictures=base.pictures, steps=tuple(made), dtype="float32")


def of_hostile() -> DiffReport:
    """Markup, control characters, infinities and long texts wherever a file's words can come to stand."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    long = "b" * 100_000
    reason = f"because <img src=x onerror=alert(1)> {HOSTILE}"
    shapes = ((2, 3), (2, 3))
    found = Comparison(
        "off", "second", reason, shapes, (HOSTILE, "float32"), 1.0, 0.5, math.inf, 0.1, 0.2, (0, 1), (math.inf, 1.0),
        (None, Distance("off", HOSTILE, 1.0, 1.0, math.inf, math.nan, bound=0.0)),
    )  # fmt: skip
    fault = Fault(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    side = Run(HOSTILE, HOSTILE, HOSTILE, "", "failed", f"reason {HOSTILE}", (HOSTILE,), {HOSTILE: HOSTILE})
    return DiffReport(
        (side, side),
        (Entry(HOSTILE, HOSTILE, HOSTILE, long, found),),
        "recordings",
        layers=(Layer(HOSTILE, HOSTILE + "2", HOSTILE, "order", (f"note {HOSTILE}",)),),
        diagnoses=(Diagnosis(HOSTILE, HOSTILE, (fault,), HOSTILE, ((fault,),), 0.1, 3, HOSTILE),),
        pictures=(picture(HOSTILE, HOSTILE, HOSTILE, long, array, array + 1),),
        steps=(Step(0, HOSTILE, HOSTILE, HOSTILE, 1.0, 1e-8, 1e8, False),),
        first_divergence=HOSTILE,
        notes=(HOSTILE,),
    )
