"""Writes the golden files again: ``python make_golden.py torch|megengine|numpy FOLDER``, in that environment.

The committed files were written by PyTorch 2.13.0 and 1.8.1, MegEngine 1.13.0, and NumPy 1.26 and 2.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import expected


def write_torch(folder):
    import torch

    tag = "torch" + torch.__version__.split("+")[0]

    def tensor(name, table):
        dtype, values = table[name]
        found = torch.tensor(values.tolist(), dtype=torch.float64).reshape(values.shape)
        return found.to(getattr(torch, dtype))

    state = collections.OrderedDict((name, tensor(name, expected.STATE)) for name in expected.STATE)
    weight = state["weight"]
    state.update(tied=weight, transposed=weight.t(), rows=weight[1:], column=weight[:, 1])
    state["parameter"] = torch.nn.Parameter(state["parameter"])
    torch.save(state, folder / (tag + "-state.pt"))
    torch.save(state, folder / (tag + "-legacy.pt"), _use_new_zipfile_serialization=False)
    net = torch_net()
    for key, value in net.state_dict().items():
        if key in expected.MODULE:
            value.copy_(tensor(key, expected.MODULE))
    optimizer = torch.optim.Adam(net.fc.parameters(), betas=tuple(expected.BETAS))
    net.fc(torch.ones(1, 2)).sum().backward()
    state_dict = {key: tensor(key, expected.NESTED) for key in expected.NESTED}
    optimizer.step()
    checkpoint = {
        "epoch": expected.EPOCH,
        "state_dict": state_dict,
        "optimizer": optimizer.state_dict(),
        "best": np.float64(expected.BEST),
        "betas": tuple(expected.BETAS),
        "run": expected.RUN,
        "random_state": torch.arange(8, dtype=torch.uint8),
    }
    torch.save(checkpoint, folder / (tag + "-nested.pt"))
    torch.save(dict(checkpoint, args=argparse.Namespace(lr=1)), folder / (tag + "-namespace.pt"))
    for key, value in net.state_dict().items():
        if key in expected.MODULE:
            value.copy_(tensor(key, expected.MODULE))
    net.zero_grad()
    torch.save(net, folder / (tag + "-module.pt"))
    if hasattr(torch, "uint16"):
        state = {"uint16": torch.arange(3).to(torch.uint16), "float8": torch.ones(2).to(torch.float8_e5m2)}
        torch.save(state, folder / (tag + "-untyped.pt"))


def torch_net():
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 3)
            self.norm = torch.nn.BatchNorm1d(3, affine=False)
            self.register_buffer("transient", torch.ones(2), persistent=False)

    # Pickled by name, so that the file asks for a class that nobody else has.
    Net.__qualname__ = "Net"
    globals()["Net"] = Net
    return Net()


def write_megengine(folder):
    import megengine
    import megengine.module
    from megengine.core._imperative_rt import pybfloat16

    tag = "megengine" + megengine.__version__
    arrays = {name: np.array(values, dtype) for name, (dtype, values) in expected.NESTED.items()}
    numpy_state = collections.OrderedDict(arrays)
    parameters = {name: megengine.Parameter(array) for name, array in arrays.items()}
    optimizer = megengine.optimizer.Adam(list(parameters.values()), lr=0.5)
    checkpoint = {"epoch": expected.EPOCH, "state_dict": numpy_state, "optimizer": optimizer.state_dict()}
    checkpoint.update(run=expected.RUN, best=np.float32(expected.BEST))
    net = megengine_net()
    net.fc.weight[...] = megengine.tensor(arrays["fc.weight"])
    net.fc.bias[...] = megengine.tensor(arrays["fc.bias"])
    net.norm.running_mean = megengine.Tensor(np.array(expected.MODULE["norm.running_mean"][1], "float32"))
    bfloat = np.array(expected.STATE["bfloat"][1], "float32").astype(pybfloat16)
    for protocol in (2, 3, 4, 5):
        for what, content in (
            ("state", numpy_state),
            ("nested", checkpoint),
            ("parameters", parameters),
            ("module", net),
            ("bfloat", {"array": bfloat, "tensor": megengine.tensor(bfloat)}),
        ):
            file = folder / f"{tag}-{what}-p{protocol}.pkl"
            megengine.save(content, str(file), pickle_protocol=protocol)


def megengine_net():
    import megengine.module

    class Net(megengine.module.Module):
        def __init__(self):
            super().__init__()
            self.fc = megengine.module.Linear(2, 3)
            self.norm = megengine.module.BatchNorm1d(3, affine=False)

        def forward(self, inputs):
            return self.norm(self.fc(inputs))

    Net.__qualname__ = "Net"
    globals()["Net"] = Net
    return Net()


def write_numpy(folder):
    import ml_dtypes

    arrays = expected.numpy_arrays()
    arrays["bfloat"] = np.array(expected.STATE["bfloat"][1]).astype(ml_dtypes.bfloat16)
    arrays["epoch"] = np.int32(expected.EPOCH)
    for protocol in range(6):
        file = folder / "numpy{}-p{}.pkl".format(np.__version__.split(".")[0], protocol)
        file.write_bytes(pickle.dumps(arrays, protocol=protocol))


if __name__ == "__main__":
    what, target = sys.argv[1:]
    {"torch": write_torch, "megengine": write_megengine, "numpy": write_numpy}[what](pathlib.Path(target))
