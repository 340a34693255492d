"""Twenty steps of training from the same weights on the same data stay together on every framework."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge import MHASpec, MHAWeights, backend, backends, build
from mhabridge.backends import shipping
from mhabridge.backends.worker import Worker
from mhabridge.diff.inputs import random_inputs
from tests.conftest import _ready as ready

pytestmark = pytest.mark.frameworks

STEPS, RATE = 20, 0.05
SPEC = MHASpec(16, 4, batch_first=True)


def sgd(state: dict[str, Any], name: str, grad: np.ndarray) -> np.ndarray:
    return RATE * grad


def adam(state: dict[str, Any], name: str, grad: np.ndarray, epsilon: float = 1e-8) -> np.ndarray:
    """Kingma and Ba, 2015, with the usual constants."""
    m, v, t = state.get(name, (0.0, 0.0, 0))
    m, v, t = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2, t + 1
    state[name] = (m, v, t)
    return 0.1 * RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + epsilon)


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


# -- live layers and the frameworks' own optimisers --------------------------------------------------------------------


# MindSpore adds Adam's epsilon before it corrects for the first steps, which shows when it is 1e-8.
OPTIMISERS = {"SGD": (RATE, {}), "Adam": (0.1 * RATE, {"eps": 1e-12})}


def material() -> tuple[MHAWeights, np.ndarray, np.ndarray]:
    """Weights, the input of a self-attention, and what it shall become."""
    x = random_inputs(SPEC, 5)["query"]
    return MHAWeights.random(SPEC, 3), x, np.random.default_rng(9).standard_normal(x.shape).astype(np.float32)


def train_torch(optimiser: str) -> list[np.ndarray]:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    weights, *arrays = material()
    layer = build(SPEC, "torch", weights, mode="composed")
    x, target = (torch.from_numpy(array) for array in arrays)
    rate, more = OPTIMISERS[optimiser]
    update = getattr(torch.optim, optimiser)(layer.parameters(), lr=rate, **more)
    outputs = []
    for _ in range(STEPS):
        output, _ = layer(x, x, x)
        outputs.append(output.detach().numpy())
        update.zero_grad()
        ((output - target) ** 2).mean().backward()
        update.step()
    return outputs


def train_mindspore(optimiser: str) -> list[np.ndarray]:
    ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    weights, *arrays = material()
    layer = build(SPEC, "mindspore", weights, mode="composed")
    x, target = (ms.Tensor(array) for array in arrays)
    rate, more = OPTIMISERS[optimiser]
    update = getattr(ms.nn, optimiser)(layer.trainable_params(), learning_rate=rate, **more)

    def loss(x: Any) -> Any:
        output, _ = layer(x, x, x)
        return ((output - target) ** 2).mean(), output

    step = ms.value_and_grad(loss, None, update.parameters, has_aux=True)
    outputs = []
    for _ in range(STEPS):
        (_, output), grads = step(x)
        outputs.append(output.asnumpy())
        update(grads)
    return outputs


def train_megengine(optimiser: str) -> list[np.ndarray]:
    ready("megengine")
    info = next(info for info in backends.backends() if info.name == "megengine")
    weights, x, target = material()
    modules = {
        "mhabridge.bridge": shipping.source("mhabridge.bridge"),
        "dropin": Path(__file__).with_name("worker_megengine.py").read_text(encoding="utf-8"),
    }
    worker = Worker(info.python, "megengine", extra_modules=modules)
    payload = {
        "spec": SPEC.to_dict(),
        "weights": weights.to_tree(),
        "optimiser": optimiser,
        "rate": OPTIMISERS[optimiser][0],
        "more": OPTIMISERS[optimiser][1],
        "steps": STEPS,
        "x": x,
        "target": target,
    }
    found: list[np.ndarray] = worker.call("dropin:train_alone", payload, timeout=100)
    worker.close()
    return found


def exact_training(optimiser: str, nudge: bool = False) -> list[np.ndarray]:
    """The same in float64, by the reference; with a nudge from weights that are one unit in the last place off."""
    weights, x, target = material()
    arrays = {name: array.astype(np.float64) for name, array in weights.arrays().items()}
    if nudge:
        arrays = {name: np.nextafter(array, np.float32(np.inf)) for name, array in weights.arrays().items()}
    x, target = x.astype(np.float64), target.astype(np.float64)
    state: dict[str, Any] = {}
    outputs = []
    for _ in range(STEPS):
        held = MHAWeights(**{name: array.astype(np.float64) for name, array in arrays.items()})
        run = functools.partial(backend("numpy").run, SPEC.replace(dtype="float64"), held, x, x, x)
        outputs.append(run().output)
        grads = run(grad_output=2 * (outputs[-1] - target) / target.size).grads
        update = sgd if optimiser == "SGD" else functools.partial(adam, epsilon=1e-12)
        arrays = {name: array - update(state, name, grads[name]) for name, array in arrays.items()}
    return outputs


@pytest.mark.parametrize("optimiser", ["SGD", "Adam"])
@pytest.mark.parametrize("trained", [train_torch, train_mindspore, train_megengine])
def test_drop_ins_and_their_own_optimisers_stay_together(trained: Any, optimiser: str) -> None:
    exact, moved = exact_training(optimiser), exact_training(optimiser, nudge=True)
    found = trained(optimiser)
    assert len(found) == STEPS
    for step in range(STEPS):
        grown = float(np.abs(moved[step] - exact[step]).max())
        apart = float(np.abs(found[step] - exact[step]).max())
        assert apart <= 20 * grown + 1e-6, (step, apart, grown)
    assert float(np.abs(exact[-1] - exact[0]).max()) > 0.05  # something was learnt
