"""Recordings of small encoders, computed in NumPy and written as a framework's recorder writes them."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mhabridge import dtypes, reference
from mhabridge.calls import Call
from mhabridge.diff.rounding import Accuracy, noisy
from mhabridge.recording.contents import CODES
from mhabridge.recording.finishing import finish
from mhabridge.recording.journal import Journal
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

N, L, E, H, LAYERS = 2, 6, 16, 4, 4
CLASSES = {
    "torch": "torch.nn.modules.activation.MultiheadAttention",
    "mindspore": "mindspore.nn.layer.transformer.MultiheadAttention",
    "megengine": "megengine.module.multiheadattn.MultiHeadAttention",
}
VERSIONS = {"torch": "2.13.0", "mindspore": "2.10.0", "megengine": "1.13.0"}


class Writer:
    """One recording: a journal that becomes a file."""

    def __init__(self, path: Path, framework: str = "torch", version: str = "", form: int = 2) -> None:
        self.path, self.framework = path, framework
        self.journal = Journal(path.with_name(path.name + ".journal"))
        start = {"format": form, "framework": framework, "version": version or VERSIONS[framework]}
        self.journal.event({"start": {**start, "environment": {"python": "3.11", "device": "cpu"}}})
        self.count = 0
        self.nth: dict[str, int] = {}

    def layer(self, path: str, of_class: str, settings: dict[str, Any], parameters: dict[str, np.ndarray]) -> None:
        names = {name: self.tensor(f"layers/{path}/{name}", array) for name, array in parameters.items()}
        kind = of_class.rpartition(".")[2]
        whole = {"whole": True} if of_class == "my.Whole" else {}
        entry = {
            "path": path,
            "class": of_class,
            "kind": kind,
            "attention": kind.lower() == "multiheadattention",
            **whole,
        }
        self.journal.event({"layer": {**entry, "settings": settings, "parameters": names}})

    def call(
        self,
        layer: str,
        arguments: dict[str, Any],
        outputs: list[Any],
        grads: dict[str, np.ndarray] | None = None,
        training: bool = False,
        parameters: dict[str, np.ndarray] | None = None,
    ) -> None:
        prefix, index, self.count = f"calls/{self.count:06d}", self.count, self.count + 1
        nth = self.nth.get(layer, 0)
        self.nth[layer] = nth + 1
        seen: dict[int, str] = {}
        items = {}
        for name, value in arguments.items():
            items[name] = {"same_as": seen[id(value)]} if id(value) in seen else self.item(f"{prefix}/{name}", value)
            if isinstance(value, np.ndarray):
                seen.setdefault(id(value), name)
        made = [self.item(f"{prefix}/outputs/{number}", value) for number, value in enumerate(outputs)]
        event = {"index": index, "layer": layer, "nth": nth, "training": training, "arguments": items, "outputs": made}
        if parameters:
            kept = {name: self.item(f"{prefix}/parameters/{name}", value) for name, value in parameters.items()}
            event["parameters"] = kept
        self.journal.event({"call": event})
        if grads:
            kept = {name: self.item(f"{prefix}/grads/{name}", value) for name, value in grads.items()}
            self.journal.event({"grads": {"index": index, "grads": kept}})

    def item(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, np.ndarray):
            return {"tensor": self.tensor(name, value)}
        return value if isinstance(value, dict) else {"value": value}

    def tensor(self, name: str, array: np.ndarray) -> str:
        words = np.ascontiguousarray(dtypes.to_words(array))
        code = CODES[dtypes.name_of(array)]
        self.journal.tensor(name, code, array.shape, memoryview(words.reshape(-1).view(np.uint8)))
        return name

    def end(self, complete: bool = True) -> Path:
        self.journal.event({"end": {"complete": complete}})
        self.journal.close()
        finish(self.journal.path, self.path)
        return self.path


@dataclasses.dataclass
class Block:
    """One layer of the encoder: attention, norm, a feed-forward layer, norm; a test changes what it likes."""

    spec: MHASpec
    weights: MHAWeights
    linear: np.ndarray
    bias: np.ndarray
    epsilon: float = 1e-5
    told: MHAWeights | None = None  # the weights that are recorded, where others were used
    used: MHASpec | None = None  # the layer that computes, where it is another one


def encoder(framework: str, dtype: str = "float32", layers: int = LAYERS) -> list[Block]:
    """The same random encoder for every framework, in its axis order."""
    rng = np.random.default_rng(3)
    spec = MHASpec(E, H, dtype=dtype, batch_first=framework == "megengine")
    blocks = []
    for number in range(layers):
        linear, bias = rng.standard_normal((E, E)) / math.sqrt(E), rng.uniform(-0.5, 0.5, E)
        weights = MHAWeights.random(spec.replace(dtype="float32"), seed=number).astype(dtype)
        blocks.append(Block(spec, weights, dtypes.round_to(linear, dtype), dtypes.round_to(bias, dtype)))
    return blocks


def inputs(dtype: str = "float32") -> np.ndarray:
    return np.asarray(dtypes.round_to(np.random.default_rng(7).standard_normal((N, L, E)), dtype))


def padding() -> np.ndarray:
    mask = np.zeros((N, L), bool)
    mask[1, 4:] = True
    return mask


def record(
    path: Path,
    framework: str,
    blocks: list[Block],
    x: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    need_weights: bool = True,
    names: str = "layers.{}.self_attn",
    seed: int = 0,
    finished: bool = True,
    grad: bool = False,
    passed: Any = None,
) -> Writer:
    """Run the encoder with rounding errors of its dtype, and record its attention layers."""
    writer = Writer(path, framework)
    dtype = blocks[0].spec.dtype
    arithmetic = noisy(Accuracy(dtype), np.random.default_rng(seed))
    x = inputs(dtype) if x is None else x
    for number, block in enumerate(blocks):
        told = block.told or block.weights
        settings = {"embed_dim": E, "num_heads": block.spec.num_heads, "batch_first": block.spec.batch_first}
        settings.update({"bias": True, "kdim": E, "vdim": E} if framework == "megengine" else {})
        name = names.format(number)
        writer.layer(name, CLASSES[framework], settings, told.to_layout(framework, block.spec))
        blocked = None if mask is None else mask[:, None, None, :]
        given = np.random.default_rng(number).standard_normal((N, L, E)).astype("float32") if grad else None
        call = Call(x, x, x, blocked, need_weights=need_weights, grad_output=given)
        result = reference.attend(block.used or block.spec, block.weights, call, arithmetic=arithmetic)
        turn = (lambda a: a) if block.spec.batch_first else (lambda a: np.ascontiguousarray(a.swapaxes(0, 1)))
        query = turn(x)
        arguments = {"query": query, "key": query, "value": query, "need_weights": need_weights}
        arguments["average_attn_weights"] = True
        if mask is not None:
            arguments["key_padding_mask"] = mask if passed is None else passed
        outputs = [turn(_stored(result.output, dtype))]
        outputs.append(_stored(result.attn_weights, dtype) if need_weights else None)
        writer.call(name, arguments, outputs, _grads(result, turn, given, block, framework, dtype) if grad else None)
        x = _rest(_stored(x + result.output, dtype), block, arithmetic)
    return writer if not finished else _ended(writer)


def _ended(writer: Writer) -> Writer:
    writer.end()
    return writer


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(dtypes.round_to(dtypes.to_float64(array), dtype))


def _grads(result: Any, turn: Any, given: Any, block: Block, framework: str, dtype: str) -> dict[str, np.ndarray]:
    total = sum(dtypes.to_float64(result.grads[name]) for name in ("query", "key", "value"))
    own = MHAWeights(**{name: _stored(result.grads[name], dtype) for name in block.weights.arrays()})
    named = {f"parameters/{name}": array for name, array in own.to_layout(framework, block.spec).items()}
    return {"arguments/query": turn(_stored(total, dtype)), "outputs/0": turn(given), **named}


def _rest(x: np.ndarray, block: Block, arithmetic: Any) -> np.ndarray:
    dtype = block.spec.dtype
    x = _norm(x, block.epsilon, arithmetic, dtype)
    y = _stored(np.maximum(arithmetic.matmul(x, block.linear.T) + block.bias, 0), dtype)
    return _norm(_stored(x + y, dtype), block.epsilon, arithmetic, dtype)


def _norm(x: np.ndarray, epsilon: float, arithmetic: Any, dtype: str) -> np.ndarray:
    values = dtypes.to_float64(x)
    centred = values - values.mean(axis=-1, keepdims=True)
    return np.asarray(arithmetic.store(centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon)))


def rewritten(path: Path, target: Path, change: Any) -> Path:
    """A recording whose metadata a test has changed."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["mhabridge.recording"])
    document = change(document) or document
    text = document if isinstance(document, str) else json.dumps(document)
    header["__metadata__"]["mhabridge.recording"] = text
    new = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
    return target


def comparison(report: Any, layer: str, tensor: str) -> Any:
    return next(entry.comparison for entry in report.entries if (entry.layer, entry.tensor) == (layer, tensor))


def notes(report: Any, layer: str) -> str:
    return "; ".join(next(each.notes for each in report.layers if each.name == layer))
