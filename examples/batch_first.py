"""Batch first: a layer of 4 heads and 16 features on a random batch, with a look at its numbers.

python examples/batch_first.py [BACKEND]
"""

from __future__ import annotations

import sys

import numpy as np

import mhabridge as mb

EMBED_DIM, NUM_HEADS = 16, 4
SEQUENCE, BATCH = 5, 2


def layer() -> tuple[mb.MHASpec, mb.MHAWeights]:
    spec = mb.MHASpec(EMBED_DIM, NUM_HEADS, batch_first=True)
    return spec, mb.MHAWeights.random(spec, seed=0)


def inputs() -> dict[str, np.ndarray]:
    """Three different tensors, uniform in [0, 1), (N, L, E)."""
    rng = np.random.default_rng(0)
    return {name: rng.random((BATCH, SEQUENCE, EMBED_DIM), "float32") for name in ("query", "key", "value")}


def main(name: str) -> None:
    result = mb.backend(name).run(*layer(), **inputs())
    print("output:", result.output.shape)
    print("attention weights:", result.attn_weights.shape)
    print("first two rows of the output, four features:\n", result.output[0, :2, :4])
    print("first two rows of the weights:\n", result.attn_weights[0, :2])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "torch")
