"""What tests/test_load_into.py has a framework do, here or in a worker: one small model in each, loaded and run.

The three models compute the same: an embedding, a transformer encoder, a convolution, a batch norm, and a head that is
the embedding's own matrix when ``tied``. Works on Python 3.8.
"""

from __future__ import annotations

import json

import numpy as np

WORDS, E, HEADS, HIDDEN = 11, 8, 2, 8  # all weights of the encoder are square: no shape shows a missing transpose


def net(framework, tied=False):
    """The model in a framework, in evaluation mode, with that framework's initial values."""
    return {"torch": torch_net, "mindspore": mindspore_net, "megengine": megengine_net}[framework](tied)


def torch_net(tied):
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(E, HEADS, HIDDEN, dropout=0.0)
            self.emb = torch.nn.Embedding(WORDS, E)
            self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.conv = torch.nn.Conv1d(E, E, 3, padding=1)
            self.bn = torch.nn.BatchNorm1d(E)
            self.head = torch.nn.Linear(E, WORDS, bias=False)
            if tied:
                self.head.weight = self.emb.weight

        def forward(self, tokens):
            x = self.encoder(self.emb(tokens))
            x = self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)
            return self.head(self.bn(x.reshape(-1, E)))

    return Net().eval()


def mindspore_net(tied):
    import mindspore

    class Net(mindspore.nn.Cell):
        def __init__(self):
            super().__init__()
            layer = mindspore.nn.TransformerEncoderLayer(E, HEADS, HIDDEN, dropout=0.0)
            self.emb = mindspore.nn.Embedding(WORDS, E)
            self.encoder = mindspore.nn.TransformerEncoder(layer, 2)
            self.conv = mindspore.nn.Conv1d(E, E, 3, pad_mode="pad", padding=1, has_bias=True)
            self.bn = mindspore.nn.BatchNorm1d(E)
            self.head = mindspore.nn.Dense(E, WORDS, has_bias=False)
            if tied:
                self.head.weight = self.emb.embedding_table

        def construct(self, tokens):
            x = self.encoder(self.emb(tokens))
            x = self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)
            return self.head(self.bn(x.reshape(-1, E)))

    return Net().set_train(False)


def megengine_net(tied):
    import megengine.functional as functional
    import megengine.module
    from mhabridge.adapters.megengine import TransformerEncoder, TransformerEncoderLayer

    class Net(megengine.module.Module):
        def __init__(self):
            super().__init__()
            layer = TransformerEncoderLayer(E, HEADS, HIDDEN, dropout=0.0)
            self.emb = megengine.module.Embedding(WORDS, E)
            self.encoder = TransformerEncoder(layer, 2)
            self.conv = megengine.module.Conv1d(E, E, 3, padding=1)
            self.bn = megengine.module.BatchNorm1d(E)
            self.head = megengine.module.Linear(E, WORDS, bias=False)
            if tied:
                self.head.weight = self.emb.weight

        def forward(self, tokens):
            x = self.encoder(self.emb(tokens))
            x = functional.transpose(self.conv(functional.transpose(x, (1, 2, 0))), (2, 0, 1))
            return self.head(self.bn(functional.reshape(x, (-1, E))))

    found = Net()
    found.eval()
    return found


def output(framework, model, tokens):
    """The model's answer to tokens (L, N)."""
    if framework == "torch":
        import torch

        with torch.no_grad():
            return model(torch.from_numpy(tokens.astype(np.int64))).numpy()
    if framework == "mindspore":
        import mindspore

        return model(mindspore.Tensor(tokens.astype(np.int32))).asnumpy()
    import megengine

    return np.array(model(megengine.tensor(tokens.astype(np.int32))).numpy())


def loaded(framework, payload):
    """A fresh model, filled from a file: the report, the answer, and the model saved by its framework if asked for."""
    from mhabridge.checkpoint.loading import load_into

    model = net(framework, payload["tied"])
    report = load_into(model, payload["file"], **payload["options"])
    if payload["save"]:
        save(framework, model, payload["save"])
    return {"report": report.to_json(), "output": output(framework, model, payload["tokens"])}


def save(framework, model, path):
    """The model's state in its framework's own format, by its own function."""
    if framework == "torch":
        import torch

        torch.save(model.state_dict(), path)
    elif framework == "mindspore":
        import mindspore

        mindspore.save_checkpoint(model, path)
    else:
        import megengine

        megengine.save(model.state_dict(), path)


def refused(framework, payload):
    """What loading says, and whether the model is as it was."""
    from mhabridge.checkpoint.loading import load_into, names_and_shapes
    from mhabridge.errors import MHABridgeError

    model = net(framework, payload["tied"])
    before = output(framework, model, payload["tokens"])
    error = ""
    try:
        load_into(model, payload["file"], **payload["options"])
    except MHABridgeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    after = output(framework, model, payload["tokens"])
    shapes = {name: list(shape) for name, shape in names_and_shapes(model).items()}
    return {"error": error, "same": bool((before == after).all()), "shapes": json.dumps(shapes)}


def dropin(framework, payload):
    """A drop-in, alone and half precision, filled from what lies under a prefix: its parameters after that."""
    from mhabridge import bridge
    from mhabridge.checkpoint.loading import load_into
    from mhabridge.spec import MHASpec

    layer = bridge.build(MHASpec.from_dict(payload["spec"]), framework, mode="composed")
    load_into(layer, payload["file"], prefix=payload["prefix"])
    spec, weights = bridge.extract(layer)
    return {"spec": spec.to_dict(), "weights": weights.to_tree()}


def own_dropin(framework, payload):
    """A drop-in filled by its framework from a file of that framework's own, strictly; and what it then saves."""
    from mhabridge import bridge
    from mhabridge.spec import MHASpec

    layer = bridge.build(MHASpec.from_dict(payload["spec"]), framework, mode="composed")
    if framework == "torch":
        import torch

        layer.load_state_dict(torch.load(payload["file"], weights_only=True), strict=True)
    elif framework == "mindspore":
        import mindspore

        missing, unexpected = mindspore.load_param_into_net(
            layer, mindspore.load_checkpoint(payload["file"]), strict_load=True
        )
        assert (missing, unexpected) == ([], [])
    else:
        import megengine

        layer.load_state_dict(megengine.load(payload["file"]), strict=True)
    save(framework, layer, payload["save"])
    spec, weights = bridge.extract(layer)
    return {"spec": spec.to_dict(), "weights": weights.to_tree()}


def state_only(framework, payload):
    """A drop-in's state by the adapter alone, as versions too old for the library have it: there and back."""
    import importlib

    from mhabridge import bridge
    from mhabridge.spec import MHASpec
    from mhabridge.weights import MHAWeights

    module = importlib.import_module("mhabridge.adapters." + framework)
    spec = MHASpec.from_dict(payload["spec"])
    layer = bridge.build(spec, framework, mode="composed")
    slots = module.state.slots(layer)
    named = MHAWeights.from_tree(payload["weights"]).to_layout(framework + "@" + module.version(), spec)
    module.state.load_state(layer, named)
    return {
        "model": module.state.is_model(layer) and not module.state.is_model(None),
        "slots": {slot.names[0]: [list(slot.shape), slot.dtype] for slot in slots},
        "attention": module.state.attentions(layer)[""].to_dict(),
        "shapes": {name: [list(array.shape), str(array.dtype)] for name, array in named.items()},
        "weights": bridge.extract(layer)[1].to_tree(),
    }
