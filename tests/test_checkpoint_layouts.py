"""Attention layers in every layout, from file to file: there and back bit for bit, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge import dtypes, layouts
from mhabridge.checkpoint.conversion import ConversionReport, convert_checkpoint
from mhabridge.checkpoint.fingerprints import fingerprint
from mhabridge.checkpoint.formats import npz_writing, safetensors_file
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.inspection import inspect_checkpoint
from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError, UnsupportedError, WeightsError
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights
from tests.checkpoint_files import outgoing, written

NO_QKV_BIAS = {"q_bias": False, "k_bias": False, "v_bias": False}
LAYOUTS = {
    "torch": ("torch", MHASpec(8, 2), ""),
    "torch, bare": ("torch", MHASpec(8, 2), None),
    "torch without biases": ("torch", MHASpec(8, 2, bias=False), ""),
    "torch, separate": ("torch", MHASpec(8, 2, kdim=6, vdim=4), ""),
    "megengine": ("megengine", MHASpec(8, 2), ""),
    "megengine, separate": ("megengine", MHASpec(8, 2, kdim=6, vdim=4, bias=False), ""),
    "hf-bert": ("hf-bert", MHASpec(8, 2), ""),
    "hf-vit": ("hf-vit", MHASpec(8, 2, **NO_QKV_BIAS), ""),
    "hf-distilbert": ("hf-distilbert", MHASpec(8, 2), ""),
    "hf-bart": ("hf-bart", MHASpec(8, 2), ""),
    "whisper": ("whisper", MHASpec(8, 2, k_bias=False), ""),
    "fused-qkv": ("fused-qkv", MHASpec(8, 2, **NO_QKV_BIAS), ""),
    "gpt2": ("gpt2", MHASpec(8, 2), ""),
}
# What lies beside the attention under the same prefix, in real files.
BESIDE: dict[str, dict[str, np.ndarray]] = {
    "hf-bert": {"output.LayerNorm.weight": np.arange(8, dtype="f4"), "output.LayerNorm.bias": np.ones(8, "f4")},
    "gpt2": {"bias": np.tril(np.ones((1, 1, 5, 5), np.uint8)), "masked_bias": np.array(-1e4, "f4")},
}
TARGETS = [("torch", ".pth"), ("mindspore", ".ckpt"), ("megengine", ".pkl"), ("megengine", ".safetensors")]


def prefixes(said: str | None) -> list[str]:
    return [""] if said is None else ["encoder.0.attn", "encoder.1.attn"]


def file_of(folder: Path, name: str) -> Path:
    """A .npz of one or two layers in a layout, and of some tensors beside them."""
    layout, spec, said = LAYOUTS[name]
    named: dict[str, np.ndarray] = {}
    for seed, prefix in enumerate(prefixes(said)):
        named.update(MHAWeights.random(spec, seed=seed).to_layout(layout, spec, prefix=prefix))
        named.update({f"{prefix}.{leaf}": array for leaf, array in BESIDE.get(layout, {}).items()})
    if said is not None:
        named["wte.weight"] = np.arange(24, dtype="f4").reshape(6, 4)
    np.savez(folder / "source.npz", **named)
    return folder / "source.npz"


def contents(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_checkpoint(file) as opened:
        return {
            name: (tensor.dtype, tensor.shape, b"".join(map(bytes, opened.chunks(tensor))))
            for name, tensor in opened.items()
        }


def specs_of(name: str) -> Any:
    """What has to be said of a file of this layout: its shapes tell all but of a packed vector."""
    layout, spec, _ = LAYOUTS[name]
    return {"spec": spec} if layout == "megengine" else {"num_heads": spec.num_heads}


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name: str, target: tuple[str, str], tmp_path: Path) -> None:
    layout, spec, said = LAYOUTS[name]
    (to, ending), source = target, file_of(tmp_path, name)
    there, back = tmp_path / f"there{ending}", tmp_path / "back.npz"
    first = convert_checkpoint(source, there, to=to, **specs_of(name))
    assert first.verified
    second = convert_checkpoint(there, back, to="torch", layout=layout)
    assert second.verified
    assert sorted(contents(back)) == sorted(contents(source))
    assert contents(back) == contents(source)
    found = fingerprint(source, spec=specs_of(name).get("spec"))
    assert fingerprint(there) == dataclasses_replaced(found, there)
    assert fingerprint(back).attention == found.attention
    blocks = inspect_checkpoint(there).blocks
    assert [(block.prefix, block.spec, block.heads_known) for block in blocks] == [
        (prefix, spec, True) for prefix in prefixes(said)
    ]


def dataclasses_replaced(found: Any, file: Path) -> Any:
    """A fingerprint, but for how many tensors the other layout has."""
    return type(found)(found.attention, found.all, found.layers, len(contents(file)))


def test_the_values_are_those_of_the_canonical_weights(tmp_path: Path) -> None:
    """A round trip hides a symmetric error: here one way is compared with the weights themselves."""
    for name in LAYOUTS:
        _, spec, said = LAYOUTS[name]
        source = file_of(tmp_path, name)
        for to in ("torch", "mindspore", "megengine"):
            convert_checkpoint(source, tmp_path / "there.npz", to=to, force=True, **specs_of(name))
            with open_checkpoint(tmp_path / "there.npz") as opened:
                arrays = {one: opened.read(one) for one in opened}
            for seed, prefix in enumerate(prefixes(said)):
                wanted = MHAWeights.random(spec, seed=seed).to_layout(to, spec, prefix=prefix)
                assert all(np.array_equal(arrays[one], wanted[one]) for one in wanted), (name, to)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("to", ["torch", "mindspore", "megengine"])
def test_every_dtype(to: str, dtype: str, tmp_path: Path) -> None:
    spec = MHASpec(8, 2, dtype=dtype)
    weights = MHAWeights.random(spec, seed=4)
    named = {name: dtypes.to_words(array) for name, array in weights.to_layout("hf-bert", spec, prefix="a").items()}
    np.savez(tmp_path / "a.npz", **named)
    there, back = tmp_path / ("b.pth" if dtype == "bfloat16" else "b.pkl"), tmp_path / "back.npz"
    assert convert_checkpoint(tmp_path / "a.npz", there, to=to).verified
    with open_checkpoint(there) as opened:
        assert {tensor.dtype for tensor in opened.values()} == {dtype}
    assert convert_checkpoint(there, back, to="torch", layout="hf-bert").verified
    assert contents(back) == contents(tmp_path / "a.npz")


# -- zeros that stand in for absent biases -----------------------------------------------------------------------------


def test_a_bias_that_stands_in_is_listed_and_recorded(tmp_path: Path) -> None:
    source, there = file_of(tmp_path, "whisper"), tmp_path / "there.pth"
    report = convert_checkpoint(source, there, to="torch")
    rules = {entry.target: entry.rule for entry in report.entries}
    assert rules["encoder.0.attn.in_proj_bias"].endswith("; zeros for k_bias, which it cannot be without")
    assert fingerprint(there).attention == fingerprint(source).attention
    sidecar = tmp_path / "there.pth.mhabridge.json"
    fields = json.loads(sidecar.read_text())["attention"]["encoder.0.attn"]
    assert (fields["k_bias"], "num_heads" in fields) == (False, False)
    sidecar.unlink()  # then nothing tells that zeros are not the layer's own
    assert fingerprint(there).attention != fingerprint(source).attention
    assert convert_checkpoint(there, tmp_path / "bart.npz", to="torch", layout="hf-bart").verified
    with pytest.raises(UnsupportedError, match="k_bias"):
        convert_checkpoint(there, tmp_path / "back.npz", to="torch", layout="whisper")
    given = MHASpec(8, 2, k_bias=False)
    assert convert_checkpoint(there, tmp_path / "back.npz", to="torch", layout="whisper", spec=given).verified
    assert contents(tmp_path / "back.npz") == contents(source)


def test_a_stand_in_that_is_not_zero_any_more_is_not_lost(tmp_path: Path) -> None:
    source, there = file_of(tmp_path, "whisper"), tmp_path / "there.npz"
    convert_checkpoint(source, there, to="torch")
    with np.load(there) as loaded:
        arrays = dict(loaded)
    arrays["encoder.0.attn.in_proj_bias"][9] = 1e-9
    np.savez(there, **arrays)
    assert fingerprint(there).attention != fingerprint(source).attention
    with pytest.raises(WeightsError, match=r"encoder\.0\.attn: k_bias"):
        convert_checkpoint(there, tmp_path / "back.npz", to="torch", layout="whisper")


# -- what must be said, and what is refused ----------------------------------------------------------------------------


def test_a_packed_vector_with_several_readings_is_refused_with_all_of_them(tmp_path: Path) -> None:
    source = file_of(tmp_path, "megengine, separate")
    with pytest.raises(ArgumentError) as caught:
        convert_checkpoint(source, tmp_path / "there.pth", to="torch")
    assert "embed_dim=8, bias=False, kdim + vdim = 10; or " in str(caught.value)
    info = inspect_checkpoint(source)  # inspecting tells the same and goes on
    assert len(info.tensors) == 3
    assert "embed_dim=8, bias=False, kdim + vdim = 10; or " in info.notes[-1]
    wrong = MHASpec(8, 2, bias=False)
    with pytest.raises(ArgumentError, match="no layer of that"):
        convert_checkpoint(source, tmp_path / "there.pth", to="torch", spec=wrong)
    spec = LAYOUTS["megengine, separate"][1]
    by_prefix = {"encoder.0.attn": spec, "encoder.1.attn": spec}
    assert convert_checkpoint(source, tmp_path / "there.pth", to="torch", spec=by_prefix).verified
    assert not list(tmp_path.glob("*.part"))


def test_specs_must_be_of_layers_that_are_there(tmp_path: Path) -> None:
    source = file_of(tmp_path, "hf-bert")
    with pytest.raises(ArgumentError, match=r"'encoder\.9'.*encoder\.0\.attn, encoder\.1\.attn"):
        convert_checkpoint(source, tmp_path / "there.pth", to="torch", spec={"encoder.9": MHASpec(8, 2)})
    with pytest.raises(ArgumentTypeError, match="spec"):
        convert_checkpoint(source, tmp_path / "there.pth", to="torch", spec={"encoder.0.attn": 8})
    with pytest.raises(WeightsError, match="expected shape"):
        convert_checkpoint(source, tmp_path / "there.pth", to="torch", spec=MHASpec(16, 2))


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "llama": (
        {f"attn.{name}.weight": (8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "LLaMA, Mistral, Qwen",
    ),
    "grouped-query, whisper's names": (
        {
            **{f"attn.{name}_proj.weight": (4, 8) for name in "kv"},
            **{f"attn.{name}.weight": (8, 8) for name in ("q_proj", "out_proj")},
        },
        "grouped-query or multi-query attention",
    ),
    "head-interleaved": ({"attn.query_key_value.weight": (24, 8), "attn.dense.weight": (8, 8)}, "head-interleaved"),
    "fused Wqkv": ({"attn.Wqkv.weight": (24, 8)}, "fused Wqkv"),
    "gpt-bigcode": (
        {
            "attn.c_attn.weight": (12, 8),
            "attn.c_attn.bias": (12,),
            "attn.c_proj.weight": (8, 8),
            "attn.c_proj.bias": (8,),
        },
        "multi-query",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused_by_name(name: str, tmp_path: Path) -> None:
    shapes, said = REFUSED[name]
    np.savez(tmp_path / "a.npz", **{path: np.ones(shape, "f4") for path, shape in shapes.items()})
    with pytest.raises(UnsupportedError, match=said):
        convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.pth", to="torch")
    assert convert_checkpoint(
        tmp_path / "a.npz", tmp_path / "b.pth"
    ).verified  # without a framework nothing is read into


def test_a_layout_that_cannot_hold_the_layer_is_refused(tmp_path: Path) -> None:
    spec = MHASpec(8, 2, add_bias_kv=True)
    np.savez(tmp_path / "a.npz", **MHAWeights.random(spec).to_layout("torch", spec, prefix="attn"))
    with pytest.raises(UnsupportedError, match="bias_k, bias_v"):
        convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.pkl", to="megengine", layout="megengine")
    assert convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.ckpt", to="mindspore").verified
    assert convert_checkpoint(tmp_path / "b.ckpt", tmp_path / "c.npz", to="torch").verified
    assert contents(tmp_path / "c.npz") == contents(tmp_path / "a.npz")


def test_a_bias_k_beside_a_packed_vector_tells_its_width() -> None:
    shapes = {"a.io_weight_bias": (1, 4 * 64 + 4 * 8), "a.bias_k": (1, 1, 8), "a.bias_v": (1, 1, 8)}
    found = layouts.recognise(shapes, "a", kdim=None, vdim=None)
    assert (found.layout, found.tensors) == ("megengine-dropin", tuple(shapes))
    assert {name: found.facts[name] for name in ("embed_dim", "bias", "add_bias_kv")} == {
        "embed_dim": 8,
        "bias": True,
        "add_bias_kv": True,
    }
    open_sizes = layouts.recognise(shapes, "a")
    assert (open_sizes.layout, open_sizes.facts) == ("megengine-dropin", {})
    assert "embed_dim=8, bias=True, kdim + vdim = 16" in open_sizes.notes[0]
    for wrong in ((1, 1, 7), (8,), (1, 1, 0)):
        with pytest.raises((ArgumentError, WeightsError), match=r"a\.(io_weight_bias|bias_k)"):
            layouts.recognise({**shapes, "a.bias_k": wrong}, "a", kdim=None, vdim=None)
    with pytest.raises(WeightsError, match=r"a\.bias_v"):
        layouts.recognise(
            {name: shape for name, shape in shapes.items() if name != "a.bias_v"}, "a", kdim=None, vdim=None
        )


def test_one_layer_has_one_dtype(tmp_path: Path) -> None:
    source = file_of(tmp_path, "hf-bert")
    with np.load(source) as loaded:
        arrays = dict(loaded)
    arrays["encoder.1.attn.self.key.bias"] = arrays["encoder.1.attn.self.key.bias"].astype("f8")
    np.savez(source, **arrays)
    with pytest.raises(CheckpointError, match=r"encoder\.1\.attn: given the dtypes float32, float64"):
        convert_checkpoint(source, tmp_path / "b.pth", to="torch")


# -- the number of heads -----------------------------------------------------------------------------------------------


def heads(file: Path, **said: Any) -> tuple[int | None, list[str]]:
    report = convert_checkpoint(file, file.with_name("b.npz"), to="megengine", force=True, **said)
    info = inspect_checkpoint(file.with_name("b.npz"))
    return info.blocks[0].to_dict()["spec"]["num_heads"], [note for note in report.notes if "num_heads" in note]


def test_heads_come_from_the_user_the_file_or_config_json_or_stay_unknown(tmp_path: Path) -> None:
    source = file_of(tmp_path, "hf-bert")
    assert heads(source) == (None, [])
    assert heads(source, num_heads=4) == (4, [])
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    assert heads(source) == (2, [])
    other = f"{tmp_path / 'config.json'}: it has num_attention_heads=2; num_heads=8 is given."
    assert heads(source, num_heads=8) == (8, [other])
    assert heads(source, num_heads=2) == (2, [])
    convert_checkpoint(source, tmp_path / "c.npz", to="torch", num_heads=4)
    assert heads(tmp_path / "c.npz") == (4, [])  # what travels with a file is nearer than config.json
    found, notes = heads(tmp_path / "c.npz", num_heads=8)
    assert (found, len(notes), notes[0]) == (8, 3, other)
    assert "num_heads=8 is given, and what is known of the layer says 4" in notes[1]
    for wrong in (3, 0, -1):
        with pytest.raises((ArgumentError, CheckpointError), match="num_heads"):
            heads(source, num_heads=wrong)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "rotary_dim": 4}')
    with pytest.raises(UnsupportedError, match="rotary"):
        heads(source)


def test_what_the_target_cannot_hold_is_named_with_its_layer(tmp_path: Path) -> None:
    spec = MHASpec(8, 2, add_bias_kv=True)
    np.savez(tmp_path / "a.npz", **MHAWeights.random(spec).to_layout("torch", spec, prefix="enc.1.attn"))
    with pytest.raises(UnsupportedError, match=r"^enc\.1\.attn: bias_k, bias_v: given in the spec; .* hf-bert"):
        convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.npz", to="torch", layout="hf-bert")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", r"config\.json: given no JSON"),
        ("[" * 200_000, r"config\.json: given no JSON .*nested too deep"),
        ("[2]", r"config\.json: given \[2\], which is no object"),
        ('{"n_head": "2"}', r'config\.json: n_head: given "2"; expected a positive integer'),
        ('{"n_head": 2, "num_kv_heads": 0}', r"config\.json: num_kv_heads: given 0; expected a positive"),
        ('{"n_head": 3}', r"config\.json: n_head: given 3, and encoder\.0\.attn has embed_dim 8"),
        (
            '{"n_head": 2, "hidden_size": 16}',
            r"config\.json: hidden_size: given 16, and encoder\.0\.attn has embed_dim",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_named_and_only_a_note_beside_num_heads(
    config: str, said: str, tmp_path: Path
) -> None:
    source = file_of(tmp_path, "hf-bert")
    (tmp_path / "config.json").write_text(config)
    for fails in (lambda: heads(source), lambda: fingerprint(source)):
        with pytest.raises(CheckpointError, match=said + ".*--num-heads"):
            fails()
    assert "--num-heads" in inspect_checkpoint(source).notes[0]
    found, notes = heads(source, num_heads=2)
    assert found == 2
    assert any("config.json" in note and "num_heads=2 does not come from there" in note for note in notes)
    fingerprint(source, num_heads=2)
    assert convert_checkpoint(source, tmp_path / "c.npz", to="torch", num_heads=2).verified
    assert heads(tmp_path / "c.npz")[0] == 2  # travels, so that config.json is not asked


def test_a_config_of_one_width_does_not_tell_the_heads_of_others(tmp_path: Path) -> None:
    named = {
        **MHAWeights.random(MHASpec(8, 2)).to_layout("torch", MHASpec(8, 2), prefix="wide"),
        **MHAWeights.random(MHASpec(6, 2)).to_layout("torch", MHASpec(6, 2), prefix="narrow"),
    }
    np.savez(tmp_path / "a.npz", **named)
    for config in ('{"n_head": 4}', '{"n_head": 2, "hidden_size": 8}'):
        (tmp_path / "config.json").write_text(config)
        info = inspect_checkpoint(tmp_path / "a.npz")
        assert [block.heads_known for block in info.blocks] == [True, False]
        assert "narrow has embed_dim 6: that layer's number of heads is not taken from there." in info.notes[0]
    (tmp_path / "config.json").write_text('{"n_head": 2, "hidden_size": 8, "true_hidden_size": 6}')
    assert all(block.heads_known for block in inspect_checkpoint(tmp_path / "a.npz").blocks)


@pytest.mark.timeout(30)
def test_names_of_many_dots_take_no_time(tmp_path: Path) -> None:
    deep = "a." * 25_000
    named = {"." * 55_000 + "w": np.ones(2), f"{deep}fc.weight": np.ones((2, 2))}
    named |= MHAWeights.random(MHASpec(8, 2)).to_layout("torch", MHASpec(8, 2), prefix=f"{deep}self_attn")
    source = tmp_path / "a.safetensors"
    written(source, safetensors_file, [outgoing(name, "float32", array) for name, array in named.items()], [], {})
    (block,) = inspect_checkpoint(source).blocks
    assert block.prefix == f"{deep}self_attn"
    fingerprint(source)
    first = tmp_path / "b.safetensors"
    assert convert_checkpoint(source, first, to="mindspore", kinds={"*": "linear"}).verified
    assert convert_checkpoint(first, tmp_path / "c.safetensors", rename=f"{deep}*=b.*").verified
    assert inspect_checkpoint(tmp_path / "c.safetensors").blocks[0].prefix == "b.self_attn"


# -- what travels with a file ------------------------------------------------------------------------------------------


def travelling(tmp_path: Path, ending: str) -> ConversionReport:
    return convert_checkpoint(file_of(tmp_path, "whisper"), tmp_path / f"a{ending}", to="megengine", num_heads=2)


@pytest.mark.parametrize("ending", [".safetensors", ".safetensors.index.json", ".pkl", ".ckpt", ".pth", ".npz"])
def test_specs_travel_inside_or_beside(ending: str, tmp_path: Path) -> None:
    assert travelling(tmp_path, ending).verified
    beside = tmp_path / f"a{ending}.mhabridge.json"
    assert beside.exists() == ("safetensors" not in ending)
    assert fingerprint(tmp_path / f"a{ending}").attention == fingerprint(tmp_path / "source.npz").attention
    # They go on when only the container changes, whatever it is.
    assert convert_checkpoint(tmp_path / f"a{ending}", tmp_path / "b.pkl").verified
    assert convert_checkpoint(tmp_path / "b.pkl", tmp_path / "c.safetensors", rename="encoder.*=model.*").verified
    assert [block.prefix for block in inspect_checkpoint(tmp_path / "c.safetensors").blocks] == [
        "model.0.attn",
        "model.1.attn",
    ]


def test_specs_are_found_when_the_layers_are_renamed(tmp_path: Path) -> None:
    travelling(tmp_path, ".pkl")
    report = convert_checkpoint(tmp_path / "a.pkl", tmp_path / "b.npz", to="torch", rename=["encoder.*=deep.*"])
    assert report.verified
    assert convert_checkpoint(tmp_path / "b.npz", tmp_path / "c.npz", to="torch", layout="whisper").verified
    assert {name.partition(".")[0] for name in contents(tmp_path / "c.npz")} == {"deep", "wte"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"mhabridge": 2, "framework": "torch", "attention": {}, "kinds": {}}',
        '{"mhabridge": 1, "framework": 3, "attention": {}, "kinds": {}}',
        '{"mhabridge": 1, "framework": "torch", "attention": [], "kinds": {}}',
        '{"mhabridge": 1, "framework": "torch", "attention": {}, "kinds": {"a": 1}}',
        '{"mhabridge": 1, "framework": "torch", "attention": {"a": {}}, "kinds": {}}',
        '{"mhabridge": 1, "framework": "torch", "attention": {"a": {"layout": "no"}}, "kinds": {}}',
        '{"mhabridge": 1, "framework": "torch", "attention": {"a": {"layout": "torch", "embed_dim": -1}}, "kinds": {}}',
        '{"mhabridge": 1, "framework": "torch", "attention": {"a": {"layout": "torch", "embd": 4}}, "kinds": {}}',
        '{"mhabridge": 1, "framework": "torch", "attention": {"a": {"layout": "llama", "embed_dim": 8}}, "kinds": {}}',
        "[" * 100_000,
    ],
)
def test_damaged_ones_are_refused(text: str, tmp_path: Path) -> None:
    source = file_of(tmp_path, "torch")
    source.with_name("source.npz.mhabridge.json").write_text(text)
    for use in (lambda: convert_checkpoint(source, tmp_path / "b.pkl", to="megengine"), lambda: fingerprint(source)):
        with pytest.raises(CheckpointError, match="what mhabridge does not write there"):
            use()
    assert "what mhabridge does not write there" in inspect_checkpoint(source).notes[-1]


def test_a_framework_that_is_not_known_there_is_refused(tmp_path: Path) -> None:
    source = file_of(tmp_path, "torch")
    text = '{"mhabridge": 1, "framework": "tensorflow", "attention": {}, "kinds": {}}'
    source.with_name("source.npz.mhabridge.json").write_text(text)
    with pytest.raises(CheckpointError, match="what mhabridge does not write there"):
        convert_checkpoint(source, tmp_path / "b.pkl", to="megengine")


def test_stale_ones_are_refused(tmp_path: Path) -> None:
    travelling(tmp_path, ".npz")
    for name in ("torch, bare", "megengine, separate"):
        file_of(tmp_path, name).rename(tmp_path / "a.npz")
        with pytest.raises(CheckpointError, match=r"belongs to another file.*Was the checkpoint replaced since"):
            convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.pth", to="torch")


def test_a_kind_that_does_not_fit_is_stale(tmp_path: Path) -> None:
    source = file_of(tmp_path, "torch")
    convert_checkpoint(source, tmp_path / "a.npz", to="torch")
    text = json.loads((tmp_path / "a.npz.mhabridge.json").read_text())
    assert text["kinds"] == {"wte": "embedding"}
    text["kinds"] = {"wte": "conv2d"}
    (tmp_path / "a.npz.mhabridge.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="belongs to another file: it says that wte is a conv2d"):
        convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.ckpt", to="mindspore")


def test_an_old_one_does_not_stay_beside_a_new_file(tmp_path: Path) -> None:
    travelling(tmp_path, ".npz")
    np.savez(tmp_path / "plain.npz", x=np.ones(3, "f4"))
    with pytest.raises(CheckpointError, match=r"a\.npz"):
        convert_checkpoint(tmp_path / "plain.npz", tmp_path / "a.npz", to="torch")
    assert convert_checkpoint(tmp_path / "plain.npz", tmp_path / "a.npz", to="torch", force=True).verified
    assert inspect_checkpoint(tmp_path / "a.npz").blocks == ()
    assert json.loads((tmp_path / "a.npz.mhabridge.json").read_text())["attention"] == {}


def test_an_old_one_is_replaced_by_one_that_can_be_read_without_a_framework_too(tmp_path: Path) -> None:
    for ending in (".npz", ".ckpt", ".pth", ".pkl"):
        travelling(tmp_path, ending)
        plain, target = tmp_path / "plain.npz", tmp_path / f"a{ending}"
        np.savez(
            plain, **{"attn.in_proj_weight": np.ones((12, 4), "f4"), "attn.out_proj.weight": np.ones((4, 4), "f4")}
        )
        assert convert_checkpoint(plain, target, force=True).verified
        assert [block.layout for block in inspect_checkpoint(target).blocks] == ["torch"]
        assert fingerprint(target) == fingerprint(plain)
        assert convert_checkpoint(target, tmp_path / "b.safetensors", force=True).verified  # it travels on
        assert convert_checkpoint(tmp_path / "b.safetensors", tmp_path / "c.npz", to="torch", force=True).verified


# -- linear maps that lie the other way round --------------------------------------------------------------------------


def gpt2_file(folder: Path, inner: int, ending: str = ".safetensors") -> tuple[Path, dict[str, np.ndarray]]:
    """Two blocks of GPT-2: all their linear maps have (in, out) weights; beside them a head of the usual kind."""
    rng, named = np.random.default_rng(0), {}
    for n in range(2):
        spec = MHASpec(8, 2)
        named.update(MHAWeights.random(spec, seed=n).to_layout("gpt2", spec, prefix=f"h.{n}.attn"))
        for path, shape in (("c_fc", (8, inner)), ("c_proj", (inner, 8))):
            named[f"h.{n}.mlp.{path}.weight"] = rng.random(shape, "f4")
            named[f"h.{n}.mlp.{path}.bias"] = rng.random(shape[1], "f4")
    named["h.0.ln_1.weight"] = named["h.0.ln_1.bias"] = np.ones(8, "f4")
    named["head.weight"], named["head.bias"] = rng.random((8, 8), "f4"), rng.random(8, "f4")
    writer = safetensors_file if ending == ".safetensors" else npz_writing
    return written(folder / f"a{ending}", writer, [outgoing(*pair) for pair in typed(named)]), named


def typed(named: dict[str, np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    return [(name, "float32", array) for name, array in named.items()]


@pytest.mark.parametrize("inner", [8, 32])
@pytest.mark.parametrize(("to", "ending"), TARGETS)
def test_the_linear_maps_of_gpt2_are_turned_and_come_back(to: str, ending: str, inner: int, tmp_path: Path) -> None:
    source, named = gpt2_file(tmp_path, inner)
    target, back = tmp_path / f"b{ending}", tmp_path / "c.safetensors"
    report = convert_checkpoint(source, target, to=to, num_heads=2)
    assert report.verified
    assert report.counts["linear: (in, out) -> (out, in)"] == 8
    assert report.counts["linear"] == 2  # the head
    with open_checkpoint(target) as file:
        for path in ("h.0.mlp.c_fc", "h.1.mlp.c_proj"):
            np.testing.assert_array_equal(file.read(f"{path}.weight"), named[f"{path}.weight"].T)
            np.testing.assert_array_equal(file.read(f"{path}.bias"), named[f"{path}.bias"])
        np.testing.assert_array_equal(file.read("head.weight"), named["head.weight"])
    assert fingerprint(source) == fingerprint(target)
    assert convert_checkpoint(target, back, to="torch", layout="gpt2").verified
    with open_checkpoint(back) as file:
        assert {name: file.read(name).tobytes() for name in file} == {n: one.tobytes() for n, one in named.items()}


@pytest.mark.parametrize(
    "rules",
    [
        ["h.*.mlp.c_fc.*=h.*.mlp.fc1.*"],
        ["h.*.attn.*=h.*.attention.self.*"],
        ["h.*=transformer.h.*"],
        ["h.*.mlp.*=blocks.*.ffn.*", "h.*.attn.*=blocks.*.attn.*"],
    ],
)
def test_the_linear_maps_of_gpt2_are_turned_whatever_they_are_renamed_to(rules: list[str], tmp_path: Path) -> None:
    source, named = gpt2_file(tmp_path, 8)
    report = convert_checkpoint(source, tmp_path / "b.ckpt", to="mindspore", num_heads=2, rename=rules)
    assert report.verified
    assert report.counts["linear: (in, out) -> (out, in)"] == 8
    target = next(entry.target for entry in report.entries if entry.sources == ("h.0.mlp.c_fc.weight",))
    assert target is not None
    with open_checkpoint(tmp_path / "b.ckpt") as file:
        np.testing.assert_array_equal(file.read(target), named["h.0.mlp.c_fc.weight"].T)
    assert fingerprint(source) == fingerprint(tmp_path / "b.ckpt")


def test_who_says_that_a_map_beside_gpt2s_attention_is_linear_is_believed(tmp_path: Path) -> None:
    source, named = gpt2_file(tmp_path, 8)
    convert_checkpoint(source, tmp_path / "b.npz", to="torch", num_heads=2, kinds={"h.*.mlp.*": "linear"})
    with open_checkpoint(tmp_path / "b.npz") as file:
        np.testing.assert_array_equal(file.read("h.0.mlp.c_fc.weight"), named["h.0.mlp.c_fc.weight"])


def test_the_linear_maps_of_gpt2_stay_where_its_layout_stays(tmp_path: Path) -> None:
    source, _ = gpt2_file(tmp_path, 8)
    report = convert_checkpoint(source, tmp_path / "b.pth", to="torch", layout="gpt2")
    assert report.counts["linear: (in, out), as it is"] == 8
    assert fingerprint(source) == fingerprint(tmp_path / "b.pth")
    assert convert_checkpoint(source, tmp_path / "c.pth").counts == {"unchanged": 20}


def test_what_is_said_of_them_counts(tmp_path: Path) -> None:
    source, named = gpt2_file(tmp_path, 8)
    report = convert_checkpoint(source, tmp_path / "b.pth", to="torch", kinds={"h.0.mlp.*": "unknown"}, num_heads=2)
    assert report.counts["linear: (in, out) -> (out, in)"] == 4
    with open_checkpoint(tmp_path / "b.pth") as file:
        np.testing.assert_array_equal(file.read("h.0.mlp.c_fc.weight"), named["h.0.mlp.c_fc.weight"])
    assert convert_checkpoint(tmp_path / "b.pth", tmp_path / "c.npz", to="mindspore").verified


def test_a_linear_map_of_the_usual_kind_beside_gpt2s_attention(tmp_path: Path) -> None:
    source, named = gpt2_file(tmp_path, 32)
    turned_round = {name: one.T.copy() if "mlp" in name else one for name, one in named.items()}
    written(source, safetensors_file, [outgoing(*pair) for pair in typed(turned_round)])
    report = convert_checkpoint(source, tmp_path / "b.pth", to="torch")
    assert report.counts["linear"] == 10  # nothing but the bias says so, and it does


# -- what may be no plain attention, and what was not recognised -------------------------------------------------------


def test_whisper_as_openai_spells_it(tmp_path: Path) -> None:
    spec, source = MHASpec(8, 2, k_bias=False), tmp_path / "a.npz"
    weights = MHAWeights.random(spec)
    named = weights.to_layout("whisper-openai", spec, prefix="encoder.blocks.0.attn")
    assert sorted(name.removeprefix("encoder.blocks.0.attn.") for name in named) == [
        *("key.weight", "out.bias", "out.weight", "query.bias", "query.weight", "value.bias", "value.weight")
    ]
    np.savez(source, **named)
    np.savez(tmp_path / "hf.npz", **weights.to_layout("whisper", spec, prefix="encoder.layers.0.self_attn"))
    assert fingerprint(source) == fingerprint(tmp_path / "hf.npz")
    report = convert_checkpoint(source, tmp_path / "b.pth", to="torch")
    assert report.counts == {
        "attention: whisper-openai -> torch": 3,
        "attention: whisper-openai -> torch; zeros for k_bias, which it cannot be without": 1,
    }
    assert convert_checkpoint(tmp_path / "b.pth", tmp_path / "c.npz", to="torch", layout="whisper-openai").verified
    assert fingerprint(tmp_path / "c.npz") == fingerprint(source)


def test_attention_that_may_be_rotary_is_noted_unless_a_config_says_more(tmp_path: Path) -> None:
    source, told = tmp_path / "a.npz", "transformer.h.0.attn: read as whisper; it has no biases, as GPT-J's"
    spec = MHASpec(8, 2, bias=False)
    named = MHAWeights.random(spec).to_layout("whisper", spec, prefix="transformer.h.0.attn")
    np.savez(source, **{name: one for name, one in named.items() if name.endswith("weight")})
    assert told in " ".join(convert_checkpoint(source, tmp_path / "b.npz", to="torch", num_heads=2).notes)
    assert told in " ".join(inspect_checkpoint(source).notes)
    assert "GPT-J" not in " ".join(inspect_checkpoint(tmp_path / "b.npz").notes)
    (tmp_path / "config.json").write_text('{"model_type": "bart", "num_attention_heads": 2, "hidden_size": 8}')
    assert "GPT-J" not in " ".join(inspect_checkpoint(source).notes)
    (tmp_path / "config.json").write_text('{"model_type": "gptj", "n_head": 2, "n_embd": 8}')
    with pytest.raises(UnsupportedError, match="rotary"):
        convert_checkpoint(source, tmp_path / "c.npz", to="torch")


def test_attention_that_is_not_recognised_is_noted(tmp_path: Path) -> None:
    attention = "encoder.block.0.layer.0.SelfAttention"
    named = {f"{attention}.{name}.weight": np.ones((8, 8), "f4") for name in "qkvo"}
    named[f"{attention}.relative_attention_bias.weight"] = np.ones((32, 2), "f4")
    named["encoder.block.0.layer.1.wi.weight"] = np.ones((16, 8), "f4")
    np.savez(tmp_path / "t5.npz", **named)
    note = f"{attention}: it looks like attention (q, k, v) in no layout that is known: each is taken for a layer"
    assert note in " ".join(convert_checkpoint(tmp_path / "t5.npz", tmp_path / "b.npz", to="mindspore").notes)
    assert note in " ".join(inspect_checkpoint(tmp_path / "t5.npz").notes)
    report = convert_checkpoint(file_of(tmp_path, "hf-bert"), tmp_path / "c.npz", to="torch")
    assert "looks like attention" not in " ".join(report.notes)
