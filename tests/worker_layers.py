"""What tests/test_checkpoint_modules.py has a framework do, here or in a worker (Python 3.8 too).

Real layers save and load their state with the framework's own functions.
"""

from __future__ import annotations

import warnings

import numpy as np

# Every layer by name: its constructor in PyTorch's terms, the shape of an input, and the kind of mappings/ that it is.
CASES = {
    "linear": ("linear", (5, 5), {}, (3, 5)),
    "linear without bias": ("linear", (5, 4), {"bias": False}, (3, 5)),
    "embedding": ("embedding", (6, 4), {}, (3, 2)),
    "layer norm": ("layer_norm", (5,), {}, (3, 5)),
    "group norm": ("group_norm", (2, 4), {}, (3, 4, 5, 5)),
    "batch norm 1d": ("batch_norm1d", (4,), {}, (3, 4)),
    "batch norm 2d": ("batch_norm2d", (4,), {}, (3, 4, 5, 5)),
    "conv1d": ("conv1d", (4, 4, 3), {}, (2, 4, 6)),
    "conv1d without bias": ("conv1d", (6, 4, 3), {"bias": False}, (2, 6, 6)),
    "grouped conv1d": ("conv1d", (6, 4, 3), {"groups": 2}, (2, 6, 6)),
    "conv2d": ("conv2d", (4, 4, (3, 2)), {}, (2, 4, 6, 6)),
    "conv2d without bias": ("conv2d", (6, 4, (3, 2)), {"bias": False}, (2, 6, 6, 6)),
    "conv2d of one pixel": ("conv2d", (4, 4, 1), {"bias": False}, (2, 4, 6, 6)),
    "grouped conv2d": ("conv2d", (6, 4, (3, 2)), {"groups": 2}, (2, 6, 6, 6)),
    "grouped conv2d without bias": ("conv2d", (6, 4, 3), {"groups": 2, "bias": False}, (2, 6, 6, 6)),
    "depthwise conv2d": ("conv2d", (4, 4, 3), {"groups": 4}, (2, 4, 6, 6)),
    "conv3d": ("conv3d", (3, 4, (1, 2, 3)), {}, (2, 3, 4, 5, 6)),
    "conv3d without bias": ("conv3d", (3, 4, (1, 2, 3)), {"bias": False}, (2, 3, 4, 5, 6)),
    "grouped conv3d": ("conv3d", (4, 6, (1, 2, 3)), {"groups": 2}, (2, 4, 4, 5, 6)),
    "transposed conv1d": ("conv_transpose1d", (6, 4, 3), {}, (2, 6, 5)),
    "transposed conv3d": ("conv_transpose3d", (3, 4, (1, 2, 3)), {}, (2, 3, 4, 5, 6)),
    "transposed conv2d": ("conv_transpose2d", (6, 4, (3, 2)), {}, (2, 6, 5, 5)),
    "prelu": ("prelu", (4,), {}, (2, 4, 3, 3)),
    "prelu of one": ("prelu", (1,), {}, (2, 4, 3, 3)),
}
PATH = "layer"


NAMES = {
    "linear": "Linear",
    "embedding": "Embedding",
    "layer_norm": "LayerNorm",
    "group_norm": "GroupNorm",
    "batch_norm1d": "BatchNorm1d",
    "batch_norm2d": "BatchNorm2d",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "conv_transpose1d": "ConvTranspose1d",
    "conv_transpose2d": "ConvTranspose2d",
    "conv_transpose3d": "ConvTranspose3d",
    "prelu": "PReLU",
}


def like_torch(module, name, args, kwargs):
    return getattr(module, NAMES[name])(*args, **kwargs)


def of_mindspore(name, args, kwargs):
    from mindspore import nn

    if name == "layer_norm":
        return nn.LayerNorm(args, epsilon=1e-5)
    names = {**NAMES, "linear": "Dense", **{f"conv_transpose{n}d": f"Conv{n}dTranspose" for n in (1, 2, 3)}}
    given = {"bias": "has_bias", "groups": "group"}
    more = {given[key]: value for key, value in kwargs.items()}
    if name.startswith("conv"):
        more = {"has_bias": True, "pad_mode": "valid", **more}
    return getattr(nn, names[name])(*args, **more)


def of_mint(name, args, kwargs):
    from mindspore.mint import nn

    return like_torch(nn, name, args, kwargs)


def numbers(name, shape, dtype):
    """What a parameter is filled with: every one differs, and a variance is positive."""
    rng = np.random.default_rng(sum(map(ord, name)) + int(np.prod(shape)))
    values = rng.standard_normal(shape)
    return np.asarray(np.abs(values) + 0.5 if "var" in name else values, dtype)


class Torch:
    """A net of one layer in PyTorch."""

    def __init__(self, case):
        import torch

        self.torch = torch
        name, args, kwargs, self.shape = CASES[case]
        self.net = torch.nn.Sequential()
        self.net.add_module(PATH, like_torch(torch.nn, name, args, kwargs))
        self.net.eval()

    def fill(self):
        state = {name: numbers(name, value.shape, np.float32) for name, value in self.net.state_dict().items()}
        tensors = {name: self.torch.from_numpy(array) for name, array in state.items() if "num_batches" not in name}
        self.net.load_state_dict(tensors, strict=False)

    def save(self, file):
        self.torch.save(self.net.state_dict(), file)

    def load(self, file):
        self.net.load_state_dict(self.torch.load(file, weights_only=True), strict=True)

    def output(self):
        return self.net(self.torch.from_numpy(given(self.shape, self.net))).detach().numpy()


class MindSpore:
    """The same in MindSpore, of mindspore.nn or mindspore.mint.nn."""

    make = staticmethod(of_mindspore)

    def __init__(self, case):
        import mindspore

        self.mindspore = mindspore
        name, args, kwargs, self.shape = CASES[case]

        class Net(mindspore.nn.Cell):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def construct(self, x):
                return self.layer(x)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = Net(self.make(name, args, kwargs))
        self.net.set_train(False)

    def fill(self):
        for name, parameter in self.net.parameters_dict().items():
            if "num_batches" not in name:
                parameter.set_data(self.mindspore.Tensor(numbers(name, parameter.shape, np.float32)))

    def save(self, file):
        self.mindspore.save_checkpoint(self.net, str(file))

    def load(self, file):
        found = self.mindspore.load_checkpoint(str(file))
        wanted = {name: parameter.shape for name, parameter in self.net.parameters_dict().items()}
        # Its own strict load passes over shapes that differ by axes of length 1.
        uncounted = {name: shape for name, shape in wanted.items() if not name.endswith("num_batches_tracked")}
        assert {name: value.shape for name, value in found.items() if name in uncounted} == uncounted, (found, wanted)
        missing, unexpected = self.mindspore.load_param_into_net(self.net, found, strict_load=True)
        assert unexpected == []
        assert all(name.endswith("num_batches_tracked") for name in missing), missing

    def output(self):
        return self.net(self.mindspore.Tensor(given(self.shape, self.net))).asnumpy()


class Mint(MindSpore):
    """The same of mindspore.mint.nn."""

    make = staticmethod(of_mint)

    def output(self):
        return None  # most of its layers have no kernel on a CPU (2.10)


class MegEngine:
    """The same in MegEngine."""

    def __init__(self, case):
        import megengine
        import megengine.module

        self.megengine = megengine
        name, args, kwargs, self.shape = CASES[case]

        class Net(megengine.module.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return self.layer(x)

        self.net = Net(like_torch(megengine.module, name, args, kwargs))
        self.net.eval()

    def fill(self):
        state = {name: numbers(name, value.shape, np.float32) for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(state)

    def save(self, file):
        self.megengine.save(self.net.state_dict(), file)

    def load(self, file):
        self.net.load_state_dict(self.megengine.load(file), strict=True)

    def output(self):
        if getattr(self.net.layer, "groups", 1) > 1 and type(self.net.layer).__name__ == "Conv1d":
            return None  # MegEngine 1.13 makes such a layer, and asserts in every call that its weight has 3 axes
        return self.net(self.megengine.tensor(given(self.shape, self.net))).numpy()


NETS = {"torch": Torch, "mindspore": MindSpore, "mindspore.mint": Mint, "megengine": MegEngine}


def given(shape, net):
    if "mbedding" in type(net[0] if hasattr(net, "__getitem__") else net.layer).__name__:
        return (np.arange(np.prod(shape)) % 6).reshape(shape).astype(np.int32)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def shapes(framework, payload):
    """The names and shapes of a real layer's state, without what goes before them."""
    net = NETS[payload["dialect"]](payload["case"]).net
    state = net.parameters_dict() if hasattr(net, "parameters_dict") else net.state_dict()
    return {"output": {name[len(PATH) + 1 :]: list(value.shape) for name, value in state.items()}}


def save(framework, payload):
    """A layer with other numbers in each of its parameters, saved; what it answers."""
    net = NETS[payload["dialect"]](payload["case"])
    net.fill()
    net.save(payload["file"])
    return {"output": net.output()}


def load(framework, payload):
    """What a new layer answers that has loaded a file, strictly."""
    net = NETS[payload["dialect"]](payload["case"])
    net.load(payload["file"])
    return {"output": net.output()}
