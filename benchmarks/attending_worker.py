"""What attending.py has each framework do, in a worker of its own: calls of three forms in turn, and their times."""

from __future__ import annotations

import importlib
import itertools
import os
import time

from mhabridge import bridge

ENOUGH_SECONDS = 3.0  # for one case
FEWEST, MOST = 41, 300  # rounds: of fewer long calls the median moves by more than the limit


def stay_on_one_processor():
    """On two a call of MindSpore's own cell takes 15 % more or less than the one before, on one 6 %.

    The last one, as the first has more interrupts to serve.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class Torch:
    """Its own layer, and how a call of it is finished."""

    def __init__(self, sizes, device):
        import torch

        stay_on_one_processor()
        self.framework, self.device = torch, device
        torch.set_num_threads(1)
        torch.manual_seed(0)
        _, _, embed_dim, num_heads = sizes
        self.native = torch.nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, device=device)
        drop_in = importlib.import_module("mhabridge.adapters.torch").MultiheadAttention
        self.drop_in = drop_in(embed_dim, num_heads, batch_first=True, device=device)
        self.drop_in.load_state_dict(self.native.state_dict())

    @staticmethod
    def devices():
        import torch

        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

    def tensor(self, array):
        return self.framework.from_numpy(array).to(self.device)

    def train(self, layer, training):
        layer.train(training)

    def prepared(self, layer, call, x, backward):
        """A function that makes one whole call, its results complete when it returns."""
        finish = self.framework.cuda.synchronize if self.device == "cuda" else int

        def forward():
            call(x)
            finish()

        if not backward:
            return self.framework.no_grad()(forward)
        x = x.clone().requires_grad_(True)

        def both():
            for leaf in (x, *layer.parameters()):
                leaf.grad = None
            call(x)[0].sum().backward()
            finish()

        return both


class MindSpore:
    """As ``Torch``."""

    def __init__(self, sizes, device):
        stay_on_one_processor()
        import mindspore

        self.framework = mindspore
        # Since 2.2; without it a call waits for threads that wait for each other, 40 ms on two cores.
        getattr(getattr(mindspore, "runtime", None), "launch_blocking", int)()
        mindspore.set_seed(0)
        _, _, embed_dim, num_heads = sizes
        self.native = mindspore.nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        drop_in = importlib.import_module("mhabridge.adapters.mindspore").MultiheadAttention
        self.drop_in = drop_in(embed_dim, num_heads, batch_first=True)
        mindspore.load_param_into_net(self.drop_in, self.native.parameters_dict())

    @staticmethod
    def devices():
        return ["cpu"]

    def tensor(self, array):
        return self.framework.Tensor(array)

    def train(self, layer, training):
        layer.set_train(training)

    def prepared(self, layer, call, x, backward):
        if not backward:
            return lambda: call(x)[0].asnumpy()
        parameters = self.framework.ParameterTuple(layer.trainable_params())
        grad = self.framework.grad(lambda x: call(x)[0].sum(), 0, parameters)
        return lambda: grad(x)[0].asnumpy()


class MegEngine:
    """As ``Torch``."""

    def __init__(self, sizes, device):
        import megengine
        import megengine.module
        from megengine.autodiff import GradManager

        self.framework, self.manager = megengine, GradManager
        _, _, embed_dim, num_heads = sizes
        self.native = megengine.module.MultiHeadAttention(embed_dim, num_heads)
        drop_in = importlib.import_module("mhabridge.adapters.megengine").MultiheadAttention
        self.drop_in = drop_in(embed_dim, num_heads, batch_first=True)
        self.native.load_state_dict(self.drop_in.state_dict())

    @staticmethod
    def devices():
        return ["cpu"]

    def tensor(self, array):
        return self.framework.tensor(array)

    def train(self, layer, training):
        layer.train(training)

    def prepared(self, layer, call, x, backward):
        if not backward:
            return lambda: call(x)[0].numpy()
        x = self.framework.tensor(x)
        leaves = [x, *layer.parameters()]

        def both():
            for leaf in leaves:
                leaf.grad = None
            with self.manager().attach(leaves) as manager:
                manager.backward(call(x)[0].sum())
            x.grad.numpy()

        return both


FRAMEWORKS = {"torch": Torch, "mindspore": MindSpore, "megengine": MegEngine}


def devices(framework, payload):
    """Where the framework can be measured."""
    return FRAMEWORKS[framework].devices()


def measure(framework, payload):
    """Seconds of each call: {"native": [...], "attend": [...], "drop-in": [...]}, round by round."""
    bench = FRAMEWORKS[framework](payload["sizes"], payload["device"])
    x = bench.tensor(payload["x"])
    more = {"need_weights": payload["need_weights"]}
    if payload["padding"] is not None:
        more["key_padding_mask"] = bench.tensor(payload["padding"])
    if payload["attn_mask"] is not None and not payload["is_causal"]:
        more["attn_mask"] = bench.tensor(payload["attn_mask"])
    native_more = {**more, "average_attn_weights": True} if payload["need_weights"] else dict(more)
    if payload["is_causal"]:  # the mask comes with it in PyTorch's own layer, and is made in ours
        more["is_causal"], native_more["is_causal"] = True, True
        native_more["attn_mask"] = bench.tensor(payload["attn_mask"])
    for layer in (bench.native, bench.drop_in):
        bench.train(layer, payload["backward"])
    forms = {
        "native": (bench.native, lambda x: bench.native(x, x, x, **native_more)),
        "attend": (bench.native, lambda x: bridge.attend(bench.native, x, x, x, **more)),
        "drop-in": (bench.drop_in, lambda x: bench.drop_in(x, x, x, **more)),
    }
    calls = {name: bench.prepared(layer, call, x, payload["backward"]) for name, (layer, call) in forms.items()}
    return rounds(calls)


def rounds(calls):
    """All calls in turn, again and again, after a few rounds to warm up."""
    for call in [*calls.values()] * 3:
        call()
    seconds = {name: [] for name in calls}
    begun = time.perf_counter()
    for count in itertools.count():
        if count >= MOST or (count >= FEWEST and time.perf_counter() - begun > ENOUGH_SECONDS):
            return seconds
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
