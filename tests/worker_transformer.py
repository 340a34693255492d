"""What tests/test_transformer.py has a framework do, here or in a worker: arrays in, arrays out (Python 3.8 too)."""

from __future__ import annotations

import importlib
import warnings

import numpy as np

from mhabridge.transformer import TransformerSpec
from mhabridge.transformer_weights import TransformerWeights


def adapter_of(framework):
    return importlib.import_module("mhabridge.adapters." + framework)


def build(payload):
    module = adapter_of(payload["framework"])
    spec, weights = TransformerSpec(**payload["spec"]), TransformerWeights.from_tree(payload["weights"])
    layer = module.transformer.build(spec, weights, mode="composed" if payload["composed"] else "auto")
    return module, layer


def tensor(framework, array):
    if array is None:
        return None
    array = np.ascontiguousarray(array)
    if framework == "torch":
        import torch

        return torch.from_numpy(np.array(array))
    if framework == "mindspore":
        import mindspore

        return mindspore.Tensor(array)
    import megengine

    return megengine.tensor(array)


def evaluate(framework, layer):
    if framework == "mindspore":
        layer.set_train(False)
    else:
        layer.eval()


def forward(framework, payload):
    """The output in evaluation, the spec and the weights that come back."""
    module, layer = build(payload)
    evaluate(framework, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's stacks do not want masks of different kinds any more
        output = layer(*[tensor(framework, array) for array in payload["inputs"]])
    spec, weights = module.transformer.extract(layer)
    return {"output": module.OPS.numpy(output), "spec": spec.to_dict(), "weights": weights.to_tree()}


def train(framework, payload):
    """MegEngine's gradients of sum(output * seed), in training mode, for the first input and for the parameters."""
    import megengine
    from megengine.autodiff import GradManager

    module, layer = build(payload)
    layer.train(True)
    inputs = [tensor("megengine", array) for array in payload["inputs"]]
    parameters = dict(layer.named_parameters())
    manager = GradManager()
    manager.attach([inputs[0], *parameters.values()])
    with manager:
        output = layer(*inputs)
        manager.backward((output * megengine.tensor(payload["seed"])).sum())
    spec, _ = module.transformer.extract(layer)
    named = {name: np.array(parameter.grad.numpy()) for name, parameter in parameters.items()}
    grads = TransformerWeights.from_layout("megengine", named, spec)
    return {"input": np.array(inputs[0].grad.numpy()), "grads": grads.to_tree()}


def call_twice(framework, payload):
    """A deep copy, a state dict to and fro, and a traced call: three outputs that must be equal."""
    import copy

    import megengine
    from megengine.jit import trace

    module, layer = build(payload)
    layer.eval()
    inputs = [tensor("megengine", array) for array in payload["inputs"]]
    spec, _ = module.transformer.extract(layer)
    other = module.transformer.build(spec)
    other.eval()
    other.load_state_dict(layer.state_dict())
    traced = trace(symbolic=True)(lambda *tensors: layer(*tensors))
    found = [layer(*inputs), copy.deepcopy(layer)(*inputs), other(*inputs), traced(*inputs), traced(*inputs)]
    assert isinstance(layer, megengine.module.Module)
    return {"outputs": [np.array(output.numpy()) for output in found], "text": repr(layer)}


def wrong_inputs(framework, payload):
    """What wrong inputs of layers whose norm comes first say, and that MegEngine is well afterwards."""
    import megengine
    from mhabridge.adapters.megengine import TransformerDecoderLayer, TransformerEncoderLayer

    from mhabridge.errors import MHABridgeError

    encoder, decoder = (kind(8, 2, 8, norm_first=True) for kind in (TransformerEncoderLayer, TransformerDecoderLayer))
    right, wrong = (megengine.tensor(np.ones((2, 3, features), np.float32)) for features in (8, 4))
    calls = {
        "features": lambda: encoder(wrong),
        "memory": lambda: decoder(right, wrong),
        "array": lambda: encoder(right.numpy()),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except MHABridgeError as error:
            found[name] = str(error)
    found["after"] = list(encoder(megengine.functional.ones((3, 2, 8))).numpy().shape)
    return found
