"""Three tokens of four features that attend to each other with two heads: small enough to follow by hand.

    python examples/three_tokens.py [BACKEND]

The inputs are large, so the weights come out sharp; each row of them adds up to 1.
"""

from __future__ import annotations

import sys

import numpy as np

import mhabridge as mb

TOKENS = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], [7.0, 8.0, 9.0, 10.0]]


def layer() -> tuple[mb.MHASpec, mb.MHAWeights]:
    spec = mb.MHASpec(embed_dim=4, num_heads=2)
    return spec, mb.MHAWeights.random(spec, seed=0)


def inputs() -> dict[str, np.ndarray]:
    """The tokens as query, key and value, (L, N, E) with a batch of one."""
    tokens = np.array(TOKENS, "float32")[:, None]
    return {"query": tokens, "key": tokens, "value": tokens}


def main(name: str) -> None:
    result = mb.backend(name).run(*layer(), **inputs())
    print("output:", result.output.shape)
    print(result.output)
    print("attention weights:", result.attn_weights.shape)
    print(result.attn_weights)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "torch")
