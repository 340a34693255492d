"""What tests/test_record.py has a framework do, here or in another interpreter with the record kit (Python 3.8 too).

Each scenario records into a folder and leaves there, in expected.npz, what the framework itself says it was.

As a script: python -I worker_record.py KIT FRAMEWORK SCENARIO FOLDER
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings

import numpy as np

E, H, N, L, S = 8, 2, 2, 3, 5
RNG = np.random.default_rng(0)
QUERY, MEMORY, WIDE = (RNG.standard_normal(shape).astype("f4") for shape in ((N, L, E), (N, S, E), (N, L, E)))
PADDING = np.array([[False] * S, [False] * 3 + [True] * 2])
MASK = np.triu(np.full((L, S), -np.inf, "f4"), 3)
SLOPE = RNG.standard_normal((N, L, E)).astype("f4")


class Torch:
    """The same net in each framework: two attentions of which one is called twice, and a linear map between them."""

    name = "torch"

    def __init__(self, seed=0):
        import torch

        self.fw = torch
        torch.manual_seed(seed)

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first = torch.nn.MultiheadAttention(E, H, batch_first=True)
                self.between = torch.nn.Linear(E, E)
                self.second = torch.nn.ModuleList([torch.nn.MultiheadAttention(E, H, batch_first=True)])

            def forward(self, x, memory, padding, mask):
                return chain(self, x, memory, padding, mask)

        self.net = Net().eval()

    def tensor(self, array):
        return self.fw.from_numpy(np.array(array))

    def array(self, tensor):
        return np.array(tensor.detach().numpy())

    def change(self, parameter):
        parameter.data.mul_(2.0)  # past the counter of versions

    def dropin(self):
        from mhabridge.adapters.torch import MultiheadAttention

        return MultiheadAttention(E, H, batch_first=True)

    def half(self):
        layer = self.fw.nn.MultiheadAttention(E, H, batch_first=True).to(self.fw.bfloat16)
        return layer, self.fw.from_numpy(QUERY).to(self.fw.bfloat16)

    def gradients(self, function, inputs, parameters):
        tensors = [tensor.requires_grad_() for tensor in inputs]
        function(*tensors).backward(self.tensor(SLOPE))
        return [self.array(tensor.grad) for tensor in [*tensors, *parameters]]

    def parameters(self, layer):
        return dict(layer.named_parameters())

    def train(self, on):
        self.net.train(on)


class MindSpore(Torch):
    name = "mindspore"

    def __init__(self, seed=0):
        import mindspore

        self.fw = mindspore
        mindspore.set_seed(seed + 1)

        class Net(mindspore.nn.Cell):
            def __init__(self):
                super().__init__()
                self.first = mindspore.nn.MultiheadAttention(E, H, batch_first=True)
                self.between = mindspore.nn.Dense(E, E)
                self.second = mindspore.nn.CellList([mindspore.nn.MultiheadAttention(E, H, batch_first=True)])

            def construct(self, x, memory, padding, mask):
                return chain(self, x, memory, padding, mask)

        self.net = Net().set_train(False)

    def tensor(self, array):
        return self.fw.Tensor(np.array(array))

    def array(self, tensor):
        return np.array(tensor.asnumpy())

    def change(self, parameter):
        parameter.set_data(parameter * 2.0)

    def dropin(self):
        from mhabridge.adapters.mindspore import MultiheadAttention

        return MultiheadAttention(E, H, batch_first=True)

    def half(self):
        layer = self.fw.nn.MultiheadAttention(E, H, batch_first=True, dtype=self.fw.float16)
        return layer, self.fw.Tensor(QUERY.astype("f2"))

    def gradients(self, function, inputs, parameters):
        def loss(*tensors):
            return (function(*tensors) * self.tensor(SLOPE)).sum()

        weights = self.fw.ParameterTuple(parameters)
        of_inputs, of_weights = self.fw.grad(loss, tuple(range(len(inputs))), weights)(*inputs)
        if len(inputs) == 1:
            of_inputs = [of_inputs]
        return [self.array(grad) for grad in (*of_inputs, *of_weights)]

    def parameters(self, layer):
        return {
            name: parameter
            for path, cell in layer.cells_and_names()
            for name, parameter in cell.parameters_and_names(name_prefix=path, expand=False)
        }

    def train(self, on):
        self.net.set_train(on)


class MegEngine(Torch):
    name = "megengine"

    def __init__(self, seed=0):
        import megengine
        import megengine.functional
        import megengine.module

        self.fw = megengine
        megengine.random.seed(seed)

        class Net(megengine.module.Module):
            def __init__(self):
                super().__init__()
                self.first = megengine.module.MultiHeadAttention(E, H)
                self.between = megengine.module.Linear(E, E)
                self.second = [megengine.module.MultiHeadAttention(E, H)]

            def forward(self, x, memory, padding, mask):
                return chain(self, x, memory, padding, mask)

        self.net = Net()
        self.train(False)

    def tensor(self, array):
        return self.fw.tensor(np.array(array))

    def array(self, tensor):
        return np.array(tensor.numpy())

    def change(self, parameter):
        parameter[:] = parameter * 2.0

    def dropin(self):
        from mhabridge.adapters.megengine import MultiheadAttention

        return MultiheadAttention(E, H, batch_first=True)

    def half(self):
        layer = self.fw.module.MultiHeadAttention(E, H)
        layer.io_weight_bias = self.fw.Parameter(layer.io_weight_bias.numpy().astype("f2"))
        return layer, self.fw.tensor(QUERY.astype("f2"))

    def gradients(self, function, inputs, parameters):
        from megengine.autodiff import GradManager

        manager = GradManager().attach([*inputs, *parameters])
        with manager:
            manager.backward(function(*inputs), self.tensor(SLOPE))
        return [self.array(tensor.grad) for tensor in [*inputs, *parameters]]

    def train(self, on):
        self.net.train(on)


KINDS = {kind.name: kind for kind in (Torch, MindSpore, MegEngine)}


def chain(net, x, memory, padding, mask):
    """What the nets compute; masks by name where the framework lets one."""
    attended, _ = net.first(x, memory, memory, padding, need_weights=True, attn_mask=mask)
    x = net.between(x + attended)
    for _ in range(2):
        x = x + net.second[0](x, x, x)[0]
    return x


def arguments(fw):
    """A bool padding mask where the framework's layer takes it beside a float mask, else a float one."""
    padding = PADDING if fw.name == "torch" else np.where(PADDING, np.float32(-np.inf), np.float32(0))
    mask = np.isinf(MASK) if fw.name == "torch" else MASK
    return [fw.tensor(array) for array in (QUERY, MEMORY, padding, mask)]


def plain(fw, record, folder):
    """What goes in and comes out, and that the model computes what it computes without a recorder."""
    given = arguments(fw)
    before = fw.array(fw.net(*given))
    with record(fw.net, folder / "a.safetensors", layers=["first", "second.*", "between"]) as recorder:
        after = fw.array(fw.net(*given))
    again = fw.array(fw.net(*given))
    output, weights = fw.net.first(given[0], given[1], given[1], given[2], need_weights=True, attn_mask=given[3])
    middle = fw.array(fw.net.between(given[0] + output))
    np.savez(
        folder / "expected.npz",
        before=before,
        after=after,
        again=again,
        padding=fw.array(given[2]),
        mask=fw.array(given[3]),
        output=fw.array(output),
        weights=fw.array(weights),
        middle=middle,
        calls=recorder.calls,
        **{f"first/{name}": fw.array(value) for name, value in fw.parameters(fw.net.first).items()},
    )


def trained(fw, record, folder):
    """Four runs, and one parameter that changes after the second."""
    name, parameter = next(iter(fw.parameters(fw.net.first).items()))
    with record(fw.net, folder / "a.safetensors"):
        for number in range(4):
            if number == 2:
                fw.change(parameter)
            answer = fw.net(*arguments(fw))
    np.savez(folder / "expected.npz", name=name, value=fw.array(parameter), answer=fw.array(answer))


def copied(fw, record, folder):
    """A copy of the net that is made meanwhile computes by itself, and is no call of the net."""
    import copy

    given = arguments(fw)
    with record(fw.net, folder / "a.safetensors"):
        before = fw.array(fw.net(*given))
        other = copy.deepcopy(fw.net)
        fw.change(next(iter(fw.parameters(other.first).values())))
        copied = fw.array(other(*given))
        after = fw.array(fw.net(*given))
    np.savez(folder / "expected.npz", before=before, copied=copied, after=after)


def half(fw, record, folder):
    """A layer of a half precision, which is the model itself."""
    layer, x = fw.half()
    with record(layer, folder / "a.safetensors"):
        output = layer(x, x, x)[0]
    single = output.float() if fw.name == "torch" else output.astype("float32")
    np.savez(folder / "expected.npz", output=fw.array(single))


def everything(fw, record, folder):
    """All layers, with the net itself."""
    with record(fw.net, folder / "a.safetensors", layers="all"):
        fw.net(*arguments(fw))


def of_a_class(fw, record, folder):
    """Layers by their class."""
    with record(fw.net, folder / "a.safetensors", layers=type(fw.net.between), parameters=False):
        fw.net(*arguments(fw))


def grads(fw, record, folder):
    """The gradients of one call of the first attention, and of a self-attention with a residual round it."""
    fw.train(True)
    x, memory, padding, mask = arguments(fw)
    named = fw.parameters(fw.net.first)

    def cross(query, key, value):
        return fw.net.first(query, key, value, padding, need_weights=True, attn_mask=mask)[0]

    def around(query):
        return query + fw.net.first(query, query, query)[0]

    with record(fw.net, folder / "a.safetensors", grads=True):
        first = fw.gradients(cross, [x, memory, fw.tensor(MEMORY)], list(named.values()))
    fresh(named)
    with record(fw.net, folder / "b.safetensors", grads=True):
        second = fw.gradients(around, [fw.tensor(QUERY)], list(named.values()))
    fresh(named)
    bare = fw.gradients(around, [fw.tensor(QUERY)], list(named.values()))
    np.savez(
        folder / "expected.npz",
        query=first[0],
        key=first[1],
        value=first[2],
        around=second[0],
        bare=bare[0],
        **{f"first/{name}": grad for name, grad in zip(named, first[3:])},
        **{f"second/{name}": grad for name, grad in zip(named, second[1:])},
    )


def fresh(named):
    """PyTorch and MegEngine add gradients up."""
    for parameter in named.values():
        if getattr(parameter, "grad", None) is not None:
            parameter.grad = None


def no_backward(fw, record, folder):
    """Gradients are asked for and nobody computes them."""
    given = arguments(fw)
    if fw.name == "torch":
        given[0].requires_grad_()
    with record(fw.net, folder / "a.safetensors", grads=True):
        fw.net(*given)


def replay(fw, record, folder):
    """A second net, whose linear map is wrong, is given the first one's inputs."""
    given = arguments(fw)
    with record(fw.net, folder / "a.safetensors"):
        fw.net(*given)
    other = type(fw)(seed=5)
    with record(other.net, folder / "b.safetensors", inputs_from=folder / "a.safetensors"):
        other.net(*[other.tensor(fw.array(one)) for one in given])


def replay_only(fw, record, folder):
    """Inputs that another framework recorded."""
    with record(fw.net, folder / "b.safetensors", inputs_from=folder / "a.safetensors"):
        fw.net(*arguments(fw))


def told_apart(fw, record, folder):
    """Recorded: three tensors. Here: one tensor for key and value, in the place of which there are two then."""
    query, key, value = (fw.tensor(array) for array in (QUERY, MEMORY, MEMORY[::-1]))
    with record(fw.net.first, folder / "a.safetensors"):
        wanted = fw.net.first(query, key, value)[0]
    with record(fw.net.first, folder / "b.safetensors", inputs_from=folder / "a.safetensors"):
        found = fw.net.first(query, key, key)[0]
    np.savez(folder / "expected.npz", wanted=fw.array(wanted), found=fw.array(found))


def dropin(fw, record, folder):
    """The drop-in is recorded once a call, with what it has beyond the native class."""
    layer = fw.dropin()
    layer.beyond = {"scale": 0.25}
    x = fw.tensor(QUERY)
    before = layer(x, x, x, is_causal=True)[0]
    with record(layer, folder / "a.safetensors"):
        after = layer(x, x, x, is_causal=True)[0]
    np.savez(folder / "expected.npz", before=fw.array(before), after=fw.array(after))


def dropin_there(framework, payload):
    """``dropin`` in a worker of mhabridge."""
    import pathlib

    from mhabridge.recording import record

    dropin(KINDS[framework](), record, pathlib.Path(payload["folder"]))
    return {}


def failure(fw, record, folder):
    """The block ends with an error of the model's own, in the middle of a call."""
    try:
        with record(fw.net, folder / "a.safetensors"):
            fw.net(*arguments(fw))
            fw.net.first("no tensor", "at all", None)
    except Exception as error:
        np.savez(folder / "expected.npz", error=type(error).__name__)


def killed(fw, record, folder):
    """The process dies in the middle."""
    with record(fw.net, folder / "a.safetensors"):
        given = arguments(fw)
        fw.net(*given)
        fw.net(*given)
        os.kill(os.getpid(), signal.SIGKILL)


def unused(fw, record, folder):
    """Nobody calls anything."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with record(fw.net, folder / "a.safetensors"):
            pass
    np.savez(folder / "expected.npz", said=[str(one.message) for one in said])


def growth(fw, record, folder):
    """How much memory many large calls take: the peak over what there was before."""
    import resource

    layer = fw.net.first
    x = fw.tensor(np.ones((1, 64, E), "f4"))
    big = fw.tensor(np.ones((4, 1 << 14, E), "f4"))  # 2 MiB each
    layer(x, x, x)
    with record(fw.net, folder / "a.safetensors", layers="between"):
        fw.net.between(big)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(50):
            fw.net.between(big)
        inside = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.savez(folder / "expected.npz", inside=(inside - before) << 10, after=(after - before) << 10)


def main(kit, framework, scenario, folder):
    import pathlib

    sys.path.insert(0, kit)
    if framework == "mindspore":
        import mindspore

        mindspore.runtime.launch_blocking()
    record = importlib.import_module("mhabridge_record").record
    globals()[scenario](KINDS[framework](), record, pathlib.Path(folder))
    assert not [name for name in sys.modules if name.split(".")[0] == "mhabridge"], "the kit stands alone"


if __name__ == "__main__":
    main(*sys.argv[1:])
