"""``mb.load_into``: live models of every framework from files of every format, all of it or nothing."""

from __future__ import annotations

import functools
import itertools
import json
import pkgutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import checkpoint
from mhabridge.backends import backends, shipping
from mhabridge.backends.worker import Worker
from mhabridge.checkpoint.conversion import convert_checkpoint
from mhabridge.checkpoint.in_memory import Arrays, MemorySink, same_numbers
from mhabridge.checkpoint.load_report import LoadReport, Mismatch, require_ok
from mhabridge.checkpoint.loading import load_into, names_and_shapes
from mhabridge.checkpoint.storage.writing import Outgoing
from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError, UnsupportedError, WeightsError
from tests import worker_load
from tests.conftest import _ready as ready

# What float32 answers of these models, numbers of the size of 3, may differ by: 2e-6 was measured between PyTorch and
# the others; a forgotten transpose or norm is off by more than 0.1.
CLOSE = 2e-5
TOKENS = np.random.default_rng(3).integers(0, worker_load.WORDS, (4, 2))
COUNTER = "*.num_batches_tracked"  # PyTorch's own: no other framework has it

FILES = {
    "model.pth": None,
    "legacy.bin": None,
    "torch.safetensors": {"to": "torch"},
    "torch.npz": {"to": "torch"},
    "shards.safetensors.index.json": {"to": "torch", "shard_size": 2000},
    "mindspore.ckpt": {"to": "mindspore"},
    "mindspore.npz": {"to": "mindspore@2.0"},
    "mint.safetensors": {"to": "mindspore.mint"},
    "megengine.pkl": {"to": "megengine"},
    "megengine.safetensors": {"to": "megengine"},
}
NO_COUNTER = [name for name in FILES if name.startswith(("mindspore", "megengine"))]


@functools.cache
def worker(name: str) -> Worker:
    info = next(info for info in backends() if info.name == name)
    own = Path(worker_load.__file__).read_text(encoding="utf-8")
    parts = [part.name for part in pkgutil.walk_packages(checkpoint.__path__, f"{checkpoint.__name__}.")]
    modules = {part: shipping.source(part) for part in (checkpoint.__name__, "mhabridge.bridge", *parts)}
    started.append(Worker(info.python, info.framework, extra_modules={**modules, "trial": own}))
    return started[-1]


started: list[Worker] = []


@pytest.fixture(scope="module", autouse=True)
def _workers_end() -> Iterator[None]:
    yield
    for one in started:
        one.close()
    started.clear()
    worker.cache_clear()


def ask(name: str, function: str, **payload: Any) -> Any:
    """Have a framework run one of worker_load's functions: here, or in its environment."""
    ready(name)
    if next(info for info in backends() if info.name == name).where == "here":
        return getattr(worker_load, function)(name, payload)
    return worker(name).call(f"trial:{function}", payload, timeout=100)


def loaded(name: str, file: Path, tied: bool = False, save: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """The report and the answer of a fresh model that was filled from a file."""
    found = ask(
        name, "loaded", file=str(file), tied=tied, options=options, tokens=TOKENS, save=str(save) if save else ""
    )
    return json.loads(found["report"]), found["output"]


def refused(name: str, file: Path, **options: Any) -> str:
    """What is said against a file, once it is sure that the model is as it was."""
    found = ask(name, "refused", file=str(file), tied=False, options=options, tokens=TOKENS)
    assert found["same"]
    return str(found["error"])


def randomised(model: Any, seed: int = 1) -> Any:
    """Every tensor of a PyTorch model with values of its own; variances positive."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.dtype.is_floating_point:
                values = torch.randn(tensor.shape, generator=generator)
                near_one = "norm" in name or "bn" in name
                tensor.copy_(1 + 0.1 * values if near_one else 0.5 * values)
            else:
                tensor.fill_(7)
    return model


def source(tied: bool = False) -> Any:
    return randomised(worker_load.net("torch", tied))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form, made by real frameworks or by ``convert_checkpoint``."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    folder = tmp_path_factory.mktemp("files")
    state = source().state_dict()
    torch.save(state, folder / "model.pth")
    torch.save(state, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    for name, options in FILES.items():
        if options is not None:
            assert convert_checkpoint(folder / "model.pth", folder / name, **options).verified
    return folder


@pytest.fixture(scope="module")
def answer() -> np.ndarray:
    pytest.importorskip("torch", reason="PyTorch is not importable here")
    found: np.ndarray = worker_load.output("torch", source(), TOKENS)
    return found


def require_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    assert float(np.abs(found - wanted).max()) < CLOSE


# -- everything fits ---------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize("name", FILES)
def test_every_file_fills_every_framework(framework: str, name: str, files: Path, answer: np.ndarray) -> None:
    options = {"allow_missing": [COUNTER]} if framework == "torch" and name in NO_COUNTER else {}
    report, output = loaded(framework, files / name, **options)
    assert report["ok"]
    assert not [report[what] for what in ("missing", "unexpected", "mismatched", "errors") if report[what]]
    require_close(output, answer)


@pytest.mark.frameworks
@pytest.mark.parametrize("other", ["torch", "mindspore", "megengine"])
def test_a_framework_s_own_file_fills_the_others(
    framework: str, other: str, files: Path, answer: np.ndarray, tmp_path: Path
) -> None:
    """Nothing travels with such a file: what MegEngine's packed vector holds is what the model's own layers say."""
    own = tmp_path / {"torch": "own.pth", "mindspore": "own.ckpt", "megengine": "own.pkl"}[framework]
    loaded(framework, files / "model.pth", save=own)
    options = {"allow_missing": [COUNTER]} if other == "torch" != framework else {}
    report, output = loaded(other, own, **options)
    assert report["ok"]
    require_close(output, answer)


@pytest.mark.frameworks
@pytest.mark.parametrize("tied_file", [True, False])
def test_tied_parameters_are_filled_once(framework: str, tied_file: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    model = source(tied=True)
    state = model.state_dict()
    if not tied_file:  # the same values in two places, as formats without ties have them
        state["head.weight"] = state["head.weight"].clone()
    torch.save(state, tmp_path / "a.pth")
    report, output = loaded(framework, tmp_path / "a.pth", tied=True)
    assert report["ok"]
    require_close(output, worker_load.output("torch", model, TOKENS))
    del state["emb.weight"]
    torch.save(state, tmp_path / "b.pth")
    require_close(loaded(framework, tmp_path / "b.pth", tied=True)[1], output)


@pytest.mark.frameworks
def test_a_tied_model_refuses_two_different_tensors(framework: str, files: Path) -> None:
    options: dict[str, Any] = {"file": str(files / "model.pth"), "tied": True, "options": {}, "tokens": TOKENS}
    found = ask(framework, "refused", **options)
    assert found["same"]
    assert "one tensor in the model, and different ones in the file" in found["error"]


@pytest.mark.frameworks
def test_a_wrapper_s_prefix_and_nesting(framework: str, answer: np.ndarray, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    state = {f"module.{name}": tensor for name, tensor in source().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pth")
    for options in ({"prefix": "module"}, {"rename": "module.*=*"}):
        report, output = loaded(framework, tmp_path / "a.pth", **options)
        assert report["ok"]
        assert any("epoch" in note for note in report["notes"])
        require_close(output, answer)


@pytest.mark.frameworks
@pytest.mark.parametrize("name", ["model.pth", "mindspore.ckpt", "megengine.pkl"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_drop_in_from_what_lies_under_a_prefix(
    framework: str, name: str, dtype: str, files: Path, tmp_path: Path
) -> None:
    file, prefix = files / name, "encoder.layers.1.self_attn"
    model = source()
    spec, weights = mb.extract(model.encoder.layers[1].self_attn)
    if dtype == "float16":
        import torch

        spec, weights = mb.extract(model.half().encoder.layers[1].self_attn)
        torch.save(model.state_dict(), tmp_path / "half.pth")
        file = tmp_path / name
        convert_checkpoint(
            tmp_path / "half.pth", file, to={".pth": "torch", ".ckpt": "mindspore"}.get(file.suffix, "megengine")
        )
    found = ask(framework, "dropin", file=str(file), prefix=prefix, spec=spec.to_dict())
    assert mb.MHAWeights.from_tree(found["weights"]) == weights
    assert found["spec"] == spec.to_dict()


@pytest.mark.frameworks
@pytest.mark.parametrize("sizes", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}], ids=["plain", "no bias", "kdim, vdim"])
def test_a_drop_in_s_own_file_with_bias_k(framework: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    ending = {"torch": ".pth", "mindspore": ".ckpt", "megengine": ".pkl"}[framework]
    own, saved = tmp_path / f"own{ending}", tmp_path / f"saved{ending}"
    layer = randomised(torch.nn.MultiheadAttention(8, 2, add_bias_kv=True, **sizes))
    spec, weights = mb.extract(layer)
    torch.save(layer.state_dict(), tmp_path / "torch.pth")
    report = convert_checkpoint(tmp_path / "torch.pth", own, to=framework, num_heads=2)
    assert report.verified
    assert any("drop" in note or "adapters" in note for note in report.notes) == (framework == "megengine")

    found = ask(framework, "own_dropin", file=str(own), save=str(saved), spec=spec.to_dict())
    assert mb.MHAWeights.from_tree(found["weights"]) == weights
    known = mb.MHASpec(8, 2, add_bias_kv=True, **sizes)
    (block,) = mb.inspect_checkpoint(saved, spec=known).blocks
    assert block.layout == ("megengine-dropin" if framework == "megengine" else "torch")
    assert (block.spec, mb.inspect_checkpoint(own).blocks[0].spec) == (spec, spec)  # the second one's travels
    assert mb.fingerprint(saved, spec=known) == mb.fingerprint(tmp_path / "torch.pth") == mb.fingerprint(own)
    back = convert_checkpoint(saved, tmp_path / "back.pth", to="torch", spec=known)
    assert back.verified
    state = torch.load(tmp_path / "back.pth", weights_only=True)
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())

    found = ask(framework, "dropin", file=str(tmp_path / "torch.pth"), prefix="", spec=spec.to_dict())
    assert mb.MHAWeights.from_tree(found["weights"]) == weights


# -- something does not ------------------------------------------------------------------------------------------------


def spoiled(files: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with its state dict changed."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    state = dict(torch.load(files / "model.pth", weights_only=True))
    change(state)
    torch.save(state, folder / "spoiled.pth")
    return folder / "spoiled.pth"


def _wider(state: dict[str, Any]) -> None:
    state["conv.bias"] = state["conv.bias"].new_zeros(9)


def _turned(state: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    state["head.weight"] = state["head.weight"].t().contiguous()
    state["emb.weight"] = torch.cat([state["emb.weight"]] * 2)


SPOILERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda state: state.pop("conv.bias"), "1 missing: conv.bias"),
    "missing in attention": (
        lambda state: state.pop("encoder.layers.0.self_attn.out_proj.weight"),
        "encoder.layers.0.self_attn",
    ),
    "unexpected": (lambda state: state.update(more=state["conv.bias"]), "1 unexpected: more"),
    "another layer": (
        lambda state: state.update({"extra.weight": state["conv.weight"], "extra.bias": state["conv.bias"]}),
        "2 unexpected: extra.weight, extra.bias",
    ),
    "shape": (_wider, "conv"),
    "transposed": (_turned, "mismatched"),
    "dtype": (lambda state: state.update({"head.weight": state["head.weight"].double()}), "float64"),
}


@pytest.mark.frameworks
@pytest.mark.parametrize("how", SPOILERS)
def test_what_does_not_fit_changes_nothing(framework: str, how: str, files: Path, tmp_path: Path) -> None:
    change, words = SPOILERS[how]
    text = refused(framework, spoiled(files, tmp_path, change))
    assert words in text or (how == "transposed" and "missing" in text)
    assert text.startswith(("WeightsError", "CheckpointError"))


@pytest.mark.frameworks
def test_a_damaged_file_changes_nothing(framework: str, files: Path, tmp_path: Path) -> None:
    data = bytearray((files / "model.pth").read_bytes())
    values = source().state_dict()["bn.running_var"].numpy().tobytes()
    data[data.index(values)] ^= 1
    (tmp_path / "damaged.pth").write_bytes(data)
    assert refused(framework, tmp_path / "damaged.pth").startswith("CheckpointError")


@pytest.mark.frameworks
def test_other_heads_are_another_layer(framework: str, files: Path) -> None:
    assert "1 heads in the file, 2 here" in refused(framework, files / "model.pth", num_heads=1)
    assert loaded(framework, files / "model.pth", num_heads=2)[0]["ok"]


@pytest.mark.frameworks
def test_a_missing_bias_is_not_made_up(files: Path, tmp_path: Path) -> None:
    """With only the output's bias in the file the packed one could be zeros, as from a framework that has none."""
    name = "encoder.layers.0.self_attn.in_proj_bias"
    file = spoiled(files, tmp_path, lambda state: state.pop(name))
    assert f"1 missing: {name}" in refused("torch", file)
    assert loaded("torch", file, allow_missing=[name])[0]["ok"]


@pytest.mark.frameworks
def test_not_strict_fills_what_fits(files: Path, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        _wider(state)
        state["more"] = state.pop("bn.weight")
        state["head.weight"] = state["head.weight"].half()

    file = spoiled(files, tmp_path, change)
    model, wanted = worker_load.net("torch"), source().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_into(model, file, strict=False)
    assert not report.ok
    assert (report.missing, report.unexpected) == (("bn.weight",), ("more",))
    assert report.mismatched == (
        Mismatch("conv.bias", "float32 (9,)", "float32 (8,)"),
        Mismatch("head.weight", "float16 (11, 8)", "float32 (11, 8)"),
    )
    odd = {"bn.weight", "conv.bias", "head.weight"}
    assert set(report.loaded) == before.keys() - odd
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name] if name in odd else wanted[name])
    assert json.loads(report.to_json())["mismatched"][0]["given"] == "float32 (9,)"


@pytest.mark.frameworks
def test_not_strict_reports_what_cannot_be_planned(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    shapes = {"q_proj.weight": (8, 8), "k_proj.weight": (4, 8), "v_proj.weight": (4, 8), "o_proj.weight": (8, 8)}
    torch.save({f"attn.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "a.pth")
    layer = torch.nn.MultiheadAttention(8, 2)
    report = load_into(layer, tmp_path / "a.pth", prefix="attn", strict=False)
    assert not report.ok
    assert not report.loaded
    assert "grouped-query" in report.errors[0]
    with pytest.raises(UnsupportedError, match="grouped-query"):
        load_into(layer, tmp_path / "a.pth", prefix="attn")


# -- options and models of PyTorch -------------------------------------------------------------------------------------


@pytest.mark.frameworks
def test_frozen_and_mixed_models_stay_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    model = source().bfloat16()
    model.bn.float()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    fresh = worker_load.net("torch").bfloat16()
    fresh.bn.float()
    fresh.emb.requires_grad_(False)
    fresh.train()
    places = {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()}
    assert load_into(fresh, tmp_path / "a.pth").ok
    assert fresh.training
    assert not fresh.emb.weight.requires_grad
    assert fresh.conv.weight.requires_grad
    assert fresh.conv.weight.is_leaf
    for name, tensor in fresh.state_dict().items():
        assert tensor.equal(model.state_dict()[name])
        assert tensor.data_ptr() == places[name]


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", ["float64", "complex64", "bool", "int8", "float8_e4m3fn"])
def test_buffers_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    def module(values: Any) -> Any:
        found = torch.nn.Module()
        found.register_buffer("table", values.to(getattr(torch, dtype)))
        found.register_buffer("empty", torch.zeros(0, 3))
        found.register_buffer("left", torch.zeros(2), persistent=False)
        return found

    wanted, fresh = module(torch.tensor([[0, 1, 2]])), module(torch.zeros(1, 3))
    torch.save(wanted.state_dict(), tmp_path / "a.pth")
    assert load_into(fresh, tmp_path / "a.pth").loaded == ("table", "empty")
    assert fresh.table.dtype == wanted.table.dtype
    assert fresh.table.view(torch.uint8).equal(wanted.table.view(torch.uint8))


@pytest.mark.frameworks
def test_another_layout_in_the_model(tmp_path: Path) -> None:
    """A model whose attention is written as in Hugging Face's BERT, from MegEngine's packed vector."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    spec = mb.MHASpec(8, 2)
    weights = mb.MHAWeights.random(spec)
    bert = weights.to_layout("hf-bert", spec, prefix="attention")
    model = torch.nn.Module()
    for name, array in bert.items():
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.register_buffer(name.rpartition(".")[2], torch.zeros(array.shape))
    np.savez(tmp_path / "a.npz", **weights.to_layout("megengine", spec, prefix="attention"))
    assert load_into(model, tmp_path / "a.npz", spec=spec).ok
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), bert[name])


@pytest.mark.frameworks
def test_specs_travel_through_a_prefix(tmp_path: Path) -> None:
    """MegEngine's vector of a layer with a kdim of its own: the specs in the file are those of the full names."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    spec = mb.MHASpec(8, 4, kdim=4, vdim=12)
    weights = mb.MHAWeights.random(spec)
    np.savez(tmp_path / "a.npz", **weights.to_layout("torch", spec, prefix="module.encoder.attn"))
    convert_checkpoint(tmp_path / "a.npz", tmp_path / "b.safetensors", to="megengine", num_heads=4)
    for options in ({"prefix": "module.encoder.attn"}, {"rename": "module.encoder.attn.*=*"}):
        layer = mb.build(spec, "torch")
        assert load_into(layer, tmp_path / "b.safetensors", **options).ok
        assert mb.extract(layer)[1] == weights
        other = mb.build(spec.replace(num_heads=2), "torch")
        with pytest.raises(WeightsError, match="4 heads in the file, 2 here"):
            load_into(other, tmp_path / "b.safetensors", **options)
    assert torch.equal(layer.out_proj.weight.detach(), torch.tensor(weights.out_weight))


@pytest.mark.frameworks
def test_drop_and_allow_missing_are_listed(files: Path) -> None:
    model = worker_load.net("torch")
    before = model.head.weight.detach().clone()
    report = load_into(model, files / "model.pth", drop="head.*", allow_missing="head.*")
    assert report.ok
    assert "head.weight" not in report.loaded
    assert any("dropped by --drop head.*" in note for note in report.notes)
    assert any(note == "head.weight: kept as it was; head.* may be missing" for note in report.notes)
    assert model.head.weight.equal(before)


@pytest.mark.frameworks
def test_a_prefix_that_nothing_has(files: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    with pytest.raises((ArgumentError, WeightsError), match="encoder"):
        load_into(torch.nn.MultiheadAttention(8, 2), files / "model.pth", prefix="encoder.layer.0.attention")
    torch.save({"module.weight": torch.ones(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"modul: given no tensor.*Names begin with module\."):
        load_into(torch.nn.Linear(2, 2, bias=False), tmp_path / "module.pth", prefix="modul")
    with pytest.raises(ArgumentTypeError, match="prefix: given None"):
        load_into(torch.nn.Linear(2, 2, bias=False), tmp_path / "module.pth", prefix=None)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"Nothing was changed\. All differ by 'module\.'"):
        load_into(torch.nn.Linear(2, 2, bias=False), tmp_path / "module.pth")
    report = load_into(torch.nn.Linear(2, 2, bias=False), tmp_path / "module.pth", prefix="module")
    assert not any("outside" in note for note in report.notes)


@pytest.mark.frameworks
def test_objects_that_take_code_are_refused_unless_left_out(tmp_path: Path) -> None:
    import argparse

    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    layer = torch.nn.Linear(2, 2)
    torch.save({"state_dict": layer.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    fresh = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace"):
        load_into(fresh, tmp_path / "a.pth")
    report = load_into(fresh, tmp_path / "a.pth", ignore_objects=True)
    assert any("argparse.Namespace" in note for note in report.notes)
    assert fresh.weight.equal(layer.weight)


@pytest.mark.frameworks
def test_models_without_memory_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    np.savez(tmp_path / "a.npz", weight=np.ones((2, 2), "float32"))
    for model in (torch.nn.Linear(2, 2, bias=False, device="meta"), torch.nn.LazyLinear(2, bias=False)):
        with pytest.raises(WeightsError, match="tensor without memory"):
            load_into(model, tmp_path / "a.npz")


@pytest.mark.frameworks
def test_made_up_state_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    class Odd(torch.nn.Linear):
        def get_extra_state(self) -> Any:
            return torch.ones(1)

    with pytest.raises(UnsupportedError, match="_extra_state"):
        names_and_shapes(Odd(2, 2))


@pytest.mark.parametrize("model", [None, {"weight": np.ones(2)}, "torch.nn.Linear"])
def test_only_models_are_filled(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="model"):
        load_into(model, tmp_path / "a.npz")


@pytest.mark.frameworks
def test_names_and_shapes(framework: str, files: Path) -> None:
    """They are those of the framework's own checkpoint."""
    name = {"torch": "model.pth", "mindspore": "mindspore.ckpt", "megengine": "megengine.pkl"}[framework]
    options: dict[str, Any] = {"file": str(files / name), "tied": False, "options": {}, "tokens": TOKENS}
    found = json.loads(ask(framework, "refused", **options)["shapes"])
    from mhabridge.checkpoint.formats.known import open_checkpoint

    with open_checkpoint(files / name) as file:
        assert {key: tuple(shape) for key, shape in found.items()} == {key: one.shape for key, one in file.items()}


# -- MindSpore's names -------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
def test_mindspore_s_own_names_and_paths(tmp_path: Path) -> None:
    ready("mindspore")
    import mindspore

    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    class Net(mindspore.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.scale = mindspore.Parameter(mindspore.Tensor(np.zeros(2, "float32")), name="named")
            self.first = mindspore.nn.SequentialCell(mindspore.nn.Dense(2, 2, has_bias=False))
            self.again = self.first
            self.norm = mindspore.mint.nn.LayerNorm(2)
            self.own = mindspore.nn.LayerNorm([2])

    values = {
        **{"scale": [1, 2], "norm.weight": [3, 4], "norm.bias": [5, 6], "own.weight": [7, 8], "own.bias": [9, 1]},
        "first.0.weight": [[1, 2], [3, 4]],
    }
    state = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    torch.save(state, tmp_path / "a.pth")
    model = Net()
    model.scale.requires_grad = False
    assert set(names_and_shapes(model)) == {parameter.name for parameter in model.get_parameters()}
    assert load_into(model, tmp_path / "a.pth").ok
    assert not model.scale.requires_grad
    mindspore.save_checkpoint(model, str(tmp_path / "a.ckpt"))
    other = Net()
    assert load_into(other, tmp_path / "a.ckpt").ok
    for net in (model, other):
        assert net.scale.asnumpy().tolist() == [1, 2]
        assert net.first[0].weight.asnumpy().tolist() == [[1, 2], [3, 4]]
        assert net.norm.weight.asnumpy().tolist() == [3, 4]
        assert net.own.beta.asnumpy().tolist() == [9, 1]


@pytest.mark.versions
@pytest.mark.frameworks
@pytest.mark.parametrize("name", ["torch@1.8.1", "mindspore@2.0.0", "megengine"])
def test_older_versions_have_the_same_state(name: str) -> None:
    ready(name)
    spec = mb.MHASpec(8, 2)
    weights = mb.MHAWeights.random(spec)
    found = worker(name).call("trial:state_only", {"spec": spec.to_dict(), "weights": weights.to_tree()}, timeout=100)
    assert found["model"]
    assert found["slots"] == found["shapes"]
    assert mb.MHASpec.from_dict(found["attention"]) == spec
    assert mb.MHAWeights.from_tree(found["weights"]) == weights


@pytest.mark.frameworks
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    def made() -> Any:
        layers: list[Any] = [torch.nn.Linear(512, 512) for _ in range(16)]
        return torch.nn.Sequential(*layers, torch.nn.MultiheadAttention(512, 8))

    model, fresh = randomised(made()), made()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.pkl", to="megengine", num_heads=8)
    load_into(fresh, tmp_path / "a.pkl")  # imports what it needs
    tracemalloc.start()
    load_into(fresh, tmp_path / "a.pkl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        peak < 12 << 20
    )  # 5 MiB were measured: a packed projection of 3 MiB, and a part of it turned; the file has 20
    for name, tensor in fresh.state_dict().items():
        assert tensor.equal(model.state_dict()[name])


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_a_report_that_is_not_ok_is_raised() -> None:
    many = tuple(f"layer{number}" for number in range(20))
    report = LoadReport("a.pth", missing=many, errors=("odd",))
    with pytest.raises(WeightsError, match=r"20 missing: layer0, .*layer7 and 12 more; 1 errors: odd"):
        require_ok(report)


def outgoing(name: str, data: bytes, dtype: str = "uint8", tied: str | None = None) -> Outgoing:
    return Outgoing(name, dtype, (4,), lambda sink: sink.write(data), tied)


def test_tensors_of_the_wrong_length_are_refused() -> None:
    for data in (b"123", b"12345"):
        with pytest.raises(CheckpointError, match="bytes"):
            Arrays([outgoing("a", data)])["a"]


def test_equal_numbers_are_told_from_others() -> None:
    made = Arrays([
        *(outgoing(name, data) for name, data in (("a", b"1234"), ("b", b"1234"), ("c", b"1235"))),
        *(outgoing(name, data, tied="one") for name, data in (("d", b"1111"), ("e", b"2222"))),
        outgoing("f", b"1234", "int8"),
    ])  # fmt: skip
    found = {x + y for x, y in itertools.combinations("abcdef", 2) if same_numbers(made, x, y)}
    assert found == {"ab", "de"}


def test_memory_takes_bytes_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    memory = bytearray(6)
    sink = MemorySink()
    sink.aim(memoryview(memory))
    with open(tmp_path / "a", "rb") as file:
        sink.copy(file.fileno(), 2, 4)
        sink.write(b"ab")
        assert memory == b"2345ab"
        sink.aim(memoryview(memory))
        with pytest.raises(CheckpointError, match="ends too early"):
            sink.copy(file.fileno(), 8, 4)


def test_no_framework_is_imported_for_it() -> None:
    code = (
        "import sys, mhabridge.checkpoint.loading as l; print({'torch', 'mindspore', 'megengine'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.frameworks
def test_batch_norm_s_counter_may_be_missing(tmp_path: Path) -> None:
    """MindSpore and MegEngine do not have it, so no file of theirs could fill it."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    source, model = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.ckpt", to="mindspore")
    report = load_into(model, tmp_path / "a.ckpt")
    assert report.ok
    assert report.notes[-1] == "1.num_batches_tracked: kept as it was; *num_batches_tracked may be missing"
    assert torch.equal(model[1].running_var, source[1].running_var)


@pytest.mark.frameworks
def test_an_embedding_of_another_size_is_a_mismatch(tmp_path: Path) -> None:
    """The target's names settle what it is, though its shape fits neither reading."""
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    ms = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    torch.save(torch.nn.Sequential(torch.nn.Embedding(6, 8), torch.nn.Linear(8, 8)).state_dict(), tmp_path / "a.pth")
    model = ms.nn.SequentialCell(ms.nn.Embedding(5, 8), ms.nn.Dense(8, 8))
    with pytest.raises(WeightsError, match=r"0\.embedding_table"):
        load_into(model, tmp_path / "a.pth")
    report = load_into(model, tmp_path / "a.pth", strict=False)
    assert [one.name for one in report.mismatched] == ["0.embedding_table"]
    assert set(report.loaded) == {"1.weight", "1.bias"}
