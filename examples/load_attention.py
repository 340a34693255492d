"""Loads a checkpoint's attention with a framework's own functions, runs it, and knows nothing of mhabridge.

    python examples/load_attention.py FRAMEWORK CHECKPOINT QUESTIONS.npz ANSWERS.npz

Any Python from 3.8 on that has the framework. QUESTIONS holds num_heads, and for each attention layer, by its prefix in
the checkpoint, its input (N, L, E); ANSWERS gets the output of each.
"""

from __future__ import annotations

import sys

import numpy as np


def torch_layer(path, num_heads):
    import torch

    state = torch.load(path, weights_only=True)

    def run(prefix, x):
        layer = torch.nn.MultiheadAttention(x.shape[-1], num_heads, batch_first=True).eval()
        layer.load_state_dict({name: state[f"{prefix}.{name}"] for name in layer.state_dict()})
        x = torch.from_numpy(x)
        return layer(x, x, x)[0].detach().numpy()

    return run


def mindspore_layer(path, num_heads):
    import mindspore

    state = mindspore.load_checkpoint(path)

    def run(prefix, x):
        layer = mindspore.nn.MultiheadAttention(x.shape[-1], num_heads, batch_first=True).set_train(False)
        own = {name: state[f"{prefix}.{name}"] for name in layer.parameters_dict()}
        assert mindspore.load_param_into_net(layer, own, strict_load=True) == ([], [])
        x = mindspore.Tensor(x)
        return layer(x, x, x)[0].asnumpy()

    return run


def megengine_layer(path, num_heads):
    import megengine

    state = megengine.load(path)

    def run(prefix, x):
        layer = megengine.module.MultiHeadAttention(x.shape[-1], num_heads)
        layer.eval()
        layer.load_state_dict({name: state[f"{prefix}.{name}"] for name in layer.state_dict()})
        x = megengine.tensor(x)
        return layer(x, x, x)[0].numpy()

    return run


def main(framework, checkpoint, questions, answers):
    asked = np.load(questions)
    run = globals()[framework + "_layer"](checkpoint, int(asked["num_heads"]))
    np.savez(answers, **{name: run(name, asked[name]) for name in asked.files if name != "num_heads"})


if __name__ == "__main__":
    main(*sys.argv[1:])
