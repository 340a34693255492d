"""The ways on which frameworks go round their layers (kernels, compilers, graphs), while these are recorded."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge.diff.recordings import diff_recordings
from mhabridge.errors import ArgumentError, BackendError
from mhabridge.recording import record
from mhabridge.recording.contents import Contents, open_contents
from tests.worker_record import QUERY

pytestmark = pytest.mark.frameworks


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


@pytest.fixture(autouse=True)
def _files_are_closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


OPEN: list[Contents] = []


def opened(path: Path) -> Contents:
    OPEN.append(open_contents(path))
    return OPEN[-1]


def layers_of(path: Path) -> list[str]:
    return [call["layer"] for call in opened(path).metadata["calls"]]


# -- PyTorch -----------------------------------------------------------------------------------------------------------


def encoder() -> tuple[Any, Any, Any]:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    return torch, model, torch.from_numpy(np.array(QUERY))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_an_encoder(padded: bool, target: Path) -> None:
    torch, model, x = encoder()
    padding = torch.tensor([[False] * 3, [False, False, True]]) if padded else None
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        with record(model, target):
            after = model(x, src_key_padding_mask=padding)
        again = model(x, src_key_padding_mask=padding)
    assert torch.backends.mha.get_fastpath_enabled()
    open_positions = ~padding if padded else torch.ones(2, 3, dtype=torch.bool)
    assert (after - before)[open_positions].abs().max() < 1e-5
    assert torch.equal(again, before)
    assert layers_of(target) == ["layers.0.self_attn", "layers.1.self_attn", ""]
    found = opened(target)
    given = found.metadata["calls"][1]["arguments"]
    assert found.read(given["query"]["tensor"]).shape == (2, 3, 8)  # and no nested tensor
    assert ("tensor" in given["key_padding_mask"]) == padded
    assert "fast path" in found.metadata["environment"]


def test_a_layers_own_fast_path_stays_on(target: Path) -> None:
    torch, _, x = encoder()
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        before = layer(x, x, x)[0]
        with record(layer, target):
            after = layer(x, x, x)[0]
            assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(before, after)
    assert "fast path" not in opened(target).metadata["environment"]


def test_a_compiled_model(target: Path) -> None:
    torch, model, x = encoder()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        with record(compiled, target):
            after = compiled(x)
    assert (before - after).abs().max() < 1e-5
    assert layers_of(target) == ["layers.0.self_attn", "layers.1.self_attn", ""]  # not _orig_mod.layers.0...
    assert "torch.compile" in opened(target).metadata["environment"]


def test_a_scripted_model_is_refused(target: Path) -> None:
    torch, _, _ = encoder()
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    with pytest.raises(ArgumentError, match="without an attention layer"), record(scripted, target):
        pass


def test_before_2_0_the_layers_forward_is_wrapped(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch 1.8.1 is served, whose hooks see no keyword arguments."""
    torch, _, x = encoder()
    from mhabridge.adapters.torch import recording

    monkeypatch.setattr(recording, "_parameters_of", lambda _: {})
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    given = x.requires_grad_()
    with record(layer, target, grads=True):
        layer(given, given, given, need_weights=False, is_causal=False)[0].sum().backward()
        other = copy.deepcopy(layer)
        other.out_proj.bias.data += 1
        assert (other(x, x, x)[0] - layer.forward.forward(x, x, x)[0]).min() > 0.9
    assert "forward" not in vars(layer)
    (call,) = opened(target).metadata["calls"]
    assert call["arguments"]["need_weights"] == {"value": False}
    assert "tensor" in call["grads"]["arguments/query"]


def test_hooks_of_the_users_own_stay_and_are_seen(target: Path) -> None:
    torch, _, x = encoder()
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    layer.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with record(layer, target):
        layer(x, x, x)
    found = opened(target)
    query = found.read(found.metadata["calls"][0]["arguments"]["query"]["tensor"])
    assert np.array_equal(query, (x + 1).numpy())
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (1, 0)


def test_steps_of_training(target: Path) -> None:
    """Two steps of training: every step's gradients are its own calls'."""
    torch, model, x = encoder()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = []
    with record(model, target, grads=True):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            expected.append(model.layers[0].self_attn.in_proj_weight.grad.numpy().copy())
            optimizer.step()
    found = opened(target)
    for call in found.metadata["calls"]:
        if call["layer"] == "layers.0.self_attn":
            grad = found.read(call["grads"]["parameters/in_proj_weight"]["tensor"])
            assert np.array_equal(grad, expected[call["nth"]])
    assert found.metadata["left_out"] == [
        f"layers.{n}.self_attn: attn_weights: the model did not ask this layer for them" for n in range(2)
    ]


def train(path: Path, optimizer: str = "SGD", fault: Any = None, dtype: str = "float32", **options: Any) -> Path:
    """Three steps of an encoder's training; a fault comes before the second."""
    torch, model, x = encoder()
    model.train()
    for layer in model.modules():
        layer.p = 0.0  # of each dropout
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
    model.to(getattr(torch, dtype))
    steps = getattr(torch.optim, optimizer)(model.parameters(), 0.01, **options)
    with record(model, path, grads=True):
        for number in range(3):
            if fault is not None and number == 1:
                fault(model.layers[1].self_attn)
            steps.zero_grad()
            model(x.to(getattr(torch, dtype))).pow(3).sum().backward()
            steps.step()
    return path


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_training_is_compared_step_by_step(optimizer: str, tmp_path: Path) -> None:
    first = train(tmp_path / "a", optimizer)
    report = diff_recordings(first, train(tmp_path / "b", optimizer))
    assert (report.verdict, report.exit_code) == ("equal", 0)
    assert len(report.of_layer("layers.1.self_attn (call 3)")) > 10
    exact = diff_recordings(first, train(tmp_path / "c", optimizer, dtype="float64"))
    assert exact.ok, [(entry.layer, entry.tensor, entry.comparison.reason) for entry in exact.entries if not entry.ok]
    held = [entry for entry in exact.of_layer("layers.1.self_attn (call 3)") if None not in entry.comparison.distances]
    assert {"output", "grads.q_weight"} <= {entry.tensor for entry in held}


def test_trainings_that_part_are_no_fault_of_a_layer(tmp_path: Path) -> None:
    first = train(tmp_path / "a", "Adam")
    report = diff_recordings(first, train(tmp_path / "b", "Adam", eps=1e-2))
    assert report.first_divergence == "layers.0.self_attn (call 2)"
    assert report.diagnoses
    for each in report.diagnoses:
        assert not each.faults
        assert "The trainings part here: compare optimizer, learning rate, epsilon and gradients" in each.words


def test_a_fault_at_a_later_step_is_found_there(tmp_path: Path) -> None:
    def turn(layer: Any) -> None:
        layer.out_proj.weight.data = layer.out_proj.weight.data.T.contiguous()

    def drop(layer: Any) -> None:
        layer.in_proj_bias.data[-3:] += 0.25

    first = train(tmp_path / "a")
    for name, fault, tensor in (("b", turn, "out_weight"), ("c", drop, "v_bias")):
        report = diff_recordings(first, train(tmp_path / name, fault=fault))
        assert report.first_divergence == "layers.1.self_attn (call 2)"
        wrong = [entry.tensor for entry in report.of_layer(report.first_divergence) if not entry.ok]
        assert tensor in wrong
        assert "out_weight" not in wrong or tensor == "out_weight"
    assert report.diagnosis is not None


# -- MindSpore ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mindspore() -> Any:
    module = pytest.importorskip("mindspore")
    module.runtime.launch_blocking()
    yield module
    module.set_context(mode=module.PYNATIVE_MODE)


def net(mindspore: Any) -> Any:
    class Net(mindspore.nn.Cell):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attention = mindspore.nn.MultiheadAttention(8, 2, batch_first=True)

        def construct(self, x: Any) -> Any:
            return self.attention(x, x, x)[0] + x

    return Net()


@pytest.mark.parametrize("way", ["graph mode", "a compiled function", "a compiled function, called before"])
def test_compiled_mindspore(way: str, target: Path, mindspore: Any) -> None:
    model, x = net(mindspore), mindspore.Tensor(QUERY)
    wanted = model(x).asnumpy()
    if way == "graph mode":
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
        compiled = model
    else:

        @mindspore.jit  # type: ignore[untyped-decorator]
        def compiled(x: Any) -> Any:
            return model(x)

    if way.endswith("before"):
        compiled(x)
    mode = mindspore.get_context("mode")
    with record(model, target):
        found = compiled(x)
    assert "MS_JIT" not in os.environ
    assert mindspore.get_context("mode") == mode
    assert np.abs(found.asnumpy() - wanted).max() < 1e-5
    assert layers_of(target) == ["attention", ""]
    assert ("graph mode" in opened(target).metadata["environment"]) == (way == "graph mode")
    assert np.abs(compiled(x).asnumpy() - wanted).max() < 1e-5


def test_a_switch_that_the_user_has_set_is_put_back(
    target: Path, mindspore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MS_JIT", "1")
    model = net(mindspore)
    with record(model, target):
        assert os.environ["MS_JIT"] == "0"
        model(mindspore.Tensor(QUERY))
    assert os.environ["MS_JIT"] == "1"


# -- any of them -------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import os, pathlib, signal, sys
from mhabridge.recording import record
from tests import worker_record
fw = worker_record.KINDS[sys.argv[1]]()
given = worker_record.arguments(fw)
try:
    with record(fw.net, sys.argv[2]):
        fw.net(*given)
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            fw.net(*given)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["torch", "mindspore"])
def test_ctrl_c_finishes_the_file(name: str, target: Path) -> None:
    pytest.importorskip(name)
    command = [sys.executable, "-c", INTERRUPTED, name, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.splitlines()[-1:] == ["interrupted"], done.stderr[-2000:]
    found = opened(target).metadata
    assert found["complete"] is False
    assert len(found["calls"]) >= 3


def test_without_the_framework_the_error_says_what_to_install(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Net", (), {"__module__": "torch.nn.modules.module"})
    monkeypatch.setitem(sys.modules, "mhabridge.adapters.torch", None)  # as where PyTorch cannot be imported
    with pytest.raises(BackendError, match="pip install 'mhabridge"):
        record(kind(), target)
