"""A fingerprint is equal for equal weights, whatever the layout, the format and the names; and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.fingerprints import Fingerprint, fingerprint
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

SPEC = MHASpec(8, 2)
Arrays = dict[str, np.ndarray]


def arrays(layout: str = "hf-bert", spec: MHASpec = SPEC, prefixes: tuple[str, ...] = ("a.0.x", "a.1.x")) -> Arrays:
    found = {}
    for seed, prefix in enumerate(prefixes):
        found.update(MHAWeights.random(spec, seed=seed).to_layout(layout, spec, prefix=prefix))
    found["fc.weight"] = np.arange(12, dtype="f4").reshape(3, 4)
    found["fc.bias"] = np.ones(3, "f4")
    return found


def of(folder: Path, named: Arrays, **options: Any) -> Fingerprint:
    np.savez(folder / "a.npz", **named)
    return fingerprint(folder / "a.npz", **options)


@pytest.mark.parametrize("layout", ["torch", "mindspore", "hf-vit", "hf-distilbert", "hf-bart", "fused-qkv", "gpt2"])
def test_it_does_not_depend_on_the_layout(layout: str, tmp_path: Path) -> None:
    found, other = of(tmp_path, arrays()), of(tmp_path, arrays(layout))
    assert (other.attention, other.all, other.layers) == (found.attention, found.all, 2)


def test_a_packed_vector_needs_its_spec(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="it could be embed_dim=8"):
        of(tmp_path, arrays("megengine"))
    assert of(tmp_path, arrays("megengine"), spec=SPEC).all == of(tmp_path, arrays()).all
    by_prefix = {"a.0.x": SPEC, "a.1.x": SPEC}
    assert of(tmp_path, arrays("megengine"), spec=by_prefix).all == of(tmp_path, arrays()).all


@pytest.mark.parametrize("ending", [".safetensors", ".safetensors.index.json", ".pth", ".ckpt", ".pkl"])
def test_it_does_not_depend_on_the_format(ending: str, tmp_path: Path) -> None:
    found = of(tmp_path, arrays())
    for to in (None, "megengine", "mindspore"):
        convert_checkpoint(tmp_path / "a.npz", tmp_path / f"b{ending}", to=to, force=True, shard_size=500)
        other = fingerprint(tmp_path / f"b{ending}")
        assert (other.attention, other.all) == (found.attention, found.all)


def test_it_does_not_depend_on_names_or_order(tmp_path: Path) -> None:
    found = of(tmp_path, arrays())
    turned = dict(reversed(arrays(prefixes=("module.b.7", "module.b.3")).items()))
    turned["module.out.weight"], turned["module.out.bias"] = turned.pop("fc.weight"), turned.pop("fc.bias")
    assert of(tmp_path, turned) == found
    assert of(tmp_path, arrays(), num_heads=4) == found  # no weight depends on it


def test_groups_of_convolutions_do_not_count(tmp_path: Path) -> None:
    """MegEngine has an axis of groups; PyTorch has none."""
    weight = np.arange(144, dtype="f4")
    named = {"conv.weight": weight.reshape(8, 2, 3, 3), "conv.bias": np.ones(8, "f4")}
    grouped = {"conv.weight": weight.reshape(4, 2, 2, 3, 3), "conv.bias": np.ones((1, 8, 1, 1), "f4")}
    assert of(tmp_path, grouped).all == of(tmp_path, named).all
    other = {"conv.weight": weight.reshape(8, 2, 9, 1), "conv.bias": np.ones(8, "f4")}
    assert of(tmp_path, other).all != of(tmp_path, named).all


def change_a_bit(named: Arrays) -> None:
    named["a.1.x.self.key.weight"].view("u4")[3, 2] ^= 1


def change_zero_to_minus_zero(named: Arrays) -> None:
    named["a.1.x.self.key.bias"][2] = -0.0


def transpose(named: Arrays) -> None:
    named["a.0.x.self.query.weight"] = named["a.0.x.self.query.weight"].T.copy()


def swap_query_and_key(named: Arrays) -> None:
    first, second = "a.0.x.self.query.weight", "a.0.x.self.key.weight"
    named[first], named[second] = named[second], named[first]


def swap_layers(named: Arrays) -> None:
    first, second = "a.0.x.self.query.weight", "a.1.x.self.query.weight"
    named[first], named[second] = named[second], named[first]


def change_the_dtype(named: Arrays) -> None:
    named.update({name: array.astype("f8") for name, array in named.items() if name.startswith("a.0")})


def lose_a_layer(named: Arrays) -> None:
    for name in [name for name in named if name.startswith("a.0")]:
        del named[name]


@pytest.mark.parametrize(
    "change",
    [
        change_a_bit,
        change_zero_to_minus_zero,
        transpose,
        swap_query_and_key,
        swap_layers,
        change_the_dtype,
        lose_a_layer,
    ],
)
def test_everything_else_counts(change: Callable[[Arrays], None], tmp_path: Path) -> None:
    named = arrays()
    named["a.1.x.self.key.bias"][2] = 0.0
    found = of(tmp_path, named)
    change(named)
    other = of(tmp_path, named)
    assert other.attention != found.attention
    assert other.all != found.all


@pytest.mark.parametrize(
    "changed",
    [
        {"fc.bias": np.ones(3, "f8")},
        {"fc.bias": np.zeros(3, "f4")},
        {"fc.weight": np.arange(12, dtype="f4").reshape(4, 3)},
        {"fc.scale": np.ones(3, "f4")},
    ],
)
def test_other_tensors_count_in_the_hash_of_all(changed: Arrays, tmp_path: Path) -> None:
    found, other = of(tmp_path, arrays()), of(tmp_path, {**arrays(), **changed})
    assert other.attention == found.attention
    assert other.all != found.all


def test_an_absent_bias_is_not_a_bias_of_zeros(tmp_path: Path) -> None:
    spec = MHASpec(8, 2, k_bias=False)
    absent = arrays("whisper", spec)
    zeros = {**absent, **{f"a.{n}.x.k_proj.bias": np.zeros(8, "f4") for n in (0, 1)}}
    assert of(tmp_path, zeros).attention != of(tmp_path, absent).attention
    assert of(tmp_path, zeros, spec=spec).attention == of(tmp_path, absent).attention
    zeros["a.0.x.k_proj.bias"][3] = 1
    assert of(tmp_path, zeros, spec=spec).attention != of(tmp_path, absent).attention


def test_a_file_without_attention_has_one_too(tmp_path: Path) -> None:
    found = of(tmp_path, {"x": np.ones(3, "f4")})
    assert (found.layers, found.tensors) == (0, 1)
    assert found.attention == of(tmp_path, {"y": np.zeros(2, "f4")}).attention
    assert found.all != of(tmp_path, {"y": np.zeros(2, "f4")}).all


def test_it_is_json(tmp_path: Path) -> None:
    found = of(tmp_path, arrays())
    assert json.loads(found.to_json()) == {
        "attention": found.attention,
        "all": found.all,
        "layers": 2,
        "tensors": 18,
    }
    assert len(found.attention) == len(found.all) == 64


def test_it_stays_the_same_from_version_to_version(tmp_path: Path) -> None:
    """People write these numbers down: changing what goes into them is a breaking change."""
    weights = {name: np.arange(64, dtype="f4").reshape(8, 8) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    named = {f"x.{name}.weight": array for name, array in weights.items()}
    named |= {f"x.{name}.bias": np.arange(8, dtype="f4") for name in weights}
    assert of(tmp_path, named).attention[:16] == "2ade9aaaa6bfe39a"


def test_what_cannot_be_read_has_none(tmp_path: Path) -> None:
    llama = {f"x.{name}.weight": np.ones((8, 8), "f4") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    with pytest.raises(UnsupportedError, match="LLaMA"):
        of(tmp_path, llama)
    (tmp_path / "b.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError):
        fingerprint(tmp_path / "b.npz")
