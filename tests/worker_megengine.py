"""What tests/test_dropin_megengine.py has MegEngine do, in a worker: arrays in, arrays out. Works on Python 3.8."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile

import megengine
import megengine.functional
import megengine.module
import megengine.optimizer
import numpy as np
from megengine.autodiff import GradManager
from megengine.jit import trace
from mhabridge.adapters.megengine import MultiheadAttention

from mhabridge import bridge
from mhabridge.initial import manual_seed
from mhabridge.native import parameter_grads
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

INPUTS = ("query", "key", "value")
MASKS = ("key_padding_mask", "attn_mask")
FROM_TORCH = (
    "embed_dim",
    "num_heads",
    "dropout",
    "kdim",
    "vdim",
    "bias",
    "add_bias_kv",
    "add_zero_attn",
    "batch_first",
)


def drop_in(payload):
    """A drop-in of ``spec`` with ``weights``."""
    spec, weights = MHASpec.from_dict(payload["spec"]), MHAWeights.from_tree(payload["weights"])
    layer = MultiheadAttention(dtype=spec.dtype, **{name: getattr(spec, name) for name in FROM_TORCH})
    packed_spec = spec.replace(add_bias_kv=False)
    state = dataclasses.replace(weights, bias_k=None, bias_v=None).to_layout("megengine", packed_spec)
    if spec.add_bias_kv:
        state.update(bias_k=weights.bias_k.reshape(1, 1, -1), bias_v=weights.bias_v.reshape(1, 1, -1))
    layer.load_state_dict(state)
    layer.train(payload.get("training", False))
    return layer, spec


def layer_of(payload):
    """A drop-in, or a native module where the payload says so."""
    if not payload.get("native"):
        return drop_in(payload)
    spec, weights = MHASpec.from_dict(payload["spec"]), MHAWeights.from_tree(payload["weights"])
    layer = bridge.build(spec, "megengine", weights, mode="native")
    layer.train(payload.get("training", False))
    return layer, spec


def tensors_of(payload):
    inputs = [megengine.tensor(array) for array in payload["inputs"]]
    call = dict(payload["call"])
    call.update({name: megengine.tensor(call[name]) for name in MASKS if name in call})
    return inputs, call


def answer(layer, inputs, call, notes=None):
    """By the drop-in's own call, or by ``mb.attend`` for what only that has."""
    if isinstance(layer, MultiheadAttention) and not {"fully_masked", "mode"} & set(call):
        return layer(*inputs, **call)
    return bridge.attend(layer, *inputs, notes=notes, **call)


def arrays(answers):
    assert type(answers) is tuple
    return [None if tensor is None else tensor.numpy() for tensor in answers]


def attend(framework, payload):
    """One call, and with ``seeds`` its gradients by canonical name."""
    layer, spec = layer_of(payload)
    inputs, call = tensors_of(payload)
    notes = []
    if "seeds" not in payload:
        output, attention = arrays(answer(layer, inputs, call, notes))
        return {"output": output, "attn_weights": attention, "grads": {}, "notes": notes}
    leaves = {name: inputs[index] for index, name in enumerate(INPUTS)}
    leaves.update({name: call[name] for name in MASKS if name in call and np.dtype(call[name].dtype).kind == "f"})
    leaves.update(layer.named_parameters())
    manager = GradManager().attach(list(leaves.values()))
    with manager:
        answers = answer(layer, inputs, call, notes)
        seeds = {index: megengine.tensor(seed) for index, seed in enumerate(payload["seeds"]) if seed is not None}
        manager.backward([answers[index] for index in seeds], list(seeds.values()))
    grads = {
        name: np.zeros(leaf.shape, "f4") if leaf.grad is None else leaf.grad.numpy() for name, leaf in leaves.items()
    }
    packed_spec = spec.replace(add_bias_kv=False)
    grads.update(
        parameter_grads("megengine", {"io_weight_bias": grads.pop("io_weight_bias")}, packed_spec, packed_spec)
    )
    grads.update({name: grads[name].reshape(-1) for name in ("bias_k", "bias_v") if name in grads})
    output, attention = arrays(answers)
    return {"output": output, "attn_weights": attention, "grads": grads, "notes": notes}


def repeat(framework, payload):
    """How many different answers many calls give that wait in MegEngine's queue together, and the first of each."""
    layer, _ = drop_in(payload)
    assert megengine.config.async_level == 2, "the default"
    pending = []
    for _ in range(payload["times"]):
        inputs, call = tensors_of(payload)
        pending.append(layer(*inputs, **call))
    found = {}
    for answers in pending:
        output, attention = arrays(answers)
        found.setdefault(output.tobytes() + attention.tobytes(), [output, attention])
    return list(found.values())


def traced(framework, payload):
    """The answers of a traced layer: of the recording, and of two runs of the trace."""
    layer, _ = drop_in(payload)
    inputs, call = tensors_of(payload)
    masks = {name: call.pop(name) for name in MASKS if name in call}
    function = trace(lambda inputs, masks: layer(*inputs, **masks, **call), symbolic=payload["symbolic"])
    return [arrays(tuple(function(inputs, masks))) for _ in range(3)]


def train(framework, payload):
    """The losses of some steps of SGD of a drop-in inside a larger model, traced or not."""
    manual_seed(3)
    model = Model()
    manager = GradManager().attach(list(model.parameters()))
    optimizer = megengine.optimizer.SGD(model.parameters(), lr=0.1)

    def step(x):
        with manager:
            output, attention = model(x)
            loss = (output**2).mean() + (attention**2).mean()
            manager.backward(loss)
        optimizer.step().clear_grad()
        return loss

    run = step if payload["symbolic"] is None else trace(step, symbolic=payload["symbolic"])
    return [float(run(megengine.tensor(x)).numpy()) for x in payload["batches"]]


def train_alone(framework, payload):
    """The outputs of a drop-in in training by one of MegEngine's own optimisers, before each step."""
    spec = MHASpec.from_dict(payload["spec"])
    layer = bridge.build(spec, "megengine", MHAWeights.from_tree(payload["weights"]), mode="composed")
    manager = GradManager().attach(list(layer.parameters()))
    optimizer = getattr(megengine.optimizer, payload["optimiser"])(
        layer.parameters(), lr=payload["rate"], **payload["more"]
    )
    x, target = megengine.tensor(payload["x"]), megengine.tensor(payload["target"])
    outputs = []
    for _ in range(payload["steps"]):
        with manager:
            output, _ = layer(x, x, x)
            manager.backward(((output - target) ** 2).mean())
        outputs.append(output.numpy())
        optimizer.step().clear_grad()
    return outputs


class Model(megengine.module.Module):
    """A linear layer and a drop-in."""

    def __init__(self):
        super().__init__()
        self.first = megengine.module.Linear(8, 8)
        self.first.weight = megengine.Parameter(np.eye(8, dtype="f4") * 2)
        self.attention = MultiheadAttention(8, 2, add_bias_kv=True)

    def forward(self, x):
        y = self.first(x)
        return self.attention(y, y, y, is_causal=True)


def fresh(framework, payload):
    """What a new drop-in is like."""
    manual_seed(payload["seed"])
    layer = MultiheadAttention(**payload["layer"])
    spec, weights = bridge.extract(layer)
    return {
        "spec": spec.to_dict(),
        "weights": weights.to_tree(),
        "training": layer.training,
        "shapes": {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()},
        "repr": repr(layer),
        "repr inside": repr(megengine.module.Sequential(layer)),
        "is a module": isinstance(layer, megengine.module.Module),
    }


def copies(framework, payload):
    """Whether copies that MegEngine makes of a drop-in are equal to it and independent of it."""
    layer, _ = drop_in(payload)
    with tempfile.TemporaryDirectory() as folder:
        megengine.save(layer, os.path.join(folder, "whole"))
        megengine.save(layer.state_dict(), os.path.join(folder, "state"))
        loaded = megengine.load(os.path.join(folder, "whole"))
        filled = MultiheadAttention(8, 2, add_bias_kv=payload["weights"]["bias_k"] is not None)
        filled.load_state_dict(megengine.load(os.path.join(folder, "state")))
    made = {"deepcopy": copy.deepcopy(layer), "module": loaded, "state": filled}
    before = bridge.extract(layer)[1]
    equal = {name: bridge.extract(one)[1] == before for name, one in made.items()}
    layer.io_weight_bias[...] = 0.0
    kept = {name: bridge.extract(one)[1] == before for name, one in made.items()}
    return {"equal": equal, "kept": kept, "training": [made["deepcopy"].training, loaded.training]}


def exchange(framework, payload):
    """State dicts from the drop-in to a native module and back: which answers and which weights arrive."""
    layer, spec = drop_in(payload)
    inputs, _ = tensors_of(payload)
    native = megengine.module.MultiHeadAttention(
        spec.embed_dim, spec.num_heads, bias=spec.bias, kdim=spec.kdim, vdim=spec.vdim
    )
    native.load_state_dict(layer.state_dict())
    native.eval()
    back = MultiheadAttention(**{name: getattr(spec, name) for name in FROM_TORCH})
    back.load_state_dict(native.state_dict())
    return {
        "drop-in": arrays(layer(*inputs)),
        "native": arrays(native(*inputs, need_weights=True, average_attn_weights=True)),
        "back": bridge.extract(back)[1] == bridge.extract(layer)[1] == bridge.extract(native)[1],
    }


def built(framework, payload):
    """A layer made by ``mb.build``, then by ``mb.convert`` from that: what each is, and the first one's answer."""
    spec, weights = MHASpec.from_dict(payload["spec"]), MHAWeights.from_tree(payload["weights"])
    notes, moved_notes = [], []
    layer = bridge.build(spec, "megengine", weights, mode=payload["mode"], notes=notes)
    layer.train(payload["training"])
    moved = bridge.convert(layer, to="megengine", notes=moved_notes)
    inputs, call = tensors_of(payload)
    return {
        "built": described(layer, notes),
        "moved": described(moved, moved_notes),
        "answer": arrays(bridge.attend(layer, *inputs, **call)),
    }


def described(layer, notes):
    spec, weights = bridge.extract(layer)
    return {
        "spec": spec.to_dict(),
        "weights": weights.to_tree(),
        "training": layer.training,
        "drop-in": isinstance(layer, MultiheadAttention),
        "notes": notes,
    }


def refuse_to_build(framework, payload):
    """A layer that must not be made."""
    return repr(bridge.build(MHASpec.from_dict(payload["spec"]), "megengine", mode=payload["mode"]))


def refuse(framework, payload):
    """A call, or a constructor, that must fail."""
    if "layer" in payload:
        return repr(MultiheadAttention(**payload["layer"]))
    layer, _ = drop_in(payload)
    inputs, call = tensors_of(payload)
    plain = payload.get("arrays", [])
    inputs = [payload["inputs"][i] if name in plain else inputs[i] for i, name in enumerate(INPUTS)]
    call.update({name: payload["call"][name] for name in plain if name in payload["call"]})
    return arrays(answer(layer, inputs, call))
