"""What tests/test_checkpoint_convert.py has a framework do, here or in a worker (Python 3.8 too).

One model is written in each of them, and saves and loads its state with the framework's own functions.
"""

from __future__ import annotations

import warnings

import numpy as np

E, HEADS, WORDS = 12, 3, 7
TOKENS = np.array([[1, 4, 2, 6, 0], [3, 3, 5, 1, 2]], np.int32)
IMAGES = np.random.default_rng(3).standard_normal((2, 3, 6, 6)).astype(np.float32)


def torch_net():
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(WORDS, E)
            self.stem_conv = nn.Conv2d(3, E, 3)
            self.bn = nn.BatchNorm2d(E)
            self.dw = nn.Conv2d(E, E, 3, groups=E)
            self.act = nn.PReLU(E)
            layer = nn.TransformerEncoderLayer(E, HEADS, E, 0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False)
            self.head = nn.Linear(E, WORDS, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens, images):
            seen = self.act(self.dw(self.bn(self.stem_conv(images)))).mean((2, 3))
            return self.head(self.encoder(self.embed(tokens) + seen[:, None]))

    return torch, Net()


def mindspore_net():
    import mindspore
    from mindspore import nn

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(WORDS, E)
            self.stem_conv = nn.Conv2d(3, E, 3, pad_mode="valid", has_bias=True)
            self.bn = nn.BatchNorm2d(E)
            self.dw = nn.Conv2d(E, E, 3, pad_mode="valid", has_bias=True, group=E)
            self.act = nn.PReLU(E)
            layer = nn.TransformerEncoderLayer(E, HEADS, E, 0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm((E,), epsilon=1e-5))
            self.head = nn.Dense(E, WORDS, has_bias=False)

        def construct(self, tokens, images):
            seen = self.act(self.dw(self.bn(self.stem_conv(images)))).mean((2, 3))
            return self.head(self.encoder(self.embed(tokens) + seen.expand_dims(1)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mindspore, Net()


def megengine_net():
    import megengine
    import megengine.functional as functional
    import megengine.module as module
    from mhabridge.adapters.megengine import TransformerEncoder, TransformerEncoderLayer

    class Net(module.Module):
        def __init__(self):
            super().__init__()
            self.embed = module.Embedding(WORDS, E)
            self.stem_conv = module.Conv2d(3, E, 3)
            self.bn = module.BatchNorm2d(E)
            self.dw = module.Conv2d(E, E, 3, groups=E)
            self.act = module.PReLU(E)
            layer = TransformerEncoderLayer(E, HEADS, E, 0.0, batch_first=True)
            self.encoder = TransformerEncoder(layer, 2, module.LayerNorm((E,)))
            self.head = module.Linear(E, WORDS, bias=False)

        def forward(self, tokens, images):
            seen = self.act(self.dw(self.bn(self.stem_conv(images)))).mean(axis=(2, 3))
            return self.head(self.encoder(self.embed(tokens) + functional.expand_dims(seen, 1)))

    return megengine, Net()


NETS = {"torch": torch_net, "mindspore": mindspore_net, "megengine": megengine_net}


def numbers(name, shape):
    """What a parameter is filled with: no square weight is symmetric, and a variance is positive."""
    values = np.random.default_rng(sum(map(ord, name))).standard_normal(shape)
    return np.asarray(np.abs(values) + 0.5 if "var" in name else values * 0.5, np.float32)


def make(framework):
    library, net = NETS[framework]()
    if framework == "mindspore":
        net.set_train(False)
    else:
        net.eval()
    return library, net


def state_of(framework, net):
    return net.parameters_dict() if framework == "mindspore" else net.state_dict()


def save(framework, payload):
    """A model with numbers of its own in every parameter, saved; what it answers."""
    library, net = make(framework)
    values = {name: numbers(name, value.shape) for name, value in state_of(framework, net).items()}
    values = {name: array for name, array in values.items() if "num_batches" not in name}
    # The head has the embedding's numbers, whether the framework ties them or not.
    values["head.weight"] = next(array for name, array in values.items() if name.startswith("embed."))
    if framework == "torch":
        net.load_state_dict({name: library.from_numpy(array) for name, array in values.items()}, strict=False)
        library.save(net.state_dict(), payload["file"])
    elif framework == "mindspore":
        for name, parameter in net.parameters_dict().items():
            parameter.set_data(library.Tensor(values[name]))
        library.save_checkpoint(net, payload["file"])
    else:
        net.load_state_dict(values)
        library.save(net.state_dict(), payload["file"])
    return {"output": answer(framework, library, net)}


def load(framework, payload):
    """What a new model answers that has loaded a file, strictly."""
    library, net = make(framework)
    if framework == "torch":
        net.load_state_dict(library.load(payload["file"], weights_only=True), strict=True)
    elif framework == "mindspore":
        left = library.load_param_into_net(net, library.load_checkpoint(payload["file"]), strict_load=True)
        assert left == ([], []), left
    else:
        net.load_state_dict(library.load(payload["file"]), strict=True)
    return {"output": answer(framework, library, net)}


def answer(framework, library, net):
    if framework == "torch":
        with library.no_grad():
            return net(library.from_numpy(TOKENS), library.from_numpy(IMAGES)).numpy()
    if framework == "mindspore":
        return net(library.Tensor(TOKENS), library.Tensor(IMAGES)).asnumpy()
    return net(library.tensor(TOKENS), library.tensor(IMAGES)).numpy()
