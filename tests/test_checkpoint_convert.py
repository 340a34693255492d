"""Whole models from one framework's file to another's, against the real frameworks: nothing lost, the same answers."""

from __future__ import annotations

import functools
import itertools
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge.backends import shipping
from mhabridge.backends.worker import Worker
from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.fingerprints import fingerprint
from mhabridge.checkpoint.formats.known import open_checkpoint
from mhabridge.checkpoint.storage import views
from mhabridge.spec import MHASpec
from tests import worker_models
from tests.conftest import _infos as infos
from tests.conftest import _ready as ready

Saved = Callable[[str], tuple[Path, np.ndarray]]
ENDINGS = {"torch": ".pth", "mindspore": ".ckpt", "megengine": ".pkl"}

SPEC = MHASpec(worker_models.E, worker_models.HEADS)

# float32 answers of a small model: 6e-6 was measured, and a forgotten transpose is off by more than 0.1.
CLOSE = 5e-5


@functools.cache
def megengine() -> Worker:
    own = Path(worker_models.__file__).read_text(encoding="utf-8")
    modules = {"mhabridge.bridge": shipping.source("mhabridge.bridge"), "trial": own}
    return Worker(infos()["megengine"].python, "megengine", extra_modules=modules)


@pytest.fixture(scope="module", autouse=True)
def _worker_ends() -> Iterator[None]:
    yield
    if megengine.cache_info().currsize:
        megengine().close()
    megengine.cache_clear()


def ask(function: str, framework: str, file: Path) -> np.ndarray:
    """Have a framework run a function of worker_models: here, or in its environment."""
    ready(framework)
    payload = {"file": str(file)}
    if infos()[framework].where == "here":
        answer: dict[str, Any] = getattr(worker_models, function)(framework, payload)
    else:
        answer = megengine().call(f"trial:{function}", payload, timeout=100)
    return np.asarray(answer["output"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Makes a model's file, written by its framework, and tells what the model answers; each once."""

    @functools.cache
    def save(framework: str) -> tuple[Path, np.ndarray]:
        file = tmp_path_factory.mktemp(framework) / f"model{ENDINGS[framework]}"
        return file, ask("save", framework, file)

    return save


def contents(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and bits of every tensor; a counter that only PyTorch has left out."""
    with open_checkpoint(file) as opened:
        return {
            name: (tensor.dtype, tensor.shape, b"".join(map(bytes, opened.chunks(tensor))))
            for name, tensor in opened.items()
            if not name.endswith("num_batches_tracked")
        }


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max())


# -- from framework to framework ---------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize("pair", list(itertools.permutations(ENDINGS, 2)), ids="->".join)
def test_a_model_answers_the_same_in_another_framework(pair: tuple[str, str], tmp_path: Path, saved: Saved) -> None:
    source, target = pair
    second, back = tmp_path / f"second{ENDINGS[target]}", tmp_path / f"back{ENDINGS[source]}"
    first, expected = saved(source)
    assert convert_checkpoint(first, second, to=target, spec=SPEC).verified
    assert distance(ask("load", target, second), expected) < CLOSE
    assert convert_checkpoint(second, back, to=source).verified
    assert contents(back) == contents(first)
    assert distance(ask("load", source, back), expected) < CLOSE
    found = [fingerprint(first, spec=SPEC), *map(fingerprint, (second, back))]
    assert len({(one.attention, one.all) for one in found}) == 1


@pytest.mark.frameworks
def test_a_way_through_all_frameworks_formats_and_versions(tmp_path: Path, saved: Saved) -> None:
    first, expected = saved("torch")
    at = first
    for number, (to, ending) in enumerate(
        [
            ("mindspore@2.0", ".ckpt"),
            ("megengine", ".safetensors"),
            ("mindspore.mint", ".safetensors.index.json"),
            ("mindspore", ".npz"),
            ("torch@1.8.1", ".pkl"),
            ("megengine", ".ckpt"),
            ("torch", ".pth"),
        ]
    ):
        target = tmp_path / f"{number}{ending}"
        assert convert_checkpoint(at, target, to=to, num_heads=worker_models.HEADS, shard_size=2000).verified
        at = target
    assert contents(at) == contents(first)
    assert distance(ask("load", "torch", at), expected) < CLOSE


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("to", "names"),
    [
        ("mindspore", {"layers.0.dense1.weight", "layers.1.norm2.gamma", "norm.gamma"}),
        ("mindspore@2.0", {"layers.0.linear1.weight", "layers.1.norm2.gamma", "norm.gamma"}),
        ("mindspore.mint", {"layers.0.dense1.weight", "layers.1.norm2.gamma", "norm.weight"}),
        ("megengine", {"layers.0.linear1.weight", "layers.1.norm2.weight", "layers.0.self_attn.io_weight_bias"}),
    ],
)
def test_names_by_framework_and_version(to: str, names: set[str], tmp_path: Path, saved: Saved) -> None:
    first, _ = saved("torch")
    report = convert_checkpoint(first, tmp_path / "a.npz", to=to, dry_run=True)
    assert {f"encoder.{name}" for name in names} <= {entry.target for entry in report.entries}
    assert not (tmp_path / "a.npz").exists()
    left_out = {entry.sources: entry.rule for entry in report.entries if entry.target is None}
    counted = (
        {} if to == "mindspore.mint" else {("bn.num_batches_tracked",): f"batch_norm: {to} has no num_batches_tracked"}
    )
    assert left_out == {key: rule.replace("@2.0", "") for key, rule in counted.items()}


@pytest.mark.frameworks
def test_encoders_and_decoders_load_as_mindspores_own(tmp_path: Path) -> None:
    torch, mindspore = pytest.importorskip("torch"), pytest.importorskip("mindspore")
    sizes = {"nhead": 3, "num_encoder_layers": 2, "num_decoder_layers": 1, "dim_feedforward": 12}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = torch.nn.Transformer(12, **sizes), mindspore.nn.Transformer(12, **sizes)
    torch.save(first.state_dict(), tmp_path / "a.pth")
    assert convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.ckpt", to="mindspore").verified
    found = mindspore.load_checkpoint(str(tmp_path / "a.ckpt"))
    assert {name: one.shape for name, one in found.items()} == {
        name: one.shape for name, one in second.parameters_dict().items()
    }
    assert "decoder.layers.0.dense2.weight" in found
    assert mindspore.load_param_into_net(second, found, strict_load=True) == ([], [])
    assert convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "b.pth", to="torch").verified
    first.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=True)
    assert contents(tmp_path / "b.pth") == contents(tmp_path / "a.pth")


@pytest.mark.frameworks
@pytest.mark.parametrize("name", ENDINGS)
def test_a_file_that_is_converted_already_is_recognised(name: str, tmp_path: Path, saved: Saved) -> None:
    first, _ = saved(name)
    report = convert_checkpoint(first, tmp_path / "a.npz", to=name, spec=SPEC)
    assert any("names and layouts already" in note for note in report.notes)
    assert all(entry.unchanged for entry in report.entries if entry.target)
    assert {entry.rule for entry in report.entries if "attn" in str(entry.target)} == {f"attention: {name}, as it is"}
    other = "torch" if name == "megengine" else "megengine"
    assert not any(
        "already" in note for note in convert_checkpoint(first, tmp_path / "b.npz", to=other, spec=SPEC).notes
    )


@pytest.mark.frameworks
def test_a_skipped_transpose_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: Saved) -> None:
    first, expected = saved("torch")
    target = tmp_path / "a.pkl"
    monkeypatch.setattr(views, "_turned", views._outgoing)
    report = convert_checkpoint(first, target, to="megengine", num_heads=worker_models.HEADS)
    assert (report.ok, report.verified, report.target) == (False, False, None)
    assert "self_attn.io_weight_bias: other numbers" in report.notes[-1]
    assert list(tmp_path.iterdir()) == []
    unverified = convert_checkpoint(first, target, to="megengine", verify=False, num_heads=worker_models.HEADS)
    assert (unverified.ok, unverified.verified) == (True, None)
    assert distance(ask("load", "megengine", target), expected) > 0.1
    assert fingerprint(target).attention != fingerprint(first).attention


@pytest.mark.frameworks
def test_tied_tensors_stay_tied_or_are_noted(tmp_path: Path, saved: Saved) -> None:
    torch = pytest.importorskip("torch")
    first, _ = saved("torch")
    kept = convert_checkpoint(first, tmp_path / "a.pth", to="torch")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert not any("one tensor in the source" in note for note in kept.notes)
    torn = convert_checkpoint(first, tmp_path / "a.ckpt", to="mindspore")
    assert (
        "embed.embedding_table, head.weight: one tensor in the source; mindspore-ckpt keeps each by itself"
        in torn.notes
    )


@pytest.mark.frameworks
def test_a_packed_tensor_and_its_parts_stay_tied_whatever_the_layout(tmp_path: Path) -> None:
    """Three layers with the same numbers: packed, its thirds by themselves, and in a linear layer."""
    torch = pytest.importorskip("torch")
    packed, out = torch.arange(48.0).reshape(12, 4), torch.arange(16.0).reshape(4, 4)
    thirds = dict(zip("qkv", packed.split(4), strict=True))
    state = {"0.attn.in_proj_weight": packed, "0.attn.out_proj.weight": out, "fc.weight": packed}
    state.update({f"1.attn.{part}_proj.weight": third for part, third in thirds.items()})
    state["1.attn.out_proj.weight"] = out
    torch.save(state, tmp_path / "a.pt")
    spec = MHASpec(4, 2, bias=False)
    report = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", to="torch", spec=spec)
    assert report.verified
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    alike = {"0.attn.in_proj_weight", "1.attn.in_proj_weight", "fc.weight"}
    assert set(found) == alike | {"0.attn.out_proj.weight", "1.attn.out_proj.weight"}
    assert all(torch.equal(found[name], packed) for name in alike)
    assert len({found[name].data_ptr() for name in alike}) == 1
    assert found["0.attn.out_proj.weight"].data_ptr() == found["1.attn.out_proj.weight"].data_ptr()


@pytest.mark.frameworks
@pytest.mark.parametrize("how", ["transposed", "with rows that are padded"])
def test_a_packed_tensor_that_is_a_view_arrives(tmp_path: Path, how: str) -> None:
    torch = pytest.importorskip("torch")
    numbers = torch.arange(200.0)
    packed = numbers[:48].reshape(4, 12).T if how == "transposed" else numbers[:120].reshape(12, 10)[:, 3:7]
    torch.save({"in_proj_weight": packed, "out_proj.weight": torch.eye(4)}, tmp_path / "a.pt")
    for to, target in (("mindspore", "b.ckpt"), ("megengine", "b.pkl")):
        spec = MHASpec(4, 2, bias=False)
        assert convert_checkpoint(tmp_path / "a.pt", tmp_path / target, to=to, spec=spec).verified
        assert convert_checkpoint(tmp_path / target, tmp_path / f"{to}.npz", to="torch", spec=spec).verified
        with np.load(tmp_path / f"{to}.npz") as found:
            np.testing.assert_array_equal(found["in_proj_weight"], packed.numpy())


@pytest.mark.frameworks
def test_a_packed_tensor_that_is_a_view_is_in_memory_by_thirds(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    packed = torch.zeros(2048, 6144).T  # 48 MiB; a third in memory, and what is turned of it
    torch.save({"in_proj_weight": packed, "out_proj.weight": torch.eye(2048)}, tmp_path / "a.pt")
    spec = MHASpec(2048, 2, bias=False)
    tracemalloc.start()
    try:
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.ckpt", to="mindspore", spec=spec, verify=False, workers=1)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
