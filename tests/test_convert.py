"""``mb.convert``: a live layer in another framework, bit for bit, with its state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.errors import ArgumentTypeError, BackendError, UnsupportedError

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

KINDS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"dropout": 0.25},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_to_mindspore_and_back(kind: dict[str, Any], training: bool) -> None:
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    layer = torch.nn.MultiheadAttention(16, 4, **kind).train(training)
    layer.out_proj.weight.requires_grad_(False)
    moved = mb.convert(layer, to="mindspore")
    assert isinstance(moved, mindspore.nn.MultiheadAttention)
    assert moved.training == training
    assert {p.name for p in moved.get_parameters() if not p.requires_grad} == {"out_proj.weight"}
    back = mb.convert(moved, to="torch")
    assert mb.extract(back) == mb.extract(layer)
    assert back.training == training
    assert [n for n, p in back.named_parameters() if not p.requires_grad] == ["out_proj.weight"]
    for name, tensor in layer.state_dict().items():
        assert tensor.numpy().tobytes() == back.state_dict()[name].numpy().tobytes()


def test_what_no_native_class_computes_moves_as_a_drop_in() -> None:
    pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    from mhabridge.adapters.mindspore import MultiheadAttention

    spec = mb.MHASpec(16, 4, kdim=6, scale=0.3, residual=True, out_dropout=0.5)
    layer = mb.build(spec, "torch", mb.MHAWeights.random(spec)).eval()
    layer.k_proj_weight.requires_grad_(False)
    notes: list[str] = []
    moved = mb.convert(layer, to="mindspore", notes=notes)
    assert isinstance(moved, MultiheadAttention)
    assert notes[0].startswith("composed: the drop-in: out_dropout is 0.5")
    assert not moved.training
    assert [name for name, parameter in moved.parameters_and_names() if not parameter.requires_grad] == [
        "k_proj_weight"
    ]
    assert mb.extract(moved) == mb.extract(layer)
    assert mb.extract(mb.convert(moved, to="torch")) == mb.extract(layer)


def test_a_drop_in_of_a_plain_layer_moves_to_the_native_class() -> None:
    layer = mb.build(mb.MHASpec(16, 4), "torch", mode="composed")
    moved = mb.convert(layer, to="torch")
    assert type(moved) is torch.nn.MultiheadAttention
    assert mb.extract(moved) == mb.extract(layer)


def test_packed_parameters_must_be_frozen_together() -> None:
    layer = torch.nn.MultiheadAttention(16, 4, kdim=6)
    layer.q_proj_weight.requires_grad_(False)
    again = mb.convert(layer, to="torch")  # separate there too
    assert not again.q_proj_weight.requires_grad
    assert again.k_proj_weight.requires_grad


def test_the_way_through_a_file_is_named_and_works(tmp_path: Any) -> None:
    layer = torch.nn.MultiheadAttention(16, 4)
    with pytest.raises(BackendError, match=r"np\.savez"):
        mb.convert(layer, to="megengine")
    spec, weights = mb.extract(layer)
    np.savez(tmp_path / "layer.npz", **weights.to_layout("megengine", spec))
    from mhabridge.checkpoint import read_attention

    _, found, _ = read_attention(tmp_path / "layer.npz", "", num_heads=4, embed_dim=16, kdim=None, vdim=None)
    assert found == weights


def test_what_is_no_layer_or_framework_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="attention layer"):
        mb.convert(torch.nn.Linear(2, 2), to="mindspore")
    with pytest.raises(mb.ArgumentError, match="torch, mindspore, megengine"):
        mb.convert(torch.nn.MultiheadAttention(16, 4), to="jax")


def test_frozen_parts_of_a_packed_parameter_are_refused() -> None:
    from mhabridge.live import Traits

    traits = Traits(True, {"q_weight": False, "k_weight": True})
    with pytest.raises(UnsupportedError, match="q_weight"):
        traits.all_alike(["q_weight", "k_weight"], "in_proj_weight")
    assert traits.all_alike(["k_weight"], "x") is True
