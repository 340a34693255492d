"""Writes the files in tests/golden/mindspore again: ``python make_golden_mindspore.py FOLDER``, with MindSpore.

The committed files were written by MindSpore 2.10.0. What is in them is said in ``CONTENT``, which the tests read too.
"""

from __future__ import annotations

import os
import pathlib
import sys

import numpy as np

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
SLICED = "encoder.in_proj_weight"

# name -> (dtype, values)
PLAIN = {
    **{f"layer.{dtype}": (dtype, np.arange(6).reshape(2, 3) - 2 * (dtype[0] != "u")) for dtype in DTYPES},
    "layer.bool": ("bool", np.arange(5) % 2),
    "layer.bfloat16": ("bfloat16", np.arange(200) / 8.0),
    "norm.γ": ("float32", np.array(0.5)),
}
APPENDED = {"epoch_num": 3, "done": True, "name": "naïve 模型", "empty": ""}
SPLIT = {SLICED: ("float32", np.arange(12).reshape(3, 4)), "row": ("int16", np.arange(16).reshape(1, 16))}
LONG = {
    "first": ("int8", np.arange(3)),
    SLICED: ("float32", np.arange(750).reshape(3, 250)),
    "last": ("int8", np.ones(2)),
}


def main(folder: pathlib.Path) -> None:
    import mindspore as ms
    from mindspore.train import serialization

    def tensors(content):
        found = []
        for name, (dtype, values) in content.items():
            through = np.asarray(values).astype("float32" if dtype == "bfloat16" else dtype)
            tensor = ms.Tensor(through)
            found.append({"name": name, "data": tensor.astype(ms.bfloat16) if dtype == "bfloat16" else tensor})
        return found

    def save(name, content, **options):
        file = folder / name
        ms.save_checkpoint(tensors(content), str(file), **options)
        if options.get("async_save"):
            serialization._wait_async_thread_save_ckpt()
        os.chmod(file, 0o644)

    save("plain.ckpt", PLAIN, append_dict=dict(APPENDED))
    save("crc.ckpt", SPLIT, crc_check=True)
    save("encrypted.ckpt", SPLIT, enc_key=b"0123456789abcdef")
    save("crc.safetensors", SPLIT, format="safetensors", crc_check=True)
    usual = serialization.SLICE_SIZE
    serialization.SLICE_SIZE = 1  # KiB, instead of half a GiB
    save("sliced.ckpt", LONG)
    serialization.SLICE_SIZE = 8 / 1024  # and saved through arrays: three rows in six slices
    save("split.ckpt", SPLIT, async_save=True)
    serialization.SLICE_SIZE = usual


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
