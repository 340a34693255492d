"""One call's arguments from one dialect to another."""

from __future__ import annotations

import warnings
from itertools import permutations
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import arguments
from mhabridge.errors import ArgumentTypeError, UnsupportedError

QKV = ("q", "k", "v")
CALLABLE = ("torch@1.8.1", "torch", "mindspore", "megengine", "megengine.functional", "numpy")


def translate(source: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    positional, keywords = mb.translate_call(source, target, (*QKV, *args), kwargs)
    assert positional == QKV
    return keywords


def test_positional_order_differs() -> None:
    assert translate("torch", "megengine", "pad", False, "mask") == {
        "key_padding_mask": "pad",
        "attn_mask": "mask",
        "need_weights": False,
        "average_attn_weights": True,
    }
    back = translate("megengine", "torch", "pad", "mask", False)
    assert (back["attn_mask"], back["need_weights"]) == ("mask", False)


@pytest.mark.parametrize(("source", "target"), list(permutations(CALLABLE, 2)))
def test_defaults_keep_their_meaning(source: str, target: str) -> None:
    kwargs = translate(source, target)
    weights = _meaning(source, "need_weights", {})
    assert _meaning(target, "need_weights", kwargs) == weights
    if weights:  # without them it does not matter over what they are averaged
        assert _meaning(target, "average_attn_weights", kwargs) == _meaning(source, "average_attn_weights", {})


def _meaning(spoken: str, field: str, kwargs: dict[str, Any]) -> Any:
    entry = arguments.dialect(spoken).argument_for(field)
    if entry is None:
        return arguments.literal(arguments.dialect(spoken).fixed_for(field).value)
    return kwargs.get(entry.name, entry.default_value)


@pytest.mark.parametrize(("source", "target"), list(permutations(CALLABLE, 2)))
def test_masks_and_need_weights_arrive_as_the_same_objects(source: str, target: str) -> None:
    given: dict[str, Any] = {"key_padding_mask": np.zeros((1, 3), bool), "attn_mask": object(), "need_weights": True}
    if arguments.dialect(source).argument_for("average_attn_weights") is not None:
        given["average_attn_weights"] = True
    arrived = translate(source, target, **given)
    assert all(arrived.get(name, value) is value for name, value in given.items())
    assert {"key_padding_mask", "attn_mask", "need_weights"} <= set(arrived)


def test_inputs_may_be_keywords_and_come_back_positional() -> None:
    inputs = dict(zip(("query", "key", "value"), QKV, strict=True))
    assert mb.translate_call("torch", "mindspore", (), inputs) == (QKV, {})
    assert mb.translate_call("torch", "mindspore", ("q",), {"value": "v", "key": "k"}) == (QKV, {})


def test_an_average_over_weights_that_are_not_returned_says_nothing() -> None:
    assert translate("megengine", "torch@1.8.1") == {"need_weights": False}


def test_a_default_that_the_target_has_not_is_dropped() -> None:
    assert translate("torch", "torch@1.8.1", average_attn_weights=True, is_causal=False) == {}
    assert translate("megengine", "mindspore", maybe_cudnn_style_mask=False)["need_weights"] is False


@pytest.mark.parametrize(
    ("source", "target", "kwargs", "message"),
    [
        (
            "torch",
            "torch@1.8.1",
            {"average_attn_weights": False},
            "average_attn_weights: given False for PyTorch 1.8.1",
        ),
        ("torch", "torch@1.8.1", {"average_attn_weights": np.False_}, "average_attn_weights: given"),
        ("megengine", "torch@1.8.1", {"need_weights": True}, "average_attn_weights: given False"),
        ("torch", "mindspore", {"is_causal": True, "attn_mask": "m"}, "is_causal: given True for MindSpore.*attn_mask"),
        ("torch", "megengine", {"is_causal": True}, "is_causal: given True for MegEngine.*hint"),
        ("numpy", "torch", {"is_causal": True, "attn_mask": "m"}, "is_causal: given True for PyTorch.*hint"),
        ("megengine", "torch", {"maybe_cudnn_style_mask": True}, "maybe_cudnn_style_mask: given True.*decode_cudnn"),
        ("numpy", "torch", {"fully_masked": "zero"}, "fully_masked: given 'zero' for PyTorch"),
        ("numpy", "torch", {"training": True}, r"training: given True.*layer.train\(\)"),
        ("torch", "mindspore", {"has_bias": True}, "has_bias.*MindSpore's name"),
        ("torch", "mindspore", {"embed_dim": 8}, "embed_dim.*belongs to the layer"),
    ],
)
def test_what_the_target_cannot_say_is_refused(source: str, target: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        translate(source, target, **kwargs)


@pytest.mark.parametrize(
    ("target", "name", "dtype", "accepted"),
    [
        ("torch", "attn_mask", "bool", True),
        ("torch", "attn_mask", "float32", True),
        ("torch", "attn_mask", "uint8", False),
        ("torch", "attn_mask", "int64", False),
        ("torch@1.8.1", "key_padding_mask", "uint8", True),
        ("torch@1.8.1", "key_padding_mask", "float32", False),
        ("mindspore", "key_padding_mask", "uint8", False),
        ("mindspore", "attn_mask", "uint8", True),
        ("megengine", "attn_mask", "float16", True),
    ],
)
def test_a_mask_that_the_target_would_misread_is_refused(target: str, name: str, dtype: str, accepted: bool) -> None:
    mask = np.zeros((2, 2), dtype)
    if accepted:
        assert translate("numpy", target, **{name: mask})[name] is mask
    else:
        with pytest.raises(UnsupportedError, match=f"{name}: given a {dtype.rstrip('0123456789') or dtype}"):
            translate("numpy", target, **{name: mask})


KINDS = {"bool": "bool", "uint8": "uint8", "float": "float32"}


@pytest.mark.parametrize(("padding", "attn"), [("bool", "float"), ("float", "bool"), ("float", "uint8")])
@pytest.mark.parametrize("target", ["mindspore", "mindspore@2.0", "mindspore@2.12"])
def test_masks_that_mindspore_misreads_together_are_refused(target: str, padding: str, attn: str) -> None:
    masks = {"key_padding_mask": np.zeros((1, 3), KINDS[padding]), "attn_mask": np.zeros((3, 3), KINDS[attn])}
    with pytest.raises(UnsupportedError) as caught:
        translate("numpy", target, **masks)
    assert caught.value.subject == "key_padding_mask, attn_mask"
    assert caught.value.given.startswith(f"a {padding} key_padding_mask with a {attn} attn_mask for MindSpore")
    assert "both bool or uint8, or both float" in caught.value.expected
    assert "Give both as float" in caught.value.advice
    for name, mask in masks.items():
        assert translate("numpy", target, **{name: mask})[name] is mask


@pytest.mark.parametrize(("padding", "attn"), [("bool", "float"), ("float", "bool")])
@pytest.mark.parametrize("target", ["torch", "megengine", "megengine.functional", "numpy"])
def test_mixed_masks_go_where_each_keeps_its_meaning(target: str, padding: str, attn: str) -> None:
    masks = {"key_padding_mask": np.zeros((1, 3), KINDS[padding]), "attn_mask": np.zeros((3, 3), KINDS[attn])}
    arrived = translate("mindspore", target, **masks)
    assert all(arrived[name] is mask for name, mask in masks.items())


BLOCKED = {
    "key_padding_mask": np.array([[0, 0, 1], [0, 1, 1]], bool),
    "attn_mask": np.triu(np.ones((3, 3), bool), 1),
}


NATIVE = mb.MHASpec(8, 2, batch_first=True)


@pytest.fixture(scope="module")
def layers() -> dict[str, Any]:
    for name in ("torch", "mindspore"):
        pytest.importorskip(name, reason=f"{name} is not installed here")
    weights = mb.MHAWeights.random(NATIVE)
    built = {name: mb.build(NATIVE, name, weights, mode="native") for name in ("torch", "mindspore")}
    built["torch"].eval()
    return built


@pytest.mark.frameworks
class TestNative:
    """Translated calls with masks, on the native layers of PyTorch and MindSpore, for the same weights."""

    def masks(self, kinds: dict[str, str]) -> dict[str, np.ndarray]:
        stream = np.random.RandomState(0)
        floats = {name: stream.standard_normal(mask.shape).astype("float32") for name, mask in BLOCKED.items()}
        return {
            name: floats[name] if kind == "float" else BLOCKED[name].astype(KINDS[kind]) for name, kind in kinds.items()
        }

    def difference(self, layers: dict[str, Any], masks: dict[str, np.ndarray], translated: bool = True) -> float:
        """The largest difference of the two layers' outputs for the same call, as translated from PyTorch's."""
        import mindspore
        import torch

        query = np.random.RandomState(1).standard_normal((2, 3, 8)).astype("float32")
        kwargs: dict[str, Any] = {name: torch.from_numpy(mask) for name, mask in masks.items()}
        there = dict(mb.translate_call("torch", "mindspore", ("q", "k", "v"), kwargs)[1] if translated else kwargs)
        there = {name: mindspore.Tensor(value.numpy()) for name, value in there.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch announces the end of masks of two kinds
            mine = layers["torch"](*[torch.from_numpy(query)] * 3, **kwargs)[0].detach().numpy()
        theirs = layers["mindspore"](*[mindspore.Tensor(query)] * 3, **there)[0].asnumpy()
        return float(np.max(np.abs(mine - theirs)))

    @pytest.mark.parametrize(
        "kinds",
        [
            {"key_padding_mask": "bool"},
            {"key_padding_mask": "float"},
            {"attn_mask": "bool"},
            {"attn_mask": "float"},
            {"key_padding_mask": "bool", "attn_mask": "bool"},
            {"key_padding_mask": "float", "attn_mask": "float"},
        ],
        ids=str,
    )
    def test_what_is_translated_means_the_same(self, layers: dict[str, Any], kinds: dict[str, str]) -> None:
        assert self.difference(layers, self.masks(kinds)) < 1e-5

    @pytest.mark.parametrize("padding", ["bool", "float"])
    def test_what_is_refused_would_mean_something_else(self, layers: dict[str, Any], padding: str) -> None:
        other = "float" if padding == "bool" else "bool"
        masks = self.masks({"key_padding_mask": padding, "attn_mask": other})
        with pytest.raises(UnsupportedError, match="key_padding_mask, attn_mask"):
            self.difference(layers, masks)
        assert not self.difference(layers, masks, translated=False) < 1e-2  # NaN is one of the answers

    def test_a_byte_mask_beside_a_bool_one_is_read_rightly(self, layers: dict[str, Any]) -> None:
        """PyTorch 2 has no byte masks, so the call is that of 1.8.1."""
        import mindspore

        masks = self.masks({"key_padding_mask": "bool", "attn_mask": "uint8"})
        masks["attn_mask"] *= 7
        arrived = mb.translate_call("torch@1.8.1", "mindspore", ("q", "k", "v"), masks)[1]
        assert arrived["attn_mask"].dtype == np.uint8
        query = mindspore.Tensor(np.random.RandomState(1).standard_normal((2, 3, 8)).astype("float32"))
        given = {name: mindspore.Tensor(arrived[name]) for name in masks}
        plain = {name: mindspore.Tensor(mask) for name, mask in BLOCKED.items()}
        outputs = [layers["mindspore"](query, query, query, **kwargs)[0].asnumpy() for kwargs in (given, plain)]
        assert np.abs(outputs[0] - outputs[1]).max() < 1e-6


def test_a_hint_goes_to_a_hint_and_to_the_canonical_flag() -> None:
    assert translate("torch", "megengine", is_causal=True, attn_mask="m")["is_causal"] is True
    assert translate("torch", "numpy", is_causal=True, attn_mask="m")["is_causal"] is True


def test_cudnn_style_masks_stay_between_megengines_dialects() -> None:
    pair = np.zeros((2, 4), "int32")
    kwargs = {"attn_mask": pair, "key_padding_mask": pair, "maybe_cudnn_style_mask": True}
    arrived = translate("megengine", "megengine.functional", **kwargs)
    assert arrived == kwargs


class TestFunctional:
    """One call of the function is a layer and a call at once."""

    LAYER = (16, 4, 0.0, 0.0, "weights")

    def test_the_layers_arguments_are_for_the_spec(self) -> None:
        args, kwargs = (*self.LAYER, 8, 8), {"attn_mask": "m", "need_weights": True}
        assert translate("megengine.functional", "torch", *args, **kwargs) == {
            "attn_mask": "m",
            "need_weights": True,
            "average_attn_weights": False,
        }
        layer = dict(zip(("embed_dim", "num_heads", "attn_drop", "out_drop"), self.LAYER, strict=False))
        assert mb.MHASpec.from_kwargs("megengine.functional", **layer, qproj_size=8, kproj_size=8).scale == 0.5

    @pytest.mark.parametrize("training", [True, False])
    def test_training_without_dropout_says_nothing(self, training: bool) -> None:
        assert "training" not in translate("megengine.functional", "torch", *self.LAYER, training=training)

    @pytest.mark.parametrize("kwargs", [{"training": False}, {"training": True}, {"attn_drop": 0.1, "out_drop": 0.0}])
    def test_training_that_matters_is_refused(self, kwargs: dict[str, Any]) -> None:
        with pytest.raises(UnsupportedError, match=r"training: given \w+ for PyTorch.*layer.train\(\)"):
            translate("megengine.functional", "torch", **kwargs)

    def test_training_is_carried_where_it_can_be_said(self) -> None:
        assert translate("megengine.functional", "numpy", training=True)["training"] is True
        assert translate("numpy", "megengine.functional")["training"] is False

    def test_as_a_target_it_gets_the_calls_arguments(self) -> None:
        expected = {"need_weights": True, "average_attn_weights": True}
        assert translate("torch", "megengine.functional") == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("q", "k"), {}, "value: given nothing"),
        (("q", "k", "v"), {"query": "q"}, "query: given twice"),
        (tuple(range(9)), {}, "given 9 positional arguments; expected at most 8"),
    ],
)
def test_a_wrong_call_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        mb.translate_call("torch", "mindspore", args, kwargs)
