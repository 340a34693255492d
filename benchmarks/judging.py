"""How much of the judge's bounds honest frameworks use: the largest part of each bound, over many layers and calls.

A ratio near 1 would mean false alarms; a ratio of a hundredth would mean a judge that sees little.
"""

from __future__ import annotations

import sys

import numpy as np

import mhabridge as mb
from mhabridge.diff.inputs import random_inputs, random_masks
from mhabridge.mapping import FRAMEWORKS

LAYERS = [
    mb.MHASpec(16, 4),
    mb.MHASpec(64, 8, kdim=24, vdim=40),
    mb.MHASpec(64, 1, k_bias=False),
    mb.MHASpec(256, 8, bias=False),
    mb.MHASpec(8, 2, batch_first=True),
]
SIZES = [(2, 5, 7), (1, 1, 4), (1, 16, 24)]
SCALES = [1.0, 5.0]
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def used(framework: str, dtype: str, grads: bool) -> tuple[float, float, int] | None:
    """The largest part of the element's and of the mean's bound, and over how many tensors; None when refused."""
    each, mean, count = 0.0, 0.0, 0
    for seed, layer in enumerate(LAYERS):
        spec = layer.replace(dtype=dtype)
        for batch, target, source in SIZES:
            sizes = {"batch": batch, "target": target, "source": source}
            for scale in SCALES:
                inputs = {
                    name: np.asarray(a * scale).astype(a.dtype)
                    for name, a in random_inputs(spec, seed, **sizes).items()
                }
                for masks in ("none", "padding+causal"):
                    call = random_masks(masks, spec, seed, **sizes)
                    report = mb.diff(spec, [framework], inputs=inputs, seed=seed, grads=grads, **call)
                    if any(run.status == "refused" for run in report.runs):
                        continue
                    distances = [entry.distance for entry in report.entries]
                    count += len(distances)
                    each = max(each, *(distance.times_bound for distance in distances))
                    mean = max(mean, *(distance.times_mean_bound for distance in distances))
    return (each, mean, count) if count else None


def main() -> int:
    frameworks = [name for name in FRAMEWORKS if any(info.name == name and info.ok for info in mb.backends())]
    print(f"{'dtype':<10} {'gradients':<10}" + "".join(f"{name:>22}" for name in frameworks))
    worst = 0.0
    for grads in (False, True):
        for dtype in DTYPES:
            cells = []
            for name in frameworks:
                found = used(name, dtype, grads)
                cells.append("refused" if found is None else f"{found[0]:.0%}, {found[1]:.0%} of {found[2]}")
                worst = max(worst, 0.0 if found is None else max(found[:2]))
            print(
                f"{dtype:<10} {'with' if grads else 'without':<10}" + "".join(f"{cell:>22}" for cell in cells),
                flush=True,
            )
    print(f"largest part of a bound: {worst:.0%} (limit 100 %)")
    return 0 if worst <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
