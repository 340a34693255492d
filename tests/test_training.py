"""Twenty steps of training from the same weights on the same data stay together on every framework."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, backend
from mhabridge.diff.inputs import random_inputs

pytestmark = pytest.mark.frameworks

STEPS, RATE = 20, 0.05
SPEC = MHASpec(16, 4, batch_first=True)


def sgd(state: dict[str, Any], name: str, grad: np.ndarray) -> np.ndarray:
    return RATE * grad


def adam(state: dict[str, Any], name: str, grad: np.ndarray) -> np.ndarray:
    """Kingma and Ba, 2015, with the usual constants."""
    m, v, t = state.get(name, (0.0, 0.0, 0))
    m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, t + 1
    state[name] = (m, v, t)
    return 0.1 * RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


@functools.cache
def train(name: str, optimiser: Any, mode: str, nudge: float = 0.0) -> list[np.ndarray]:
    """The output after each step; every gradient is the backend's own, the update is the same NumPy for all."""
    weights = MHAWeights.random(SPEC, 3)
    if nudge:
        tree = {key: np.nextafter(array, np.float32(np.inf)) for key, array in weights.arrays().items()}
        weights = MHAWeights(**tree)
    inputs = tuple(random_inputs(SPEC, 5).values())
    target = np.random.default_rng(9).standard_normal((2, 5, 16)).astype(np.float32)
    state: dict[str, Any] = {}
    outputs = []
    for _ in range(STEPS):
        output = backend(name).run(SPEC, weights, *inputs, mode=mode).output.astype(np.float32)
        outputs.append(output)
        grads = (
            backend(name).run(SPEC, weights, *inputs, mode=mode, grad_output=2 * (output - target) / target.size).grads
        )
        moved = {
            key: (array - optimiser(state, key, grads[key].astype(np.float32))).astype(np.float32)
            for key, array in weights.arrays().items()
        }
        weights = MHAWeights(**moved)
    return outputs


@pytest.mark.parametrize("mode", ["auto", "composed"])
@pytest.mark.parametrize("optimiser", [sgd, adam])
def test_twenty_steps_stay_together(framework: str, optimiser: Any, mode: str) -> None:
    exact = train("numpy", optimiser, "auto")
    found = train(framework, optimiser, mode)
    # How far one unit in the last place of the first weights grows is what rounding may do over twenty steps.
    moved = train("numpy", optimiser, "auto", nudge=1.0)
    for step in range(STEPS):
        grown = float(np.abs(moved[step] - exact[step]).max())
        apart = float(np.abs(found[step] - exact[step]).max())
        assert apart <= 20 * grown + 1e-6, (step, apart, grown)
    assert float(np.abs(exact[-1] - exact[0]).max()) > 0.05  # something was learnt
