"""The same small layer in several frameworks, sequence first: PyTorch, MindSpore, MegEngine, side by side.

    python examples/side_by_side.py [BACKEND ...]

One layer (128 features, 8 heads), one set of weights, one input; every backend gives outputs and weights of the same
shapes, and the same numbers up to rounding.
"""

from __future__ import annotations

import sys

import numpy as np

import mhabridge as mb

EMBED_DIM, NUM_HEADS = 128, 8
SEQUENCE, BATCH = 10, 8


def layer() -> tuple[mb.MHASpec, mb.MHAWeights]:
    spec = mb.MHASpec(EMBED_DIM, NUM_HEADS)
    return spec, mb.MHAWeights.random(spec, seed=0)


def inputs() -> dict[str, np.ndarray]:
    """Three different tensors, uniform in [0, 1), (L, N, E)."""
    rng = np.random.default_rng(0)
    return {name: rng.random((SEQUENCE, BATCH, EMBED_DIM), "float32") for name in ("query", "key", "value")}


def main(names: list[str]) -> int:
    spec, weights = layer()
    for name in names:
        result = mb.backend(name).run(spec, weights, **inputs())
        print(f"{name:<10} output {result.output.shape}, weights {result.attn_weights.shape}")
    report = mb.diff(spec, names, weights, inputs())
    print("the same, up to rounding" if report.ok else report.to_json())
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["torch", "mindspore", "megengine"]))
