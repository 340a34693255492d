"""One job of converting.py in a process of its own: prints its seconds and peak memory as JSON.

Seconds are those of the job itself, without the interpreter's start and, but for peers, without imports. Peak memory is
what the kernel says of the whole process, pages of mapped files included.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FRAMEWORKS = ("torch", "mindspore", "megengine")


def warm_up() -> None:
    """Convert a small file, so that code and tables are in memory: the start of a program is measured elsewhere."""
    import numpy as np

    from mhabridge import MHASpec, MHAWeights
    from mhabridge.checkpoint.conversion import convert_checkpoint

    spec = MHASpec(4, 2)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "a.npz", **MHAWeights.random(spec).to_layout("torch", spec, prefix="a"))
        convert_checkpoint(Path(folder) / "a.npz", Path(folder) / "a.pkl", "megengine")


def convert(
    source: str, target: str, to: str | None, num_heads: int | None, verify: bool, workers: int | None = None
) -> float:
    from mhabridge.checkpoint.conversion import convert_checkpoint

    warm_up()
    shard_size = Path(source).stat().st_size // 4 + (1 << 20)  # where the target is an index
    heads = num_heads if to else None
    start = time.perf_counter()
    report = convert_checkpoint(
        source, target, to, num_heads=heads, verify=verify, shard_size=shard_size, workers=workers
    )
    seconds = time.perf_counter() - start
    assert report.ok
    return seconds


def convert_several(sources: list[str], folder: str, to: str, ending: str, at_once: int) -> float:
    from mhabridge.checkpoint.conversion import convert_checkpoint

    def one(source: str) -> None:
        convert_checkpoint(source, Path(folder) / f"{Path(source).stem}.{ending}", to, verify=False, workers=1)

    warm_up()
    return at_once_seconds(one, sources, at_once)


def at_once_seconds(job: Callable[[Any], None], given: Sequence[Any], at_once: int) -> float:
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(job, given))
    return time.perf_counter() - start


def copy_barely(source: str, folder: str, at_once: int) -> float:
    """Four quarters of a file into a file each, by nothing but reads and writes of the sizes that a conversion has."""
    from mhabridge.checkpoint.storage import memory, reserving

    quarter = Path(source).stat().st_size // 4

    def one(number: int) -> None:
        start = memory.start_between(number * quarter, 0)
        buffer, position = memory.Scratch().take(1 << 20, start).data, 0
        with Path(source).open("rb") as file, (Path(folder) / str(number)).open("wb") as target:
            reserving.reserve(target.fileno(), quarter)
            while position < quarter:
                got = os.preadv(file.fileno(), [buffer[: quarter - position]], number * quarter + position)
                for start in range(0, got, 512 << 10):
                    os.pwrite(target.fileno(), buffer[start : min(start + (512 << 10), got)], position + start)
                position += got

    return at_once_seconds(one, range(4), at_once)


def inspect(source: str) -> float:
    from mhabridge.cli.main import main

    start = time.perf_counter()
    sys.argv = ["mhabridge", "inspect", source]
    with contextlib.suppress(SystemExit):
        main()
    return time.perf_counter() - start


def make_encoder(target: str, layers: int) -> float:
    """A PyTorch TransformerEncoder of E = 1024 with random numbers: 48 MiB a layer."""
    import torch

    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(1024, 16, 4096)
        state = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).state_dict()
    torch.save({name: torch.randn(tensor.shape) for name, tensor in state.items()}, target)
    return 0.0


def make_attention(target: str, layers: int, embed_dim: int) -> float:
    """Attention layers of PyTorch: 16 MiB a layer of E = 1024."""
    import torch

    with torch.device("meta"):
        state = torch.nn.MultiheadAttention(embed_dim, 16).state_dict()
    names = [f"layers.{layer}.self_attn.{name}" for layer in range(layers) for name in state]
    torch.save({name: torch.randn(state[name.split(".", 3)[-1]].shape) for name in names}, target)
    return 0.0


def torch_to_mindspore(source: str, target: str) -> float:
    start = time.perf_counter()
    import mindspore
    import torch

    state = torch.load(source, weights_only=True)
    entries = [{"name": name, "data": mindspore.Tensor(tensor.numpy())} for name, tensor in state.items()]
    mindspore.save_checkpoint(entries, target)
    return time.perf_counter() - start


def packed_pickle(source: str, target: str) -> float:
    """What one writes by hand for MegEngine, without it."""
    start = time.perf_counter()
    import pickle

    from safetensors.numpy import load_file

    packed = packed_by_hand(load_file(source))
    with Path(target).open("wb") as file:
        pickle.dump(packed, file, protocol=4)
    return time.perf_counter() - start


def packed_megengine(source: str, target: str) -> float:
    """The same with ``megengine.save``, in MegEngine's own environment, which has neither torch nor safetensors."""
    start = time.perf_counter()
    import megengine
    import numpy as np

    with np.load(source) as file:
        state = {name: file[name] for name in file.files}
    megengine.save(packed_by_hand(state), target)
    return time.perf_counter() - start


def packed_by_hand(state: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    prefixes = [name.removesuffix("in_proj_weight") for name in state if name.endswith("in_proj_weight")]
    packed = {}
    for prefix in prefixes:
        weights = [*np.split(state[f"{prefix}in_proj_weight"], 3), state[f"{prefix}out_proj.weight"]]
        biases = [state[f"{prefix}in_proj_bias"], state[f"{prefix}out_proj.bias"]]
        packed[f"{prefix}io_weight_bias"] = np.concatenate([*(weight.T.reshape(-1) for weight in weights), *biases])[
            None
        ]
    return packed


def mindspore_to_safetensors(source: str, target: str) -> float:
    start = time.perf_counter()
    import mindspore

    mindspore.ckpt_to_safetensors(source, str(Path(target).parent))
    return time.perf_counter() - start


def torch_to_torch(source: str, target: str) -> float:
    start = time.perf_counter()
    import torch

    torch.save(torch.load(source, weights_only=True), target)
    return time.perf_counter() - start


def troubleshooter(source: str, target: str) -> float:
    start = time.perf_counter()
    import troubleshooter as ts  # type: ignore[import-not-found]

    ts.migrator.convert_weight(weight_map_path=None, pt_file_path=source, ms_file_save_path=target)
    return time.perf_counter() - start


def peak_mebibytes() -> float:
    """ru_maxrss would count what the parent had before this program was started in its place."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def main() -> None:
    job, arguments = sys.argv[1], json.loads(sys.argv[2])
    seconds = globals()[job](*arguments)
    found: dict[str, Any] = {
        "seconds": seconds,
        "mebibytes": peak_mebibytes(),
        "frameworks": [name for name in FRAMEWORKS if name in sys.modules],
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
