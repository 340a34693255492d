"""Attention as somebody might port it, with the faults that ports have; written without the code that diagnoses them.

Weights go wrong in a framework's own layout, as they do in a porting script: they are laid out, corrupted there, and
read back. Calls go wrong in ``attention``, a small implementation of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import mhabridge as mb
from mhabridge import dtypes
from mhabridge.backends.running import prepare
from mhabridge.diff.inputs import random_inputs, random_masks
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import Accuracy, bounds

LAYOUTS = ("torch", "mindspore", "megengine")
QKV = ("q", "k", "v")


# -- a small attention -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Port:
    """A layer and a call as somebody ported them; faults change it."""

    spec: mb.MHASpec
    layout: str
    native: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]  # query, key, value: batch first
    masks: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def weight(self, letter: str) -> np.ndarray:
        """A projection in the native arrays, as a view that reads (out, in) and can be written to."""
        e = self.spec.embed_dim
        if self.layout == "megengine":
            i = ["q", "k", "v", "out"].index(letter)
            return self.native["io_weight_bias"].reshape(-1)[i * e * e : (i + 1) * e * e].reshape(e, e).T
        if letter == "out":
            return self.native["out_proj.weight"]
        if "in_proj_weight" in self.native:
            i = QKV.index(letter)
            return self.native["in_proj_weight"][i * e : (i + 1) * e]
        return self.native[f"{letter}_proj_weight"]

    def bias(self, letter: str) -> np.ndarray:
        e = self.spec.embed_dim
        if self.layout == "megengine":
            i = ["q", "k", "v", "out"].index(letter)
            return self.native["io_weight_bias"].reshape(-1)[4 * e * e + i * e : 4 * e * e + (i + 1) * e]
        if letter == "out":
            return self.native["out_proj.bias"]
        i = QKV.index(letter)
        return self.native["in_proj_bias"][i * e : (i + 1) * e]

    def both(self, letter: str) -> list[np.ndarray]:
        return [self.weight(letter), *([self.bias(letter)] if self.spec.q_bias else [])]

    def parameters(self) -> dict[str, np.ndarray]:
        return mb.MHAWeights.from_layout(self.layout, self.native, self.spec).arrays()

    def copy(self) -> Port:
        native = {name: array.copy() for name, array in self.native.items()}
        return dataclasses.replace(self, native=native, masks=dict(self.masks), options=dict(self.options))


def attention(port: Port, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Output (N, L, E) and each head's weights (N, H, L, S), computed in a dtype (sums in float32)."""
    wide = {"float64": np.float64}.get(dtype, np.float32)

    def store(array: np.ndarray) -> np.ndarray:
        return np.asarray(dtypes.round_to(array, dtype)).astype(wide)

    spec, options = port.spec, port.options
    p = {name: np.asarray(array).astype(wide) for name, array in port.parameters().items()}
    x = [np.asarray(port.arrays[name]).astype(wide) for name in ("query", "key", "value")]
    if options.get("swap"):
        x = [array.swapaxes(0, 1) for array in x]
    heads = options.get("heads", spec.num_heads)
    made = []
    for letter, array in zip(QKV, x, strict=True):
        y = _sum(array, p[f"{letter}_weight"], options, store)
        bias = p.get(f"{letter}_bias")
        y = y if bias is None else store(y + options.get("times", {}).get(letter, 1) * bias)
        n, length, features = y.shape
        made.append(
            y.reshape(n, heads, length, -1).transpose(0, 2, 1, 3)
            if options.get("split") == "unmoved"
            else y.reshape(n, length, heads, features // heads)
        )
    q, k, v = made
    k, v = _rows(k, "bias_k", p, spec, options), _rows(v, "bias_v", p, spec, options)
    scale = options.get("scale", spec.score_scale)
    scores = store(np.einsum("nlhd,nshd->nhls", store(q * wide(scale)), k))
    scores, factor = _masked(scores, port, q.shape[1], x[1].shape[1], store)
    axis = options.get("axis", 3)
    with np.errstate(all="ignore"):
        e = np.exp(scores - scores.max(axis=axis, keepdims=True))
        weights = store(e / e.sum(axis=axis, keepdims=True)) * factor
        if options.get("dead") == "zero":
            weights = np.where(np.isneginf(scores).all(axis=3, keepdims=True), 0, weights)
        context = store(np.einsum("nhls,nshd->nlhd", weights, v))
        n, length = context.shape[:2]
        if options.get("merge") == "unmoved":
            context = context.transpose(0, 2, 1, 3).reshape(n, length, -1)
        else:
            context = context.reshape(n, length, -1)
        out = context
        if not options.get("no output projection"):
            out = _sum(context, p["out_weight"], options, store)
            if "out_bias" in p:
                out = store(out + options.get("times", {}).get("out", 1) * p["out_bias"])
        if options.get("residual", spec.residual):
            out = store(out + x[0])
    if options.get("swap"):
        out = out.swapaxes(0, 1)
    return out, weights


def _sum(x: np.ndarray, w: np.ndarray, options: dict[str, Any], store: Callable[[np.ndarray], np.ndarray]) -> Any:
    if not options.get("half sums"):
        return store(np.einsum("nle,fe->nlf", x, w))
    total = np.zeros((*x.shape[:2], len(w)), np.float16)
    for i in range(x.shape[2]):
        total = (total + (x[:, :, i : i + 1] * w[:, i]).astype(np.float16)).astype(np.float16)
    return total.astype(x.dtype)


def _rows(x: np.ndarray, name: str, p: dict[str, np.ndarray], spec: mb.MHASpec, options: dict[str, Any]) -> np.ndarray:
    n, _, heads, size = x.shape
    if spec.add_bias_kv and not options.get("no bias row"):
        x = np.concatenate([x, np.broadcast_to(p[name].reshape(1, 1, heads, size), (n, 1, heads, size))], axis=1)
    if spec.add_zero_attn and not options.get("no zero row"):
        x = np.concatenate([x, np.zeros((n, 1, heads, size), x.dtype)], axis=1)
    return x


def _masked(scores: np.ndarray, port: Port, target: int, source: int, store: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores with the masks as this port understands them, and what the softmax is multiplied by."""
    n, heads = scores.shape[:2]
    factor, part = np.ones_like(scores), np.s_[..., :source]
    ways = port.options.get("masks", {})
    for name, mask in _lined_up(port, n, heads, target, source).items():
        way = ways.get(name, "")
        if way == "ignored":
            continue
        if mask.dtype.kind == "f":
            scores[part] = store(scores[part] + (-mask if way == "subtracted" else mask))
            continue
        mask = ~mask if way == "inverted" else mask
        if way == "added":
            scores[part] = store(scores[part] + mask)
        elif way == "times scores":
            scores[part] = scores[part] * ~mask
        elif way == "times softmax":
            factor[part] = factor[part] * ~mask
        else:
            scores[part] = np.where(mask, -np.inf, scores[part])
    return scores, factor


def _lined_up(port: Port, n: int, heads: int, target: int, source: int) -> dict[str, np.ndarray]:
    found = {}
    padding, mask = port.masks.get("key_padding_mask"), port.masks.get("attn_mask")
    if padding is not None:
        found["key_padding_mask"] = padding[:, None, None, :]
    if mask is not None:
        mask = np.asarray(mask).astype(np.float32) if mask.dtype.kind not in "b" else mask
        found["attn_mask"] = mask[None, None] if mask.ndim == 2 else mask.reshape(n, heads, target, source)
    if port.masks.get("is_causal") or port.options.get("causal") == "extra":
        i, j = np.arange(target)[:, None], np.arange(source)[None]
        how = port.options.get("causal")
        offset = {"corner": source - target, "strict": -1, "past": -1}.get(how, 0)
        blocked = (
            j <= i + offset if how in ("inverted", "past") else j > i + offset
        )  # torch.tril(...) read as "blocked"
        found["is_causal"] = blocked[None, None]
    return found


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Injected:
    """A fault, and how a right diagnosis calls it."""

    name: str
    where: tuple[str, ...]  # accepted
    do: Callable[[Port], None]
    group: str


def _pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def injections(
    spec: mb.MHASpec, masks: dict[str, Any], lengths: tuple[int, int], rng: np.random.Generator, weights: str
) -> list[Injected]:
    """One of each group of faults that this layer and call can have, drawn by ``rng``."""
    found = [*_weight_faults(spec, rng), *_bias_faults(spec, rng), *_step_faults(spec, lengths, rng, weights, masks)]
    return [*found, *_mask_faults(spec, masks, lengths, rng)]


def _weight_faults(spec: mb.MHASpec, rng: np.random.Generator) -> list[Injected]:
    equal = spec.kdim is None and spec.vdim is None
    letter = _pick(rng, ["q", "k", "v", "out"] if equal else ["q", "out"])
    found = [Injected("projection transposed", (f"{letter}_weight",), lambda p: _transpose(p, [letter]), "transposed")]
    if not equal:
        return found
    several = _pick(rng, [["q", "k", "v"], ["q", "k", "v", "out"]])
    where = "q_weight, k_weight, v_weight" if len(several) == 3 else "all weights"
    found.append(Injected("projection transposed", (where,), lambda p: _transpose(p, several), "all transposed"))
    order = _pick(rng, [("k", "q", "v"), ("q", "v", "k"), ("v", "k", "q"), ("k", "v", "q"), ("v", "q", "k")])
    names = ("in_proj_weight, in_proj_bias", "in_proj_weight")
    found.append(
        Injected("projections in another order", names, lambda p: _take(p, dict(zip(QKV, order, strict=True))), "order")
    )
    other = _pick(rng, QKV)  # the flat vector of MegEngine holds the output's blocks too
    names = ("all weights and biases", "all weights")
    change = functools.partial(_take, sources={other: "out", "out": other})
    found.append(Injected("projections in another order", names, change, "order with output"))
    to, source = _pick(rng, [(a, b) for a in QKV for b in QKV if a != b])
    names = (f"{to}_weight", f"{to}_weight, {to}_bias")
    found.append(Injected("wrong slice", names, lambda p: _take(p, {to: source}), "slice"))
    size, e = spec.embed_dim // spec.num_heads, spec.embed_dim
    starts = [start for start in range(0, 2 * e + 1, size) if start % e]
    if starts:
        letter2, start = _pick(rng, QKV), _pick(rng, starts)
        names = (f"{letter2}_weight", f"{letter2}_weight, {letter2}_bias")
        found.append(Injected("wrong slice", names, lambda p: _slice(p, letter2, start), "slice at a head"))
    return found + (_head_faults(spec, rng) if spec.num_heads > 1 else [])


def _head_faults(spec: mb.MHASpec, rng: np.random.Generator) -> list[Injected]:
    heads, e = spec.num_heads, spec.embed_dim
    size = e // heads
    turned = bool(rng.integers(2))
    found = [
        Injected(
            "packed rows in another order",
            ("in_proj_weight, in_proj_bias", "in_proj_weight"),
            lambda p: _interleave_packed(p, turned),
            "q/k/v by head",
        )
    ]
    order = rng.permutation(heads)
    while (order == np.arange(heads)).all():
        order = rng.permutation(heads)
    rows = (np.repeat(order * size, size).reshape(heads, size) + np.arange(size)).ravel()
    letters = _pick(rng, [("q",), ("k",), ("v",), ("q", "k"), ("q", "k", "v"), ("out",)])
    names = [", ".join(f"{each}_weight" for each in letters)]
    if letters in (("q", "k", "v"), ("out",)):
        names = ["q_weight, k_weight, v_weight", "out_weight"]
    found.append(Injected("heads permuted", tuple(names), lambda p: _rows_of(p, letters, rows), "heads permuted"))
    if heads > 2:
        turn = int(rng.integers(1, heads))
        turned_heads = np.roll(np.arange(heads), turn if 2 * turn != heads else 1)  # never its own inverse
        columns = (turned_heads[:, None] * size + np.arange(size)).ravel()
        names = ["q_weight, k_weight, v_weight", "out_weight"]
        change = functools.partial(_rows_of, letters=("out",), rows=columns)
        found.append(Injected("heads permuted", tuple(names), change, "output columns by head"))
    if size > 1:
        mixed = np.empty(e, int)
        for h in range(heads):
            for d in range(size):
                mixed[h * size + d] = d * heads + h
        rows2 = mixed if rng.integers(2) else np.argsort(mixed)
        split = _pick(rng, [("q",), ("k",), ("v",), ("out",), ("q", "k", "v"), ("q", "k", "v", "out")])
        name = ", ".join(f"{each}_weight" for each in split)
        found.append(Injected("heads interleaved", (name,), lambda p: _rows_of(p, split, rows2), "heads interleaved"))
    return found


def _transpose(port: Port, letters: list[str]) -> None:
    for letter in letters:
        view = port.weight(letter)
        view[...] = view.T.copy()


def _take(port: Port, sources: dict[str, str]) -> None:
    values = {letter: [array.copy() for array in port.both(letter)] for letter in sources.values()}
    for to, source in sources.items():
        for view, value in zip(port.both(to), values[source], strict=True):
            view[...] = value


def _slice(port: Port, letter: str, start: int) -> None:
    for i, view in enumerate(port.both(letter)):
        packed = np.concatenate([port.both(each)[i] for each in QKV])
        view[...] = packed[start : start + len(view)]


def _interleave_packed(port: Port, turned: bool) -> None:
    heads, e = port.spec.num_heads, port.spec.embed_dim
    for i in range(len(port.both("q"))):
        packed = np.concatenate([port.both(each)[i] for each in QKV]).copy()
        rest = packed.shape[1:]
        if turned:
            packed = packed.reshape(heads, 3, e // heads, *rest).swapaxes(0, 1).reshape(3 * e, *rest)
        else:
            packed = packed.reshape(3, heads, e // heads, *rest).swapaxes(0, 1).reshape(3 * e, *rest)
        for j, each in enumerate(QKV):
            port.both(each)[i][...] = packed[j * e : (j + 1) * e]


def _rows_of(port: Port, letters: tuple[str, ...], rows: np.ndarray) -> None:
    for letter in letters:
        if letter == "out":
            port.weight("out")[...] = port.weight("out")[:, rows].copy()
            continue
        for view in port.both(letter):
            view[...] = view[rows].copy()


def _bias_faults(spec: mb.MHASpec, rng: np.random.Generator) -> list[Injected]:
    found = []
    if spec.q_bias:
        one = _pick(rng, ["q", "v", "out", "all"])
        letters = [one] if one != "all" else ["q", "k", "v", "out"]
        where = (f"{one}_bias",) if one != "all" else ("all biases",)
        found.append(Injected("bias missing", where, lambda p: _fill(p, letters), "bias missing"))
        twice = _pick(rng, ["q", "v", "out"])
        found.append(Injected("bias doubled", (f"{twice}_bias",), lambda p: _double(p, twice), "bias doubled"))
        to, source = _pick(rng, [(a, b) for a in ("q", "v", "out") for b in ("q", "k", "v", "out") if a != b])
        found.append(
            Injected("bias on the wrong projection", (f"{to}_bias",), lambda p: _bias(p, to, source), "bias misplaced")
        )
    if spec.add_bias_kv:
        found.append(
            Injected(
                "bias_k and bias_v",
                ("bias_k, bias_v",),
                lambda p: p.options.update({"no bias row": True}),
                "bias_k, bias_v",
            )
        )
    if spec.add_zero_attn:
        found.append(
            Injected("zero position", ("add_zero_attn",), lambda p: p.options.update({"no zero row": True}), "zero row")
        )
    return found


def _fill(port: Port, letters: list[str]) -> None:
    for letter in letters:
        port.bias(letter)[...] = 0


def _double(port: Port, letter: str) -> None:
    port.options.setdefault("times", {})[letter] = 2


def _bias(port: Port, to: str, source: str) -> None:
    port.bias(to)[...] = port.bias(source).copy()


def _step_faults(
    spec: mb.MHASpec, lengths: tuple[int, int], rng: np.random.Generator, weights: str, masks: dict[str, Any]
) -> list[Injected]:
    def option(**changes: Any) -> Callable[[Port], None]:
        return lambda port: port.options.update({name.replace("_", " "): value for name, value in changes.items()})

    d = spec.embed_dim // spec.num_heads
    found = [
        Injected("scale missing", ("scale",), option(scale=1.0), "scale missing"),
        Injected("scale doubled", ("scale",), option(scale=1.0 / d), "scale doubled"),
        Injected("residual added", ("residual",), option(residual=True), "residual"),
        Injected("output projection missing", ("out_weight",), option(no_output_projection=True), "output projection"),
        Injected(
            "softmax over the wrong axis",
            ("softmax",),
            option(axis=_pick(rng, [2, 1] if spec.num_heads > 1 else [2])),
            "softmax",
        ),
    ]
    if spec.num_heads > 1:
        if spec.embed_dim != d * d:  # else it is the scale twice
            change = option(scale=1 / math.sqrt(spec.embed_dim))
            found.append(Injected("scale of the wrong size", ("scale",), change, "scale of another size"))
        found.append(Injected("heads reshaped without transposing", ("merge",), option(merge="unmoved"), "merge"))
    swappable = lengths[0] == lengths[1] and not {"key_padding_mask", "attn_mask"} & set(masks)
    if swappable:
        found.append(Injected("batch and sequence swapped", ("batch_first",), option(swap=True), "batch and sequence"))
    if weights != "none" and spec.num_heads > 1:
        how = "sum" if weights == "mean" else "mean"
        found.append(
            Injected(
                "weights summed" if how == "sum" else "weights averaged",
                ("attn_weights",),
                option(returned=how),
                "returned",
            )
        )
    if spec.dtype == "float16" and spec.embed_dim >= 256:
        found.append(Injected("half-precision accumulation", ("arithmetic",), option(half_sums=True), "half sums"))
    return found


def _mask_faults(
    spec: mb.MHASpec, masks: dict[str, Any], lengths: tuple[int, int], rng: np.random.Generator
) -> list[Injected]:
    def way(name: str, how: str) -> Callable[[Port], None]:
        return lambda port: port.options.setdefault("masks", {}).update({name: how})

    found = []
    for name in ("key_padding_mask", "attn_mask"):
        if name not in masks:
            continue
        ways = {"ignored": "mask ignored"}
        if masks[name].dtype.kind == "b":
            ways.update({"inverted": "mask inverted", "added": "mask added as 1.0"})
            ways.update({"times scores": "mask multiplied", "times softmax": "mask multiplied"})
        else:
            ways["subtracted"] = "mask subtracted"
        found += [Injected(called, (name,), way(name, how), f"mask {how}") for how, called in ways.items()]
    if masks.get("is_causal"):
        found.append(Injected("causal mask missing", ("is_causal",), way("is_causal", "ignored"), "causal missing"))
        for how, called in (("strict", "strict"), ("inverted", "inverted"), ("past", "inverted")):
            names = f"causal mask {called}", ("is_causal",)
            found.append(Injected(*names, lambda p, how=how: p.options.update(causal=how), f"causal {how}"))
        if lengths[0] != lengths[1]:
            change = {"causal": "corner"}
            found.append(
                Injected(
                    "causal mask at the other corner", ("is_causal",), lambda p: p.options.update(change), "corner"
                )
            )
    return found


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a diagnosis gets, and what it should say."""

    spec: mb.MHASpec
    weights: mb.MHAWeights
    inputs: tuple[np.ndarray, ...]
    call: dict[str, Any]
    observed: dict[str, np.ndarray]
    expected: Accuracy
    injected: tuple[Injected, ...]
    layout: str
    returned: str


def _observe(port: Port, dtype: str, returned: str) -> dict[str, np.ndarray]:
    out, weights = attention(port, dtype)
    out = out if port.spec.batch_first else out.swapaxes(0, 1)
    found = {"output": dtypes.round_to(np.ascontiguousarray(out), dtype)}
    if returned == "none":
        return found
    how = port.options.get("returned", returned)
    kept = {"mean": weights.mean(axis=1), "sum": weights.sum(axis=1), "heads": weights}[how]
    return {**found, "attn_weights": dtypes.round_to(kept, dtype)}


def draw(
    seed: int, count: int, dtype: str = "", sizes: tuple[int, ...] = (16, 32, 64, 128), group: str = ""
) -> Trial | None:
    """A port with that many faults, drawn by ``seed``; None if these do not show beyond rounding, each by itself.

    Args:
        seed: draws everything.
        count: of faults: 0, 1 or 2.
        dtype: "" draws one.
        sizes: of embed_dim.
        group: of the first fault; "" draws one.
    """
    rng = np.random.default_rng([seed, 17])
    dtype = dtype or _pick(rng, ["float32", "float16", "bfloat16"])
    e, heads = int(_pick(rng, sizes)), int(_pick(rng, [1, 2, 4, 8, 4, 2]))
    layout = _pick(rng, LAYOUTS)
    options: dict[str, Any] = {"batch_first": bool(rng.integers(2)), "dtype": dtype, "bias": rng.random() < 0.85}
    if layout != "megengine" and rng.random() < 0.2:
        options.update(_pick(rng, [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": e // 2, "vdim": e // 4}]))
    spec = mb.MHASpec(e, heads, **options)
    n, target = int(rng.integers(2, 4)), int(rng.integers(4, 9))
    source = target if rng.random() < 0.5 else int(target + rng.integers(1, 5))
    lengths = {"batch": n, "target": target, "source": source}
    masks = random_masks(
        _pick(rng, ["none", "none", "padding", "bool", "causal", "float", "padding+causal"]), spec, seed, **lengths
    )
    returned = _pick(rng, ["none", "mean", "heads"])
    inputs = random_inputs(spec, seed, **lengths)
    weights = mb.MHAWeights.random(spec, seed=seed)
    arrays = {name: a if spec.batch_first else a.swapaxes(0, 1) for name, a in inputs.items()}
    clean = Port(spec, layout, weights.to_layout(layout, spec), arrays, masks)
    known = injections(spec, masks, (target, source), rng, returned)
    chosen = _chosen(known, count, group, rng)
    if chosen is None:
        return None
    call = {**masks, "average_attn_weights": returned != "heads"}
    trial = Trial(spec, weights, tuple(inputs.values()), call, {}, Accuracy(dtype), tuple(chosen), layout, returned)
    port = _faulty(clean, chosen)
    with np.errstate(all="ignore"):
        trial = dataclasses.replace(trial, observed=_observe(port, dtype, returned))
        return trial if not chosen or _shows(trial, clean, chosen) else None


def _chosen(known: list[Injected], count: int, group: str, rng: np.random.Generator) -> list[Injected] | None:
    first = [each for each in known if not group or each.group == group]
    if count and not first:
        return None
    if count == 0:
        return []
    chosen = [_pick(rng, first)]
    if count == 2:
        # Precision is no second fault: whatever is wrong, the bounds are those of the expected arithmetic.
        others = [e for e in known if e.group != chosen[0].group and "half" not in e.group + chosen[0].group]
        if not others or not _together(chosen[0], other := _pick(rng, others)):
            return None
        chosen.append(other)
    return chosen


def _together(first: Injected, second: Injected) -> bool:
    """Two that use one switch of ``attention`` are no pair."""
    if all(each.name == "projection transposed" for each in (first, second)):
        return False  # transposed twice
    scales = [each.name.startswith("scale") for each in (first, second)]
    masks = {each.where for each in (first, second) if "mask" in each.name}
    return not all(scales) and len(masks) == sum("mask" in each.name for each in (first, second))


def _faulty(clean: Port, chosen: list[Injected]) -> Port:
    port = clean.copy()
    for each in chosen:
        each.do(port)
    return port


def _shows(trial: Trial, clean: Port, chosen: list[Injected]) -> bool:
    """Whether what is observed is beyond rounding without any of the faults, and without each single one."""
    if min(np.isfinite(dtypes.to_float64(array)).mean() for array in trial.observed.values()) < 0.25:
        return False
    prepared = prepare(trial.spec, trial.weights, *trial.inputs, **trial.call)
    for left_out in range(len(chosen)):
        rest = [each for i, each in enumerate(chosen) if i != left_out]
        port = _faulty(clean, rest)
        exact = _observe(port, "float64", trial.returned)
        plain = _observe(clean, "float64", trial.returned)
        limits = bounds(prepared, trial.weights, plain, trial.expected)
        if all(_inside(trial.observed[name], exact[name], plain[name], limits[name]) for name in exact):
            return False
    return True


def _inside(observed: np.ndarray, exact: np.ndarray, plain: np.ndarray, bound: Any) -> bool:
    if observed.shape != exact.shape:
        return False
    if exact.shape != plain.shape:
        return bool(np.allclose(dtypes.to_float64(observed), exact, atol=float(np.max(bound.each)), equal_nan=True))
    return judge(observed, exact, bound).ok


def right(trial: Trial, faults: Any) -> bool:
    """Whether exactly the injected faults are named, each where it is."""
    left = list(trial.injected)
    for fault in faults:
        match = next((each for each in left if each.name == fault.name and fault.where in each.where), None)
        if match is None:
            return False
        left.remove(match)
    return not left
