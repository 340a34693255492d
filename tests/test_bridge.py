"""Live layers: extract from the frameworks' own classes and build them again, bit for bit."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import mapping
from mhabridge.backends import shipping
from mhabridge.backends.worker import Worker
from mhabridge.errors import ArgumentError, ArgumentTypeError, BackendError, UnsupportedError, WeightsError

HERE = ("torch", "mindspore")
KINDS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"batch_first": True, "dropout": 0.25},
]


def native(framework: str, **kwargs: Any) -> Any:
    """A layer of the framework itself, made by its own constructor with its own initial values."""
    module = pytest.importorskip(framework, reason=f"{framework} is not importable here")
    return module.nn.MultiheadAttention(16, 4, **kwargs)


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HERE)
def test_extract_then_build_is_the_same_layer(name: str, kind: dict[str, Any]) -> None:
    own = {("has_bias" if name == "mindspore" and k == "bias" else k): v for k, v in kind.items()}
    spec, weights = mb.extract(native(name, **own))
    assert spec == mb.MHASpec(16, 4, **kind)
    again, back = mb.extract(mb.build(spec, name, weights))
    assert (again, back) == (spec, weights)


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_moves_between_frameworks_with_its_answer(kind: dict[str, Any]) -> None:
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    layer = native("torch", **kind).eval()
    spec, weights = mb.extract(layer)
    moved = mb.build(spec, "mindspore", weights)
    rng = np.random.default_rng(0)
    shapes = [(3, 2, 16), (5, 2, spec.key_features), (5, 2, spec.value_features)]
    arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    if spec.batch_first:
        arrays = [np.ascontiguousarray(array.swapaxes(0, 1)) for array in arrays]
    ours = moved(*(mindspore.Tensor(array) for array in arrays))[0].asnumpy()
    theirs = layer(*(torch.tensor(array) for array in arrays))[0].detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert mb.extract(moved)[1] == weights


@pytest.mark.frameworks
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", HERE)
def test_other_dtypes(name: str, dtype: str) -> None:
    module = pytest.importorskip(name, reason=f"{name} is not importable here")
    spec, weights = mb.extract(native(name, dtype=getattr(module, dtype)))
    assert (spec.dtype, weights.dtype) == (dtype, dtype)
    assert mb.extract(mb.build(spec, name, weights)) == (spec, weights)


@pytest.mark.frameworks
def test_extracted_weights_are_copies() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    layer = native("torch")
    _, weights = mb.extract(layer)
    before = np.array(weights.q_weight)
    with torch.no_grad():
        layer.in_proj_weight.zero_()
    np.testing.assert_array_equal(weights.q_weight, before)


@pytest.mark.frameworks
def test_an_attention_layer_inside_a_model() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    block = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
    spec, _ = mb.extract(block.self_attn)
    assert spec.batch_first
    with pytest.raises(ArgumentTypeError, match=r"self_attn"):
        mb.extract(torch.nn.Sequential(block))


@pytest.mark.frameworks
def test_a_subclass_with_other_parameters_is_refused() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    class Odd(torch.nn.MultiheadAttention):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(16, 4)
            self.temperature = torch.nn.Parameter(torch.ones(()))

    with pytest.raises(WeightsError, match="temperature"):
        mb.extract(Odd())


@pytest.mark.frameworks
@pytest.mark.parametrize("name", HERE)
def test_a_subclass_that_computes_something_else_is_refused(name: str) -> None:
    module = pytest.importorskip(name, reason=f"{name} is not importable here")

    class Own(module.nn.MultiheadAttention):  # type: ignore[misc, name-defined]
        def forward(self, *args: Any) -> Any:
            return args

        construct = forward

    with pytest.raises(UnsupportedError, match="Own, whose"):
        mb.extract(Own(16, 4))


@pytest.mark.frameworks
@pytest.mark.parametrize("name", HERE)
def test_stand_in_biases_are_zero_and_said(name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not importable here")
    spec = mb.MHASpec(16, 4, out_bias=False, k_bias=False)
    for weights in (None, mb.MHAWeights.random(spec)):
        notes: list[str] = []
        layer = mb.build(spec, name, weights, notes=notes)
        assert any("out_bias" in note for note in notes)
        found = mb.extract(layer)[1].arrays()
        assert not found["out_bias"].any()
        assert not found["k_bias"].any()
        assert found["q_weight"].any()


# What no native class computes; the drop-in does.
BEYOND: list[dict[str, Any]] = [
    {"scale": 0.3},
    {"residual": True, "batch_first": True},
    {"scale": -2.0, "residual": True, "out_dropout": 0.25, "kdim": 6, "bias": False, "add_bias_kv": True},
]


def drop_in(name: str) -> Any:
    """A framework's drop-in class."""
    pytest.importorskip(name, reason=f"{name} is not importable here")
    return importlib.import_module(f"mhabridge.adapters.{name}").MultiheadAttention


def tensors_for(name: str, spec: mb.MHASpec) -> tuple[list[np.ndarray], list[Any]]:
    """Query, key and value with L = 3, S = 5, N = 2: as arrays, and as the framework's tensors."""
    module = pytest.importorskip(name, reason=f"{name} is not importable here")
    rng = np.random.default_rng(0)
    lengths = ((3, spec.embed_dim), (5, spec.key_features), (5, spec.value_features))
    shapes = [(2, length, size) if spec.batch_first else (length, 2, size) for length, size in lengths]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return arrays, [module.tensor(array) if name == "torch" else module.Tensor(array) for array in arrays]


def plain_arrays(answers: Any) -> list[np.ndarray]:
    return [(x.detach().numpy() if hasattr(x, "detach") else x.asnumpy()) for x in answers]


def in_evaluation(layer: Any) -> Any:
    (layer.eval if hasattr(layer, "eval") else lambda: layer.set_train(False))()
    return layer


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", KINDS + BEYOND)
@pytest.mark.parametrize("name", HERE)
def test_a_composed_layer_is_the_same_layer_and_answers_like_the_reference(name: str, kind: dict[str, Any]) -> None:
    spec = mb.MHASpec(16, 4, **kind)
    weights = mb.MHAWeights.random(spec, seed=1)
    notes: list[str] = []
    layer = mb.build(spec, name, weights, mode="composed", notes=notes)
    assert type(layer) is drop_in(name)
    assert notes == ["composed: the drop-in: asked for"]
    assert mb.extract(layer) == (spec, weights)
    assert mb.extract(copy.deepcopy(layer)) == (spec, weights)
    arrays, tensors = tensors_for(name, spec)
    known = mb.backend("numpy").run(spec, weights, *arrays, is_causal=True)
    in_evaluation(layer)
    for answers in (mb.attend(layer, *tensors, is_causal=True), layer(*tensors, is_causal=True)):
        output, attention = plain_arrays(answers)
        np.testing.assert_allclose(output, known.output, rtol=0, atol=1e-5)
        np.testing.assert_allclose(attention, known.attn_weights, rtol=0, atol=1e-5)


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("name", HERE)
def test_what_the_native_class_does_not_compute_is_composed_in_every_call(name: str, kind: dict[str, Any]) -> None:
    """Also one without masks, which the native class could be asked; a plain layer's answer would be another one."""
    spec = mb.MHASpec(16, 4, **kind)
    weights = mb.MHAWeights.random(spec, seed=1)
    layer = in_evaluation(mb.build(spec, name, weights, mode="composed"))
    arrays, tensors = tensors_for(name, spec)
    notes: list[str] = []
    output, _ = plain_arrays(mb.attend(layer, *tensors, notes=notes))
    known = mb.backend("numpy").run(spec, weights, *arrays).output
    np.testing.assert_allclose(output, known, rtol=0, atol=1e-5)
    plain = mb.backend("numpy").run(spec.replace(scale=None, residual=False), weights, *arrays).output
    assert np.abs(known - plain).max() > 0.01
    field = next(field for field in ("scale", "out_dropout", "residual") if field in kind)
    assert [note for note in notes if note.startswith(f"composed: {field}")] == notes
    with pytest.raises(UnsupportedError, match=field):
        mb.attend(layer, *tensors, mode="native")


@pytest.mark.frameworks
@pytest.mark.parametrize(("name", "compiled"), [("torch", False), ("mindspore", False), ("mindspore", True)])
def test_dropout_on_the_output_is_for_training_and_before_the_residual(name: str, compiled: bool) -> None:
    """MindSpore's compiler reads a form of its own."""
    module = pytest.importorskip(name, reason=f"{name} is not importable here")
    spec = mb.MHASpec(16, 4, out_dropout=1.0, residual=True)
    layer = mb.build(spec, name, mode="composed")
    _, (query, key, value) = tensors_for(name, spec)
    call = module.jit(layer.construct) if compiled else layer
    output, _ = plain_arrays(call(query, key, value))
    np.testing.assert_array_equal(output, plain_arrays([query])[0])
    output, _ = plain_arrays(in_evaluation(layer)(query, key, value))
    assert np.abs(output - plain_arrays([query])[0]).max() > 0.01


@pytest.mark.frameworks
@pytest.mark.parametrize("name", HERE)
def test_auto_takes_the_native_class_where_it_can_express_the_spec(name: str) -> None:
    notes: list[str] = []
    layer = mb.build(mb.MHASpec(16, 4, kdim=6), name, notes=notes)
    assert not isinstance(layer, drop_in(name))
    assert notes == ["native: the framework's own class"]
    notes = []
    layer = mb.build(mb.MHASpec(16, 4, residual=True), name, notes=notes)
    assert isinstance(layer, drop_in(name))
    (note,) = notes
    assert note.startswith("composed: the drop-in: residual is True")


@pytest.mark.frameworks
def test_composed_layers_start_with_the_same_values_in_every_framework() -> None:
    spec = mb.MHASpec(16, 4, residual=True, k_bias=False)
    found = []
    for name in HERE:
        drop_in(name)
        mb.manual_seed(5)
        found.append(mb.extract(mb.build(spec, name))[1])
    assert found[0] == found[1]
    assert not np.array_equal(found[0].q_weight, mb.extract(mb.build(spec, HERE[0]))[1].q_weight)


@pytest.mark.frameworks
@pytest.mark.parametrize("mode", ["native", "composed"])
@pytest.mark.parametrize("name", HERE)
def test_stand_in_biases_are_zero_and_said_in_both_forms(name: str, mode: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not importable here")
    spec = mb.MHASpec(16, 4, k_bias=False)
    weights = mb.MHAWeights.random(spec)
    notes: list[str] = []
    again, found = mb.extract(mb.build(spec, name, weights, mode=mode, notes=notes))
    assert again == spec.replace(k_bias=True)
    assert notes[0].startswith(mode)
    assert [note for note in notes[1:] if "k_bias as zeros" in note] == notes[1:] != []
    for field, array in weights.arrays().items():
        np.testing.assert_array_equal(found.arrays()[field], array, err_msg=field)
    assert not found.k_bias.any()


@pytest.mark.frameworks
def test_meta_tensors_and_devices() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    with pytest.raises(WeightsError, match="meta"):
        mb.extract(torch.nn.MultiheadAttention(16, 4, device="meta"))
    with pytest.raises(ArgumentError, match="device"):
        mb.build(mb.MHASpec(16, 4), "torch", device="nonsense")
    with pytest.raises(ArgumentError, match="set_device"):
        mb.build(mb.MHASpec(16, 4), "mindspore", device="nonsense")
    assert mb.build(mb.MHASpec(16, 4), "torch", device="cpu").in_proj_weight.device.type == "cpu"


@pytest.mark.frameworks
def test_another_version_than_the_one_here_is_not_built() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    with pytest.raises(BackendError, match=r"version 1\.8\.1"):
        mb.build(mb.MHASpec(16, 4), "torch@1.8.1")
    assert mb.build(mb.MHASpec(16, 4), "torch@" + torch.__version__.partition("+")[0]) is not None


@pytest.mark.frameworks
@pytest.mark.parametrize("first", [(2, 5, 7), (2, 2, 1)])
def test_mindspore_gradients_are_proved_before_they_are_believed(first: tuple[int, ...]) -> None:
    """In a fresh process: a first gradient of the user's own over one source position spoils all later ones."""
    pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    code = f"""
import numpy as np, mindspore as ms, mhabridge as mb
batch, target, source = {first}
layer = ms.nn.MultiheadAttention(8, 2)
q, k = (ms.Tensor(np.random.randn(n, batch, 8).astype("f4")) for n in (target, source))
ms.grad(lambda q: layer(q, k, k)[0].sum())(q)
report = mb.diff(mb.MHASpec(16, 4), ["mindspore"], grads=True)
print(report.ok, report.runs[0].reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("True") if first[2] > 1 else ("False" in last and "Start a new process" in last), done.stdout


@pytest.mark.frameworks
def test_mindspore_gradients_are_proved_again_after_one_that_failed() -> None:
    """It makes MindSpore forget the first gradient, so the next one is the first again."""
    pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    code = """
import numpy as np, mindspore as ms, mhabridge as mb
from mhabridge.adapters.mindspore.gradients import believed

def diff(E, N, L, S, mode="native"):
    return mb.diff(mb.MHASpec(E, 1), ["mindspore"], grads=True, mode=mode, inputs={
        name: np.random.default_rng(0).standard_normal((length, N, E)).astype("f4")
        for name, length in (("query", L), ("key", S), ("value", S))})

print(diff(8, 2, 4, 4).ok)
layer, x = ms.nn.MultiheadAttention(1, 1), ms.Tensor(np.ones((4, 1, 1), "f4"))
try:
    with believed():
        ms.grad(lambda q: layer(q, x, x)[0].sum())(x).asnumpy()
except RuntimeError:
    print("failed")
print(diff(2, 2, 4, 1).ok, diff(2, 2, 4, 4).ok)
print(diff(1, 1, 4, 4, "auto").ok)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stdout.splitlines() if "WARNING" not in line]
    assert lines == ["True", "failed", "True True", "True"], (lines, done.stderr[-2000:])


@pytest.mark.frameworks
def test_ctrl_c_still_interrupts_after_mindspore_ran() -> None:
    pytest.importorskip("mindspore", reason="MindSpore is not importable here")
    code = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import mhabridge as mb
assert mb.diff(mb.MHASpec(8, 2), ["mindspore"]).ok
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip().endswith("interrupted"), (done.returncode, done.stderr)


@pytest.mark.parametrize("thing", [None, 3, "torch", np.zeros(2), object()])
def test_what_is_no_layer_is_refused(thing: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="native multi-head attention layer"):
        mb.extract(thing)


@pytest.mark.frameworks
def test_build_refuses_what_cannot_be() -> None:
    pytest.importorskip("torch", reason="PyTorch is not importable here")
    with pytest.raises(UnsupportedError, match="residual"):
        mb.build(mb.MHASpec(16, 4, residual=True), "torch", mode="native")
    for mode in ("auto", "composed"):
        with pytest.raises(UnsupportedError, match=r"out_proj_size: given 8; .* in the drop-in"):
            mb.build(mb.MHASpec(16, 4, out_proj_size=8), "torch", mode=mode)
    with pytest.raises(ArgumentError, match="mode"):
        mb.build(mb.MHASpec(16, 4), "torch", mode="fast")
    with pytest.raises(WeightsError, match="k_weight"):
        mb.build(mb.MHASpec(16, 4, kdim=6), "torch", mb.MHAWeights.random(mb.MHASpec(16, 4)))
    with pytest.raises(WeightsError, match="dtype"):
        mb.build(mb.MHASpec(16, 4, dtype="float16"), "torch", mb.MHAWeights.random(mb.MHASpec(16, 4)))


def test_a_framework_that_is_not_here_is_a_clear_error() -> None:
    if "megengine" in sys.modules:
        pytest.skip("MegEngine is importable here")
    with pytest.raises(BackendError, match="mhabridge backends install megengine"):
        mb.build(mb.MHASpec(16, 4), "megengine")
    with pytest.raises(ArgumentTypeError, match="an MHASpec"):
        mb.build("torch", mb.MHASpec(16, 4))  # type: ignore[arg-type]
    for name in ("layouts", "numpy"):
        with pytest.raises(ArgumentError, match="torch, mindspore, megengine"):
            mb.build(mb.MHASpec(16, 4), name)
    with pytest.raises(ArgumentError, match="torch, mindspore, megengine"):
        mb.build(mb.MHASpec(16, 4), "tensorflow")


@pytest.fixture(scope="module", params=["torch@1.8.1", "mindspore@2.0.0"])
def old_worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    name = request.param
    info = next((info for info in mb.backends(probe=False) if info.name == name), None)
    if info is None:
        pytest.skip(f"{name} is not installed: make test-versions")
    modules = {
        "mhabridge.bridge": shipping.source("mhabridge.bridge"),
        "ours": Path(__file__).with_name("worker_bridge.py").read_text(encoding="utf-8"),
    }
    made = Worker(info.python, mapping.parse_name(name)[0], extra_modules=modules)
    yield made
    made.close()


@pytest.mark.versions
@pytest.mark.parametrize("mode", ["auto", "composed"])
@pytest.mark.parametrize("kind", [{}, {"batch_first": True}, *BEYOND[:2], {"kdim": 6, "add_bias_kv": True}])
def test_build_convert_and_attend_in_older_versions(old_worker: Worker, kind: dict[str, Any], mode: str) -> None:
    spec = mb.MHASpec(16, 4, **kind)
    weights = mb.MHAWeights.random(spec)
    rng = np.random.default_rng(0)
    lengths = ((3, 16), (5, spec.key_features), (5, spec.value_features))
    one = [rng.standard_normal(shape).astype(np.float32) for shape in lengths]
    two = [np.stack([array, 2 * array], axis=0 if spec.batch_first else 1) for array in one]
    payload = {"spec": spec.to_dict(), "weights": weights.to_tree(), "inputs": [one, two], "mode": mode}
    found = old_worker.call("ours:built", payload, timeout=100)
    for layer in found["layers"]:
        assert mb.MHASpec.from_dict(layer["spec"]) == spec
        assert mb.MHAWeights.from_tree(layer["weights"]) == weights
    for inputs, output in zip((one, two), found["answers"], strict=True):
        known = mb.backend("numpy").run(spec, weights, *inputs, is_causal=True).output
        np.testing.assert_allclose(output, known, rtol=0, atol=1e-5)


@pytest.mark.frameworks
def test_attend_refuses_a_forward_of_its_own() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")

    class Loud(torch.nn.MultiheadAttention):  # type: ignore[misc,name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return 100 * output, weights

    x = torch.ones(3, 1, 8)
    with pytest.raises(UnsupportedError, match="forward is its own"):
        mb.attend(Loud(8, 2), x, x, x)
    patched = torch.nn.MultiheadAttention(8, 2)
    patched.forward = lambda *args, **kwargs: (x, None)
    for use in (lambda: mb.attend(patched, x, x, x), lambda: mb.extract(patched)):
        with pytest.raises(UnsupportedError, match="forward is its own"):
            use()


@pytest.mark.frameworks
def test_shared_projections_are_refused() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not importable here")
    layer = torch.nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    layer.v_proj_weight = layer.k_proj_weight
    with pytest.raises(UnsupportedError, match="v_proj_weight: given shared with k_proj_weight"):
        mb.convert(layer, to="torch")
