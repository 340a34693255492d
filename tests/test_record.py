"""Recording in each framework: what is in the file is what the framework itself says, and the model notices nothing.

PyTorch and MindSpore record here, through ``mb.record``; MegEngine in its own interpreter, with the record kit.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from mhabridge.backends import shipping
from mhabridge.backends.worker import Worker
from mhabridge.recording import kit, record
from mhabridge.recording.contents import Contents, open_contents
from tests import worker_record
from tests.conftest import _infos as infos
from tests.worker_record import MEMORY, QUERY, SLOPE

pytestmark = pytest.mark.frameworks

Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def kit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    (folder / "mhabridge_record.py").write_text(kit.compose(), encoding="utf-8")
    return folder


@pytest.fixture
def elsewhere(framework: str, kit_folder: Path, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a scenario in a fresh interpreter with the kit; its result lies in ``tmp_path``."""

    def run(scenario: str) -> subprocess.CompletedProcess[str]:
        script = [worker_record.__file__, str(kit_folder), framework, scenario, str(tmp_path)]
        return subprocess.run([infos()[framework].python, "-I", *script], capture_output=True, text=True)

    return run


@pytest.fixture
def run(framework: str, elsewhere: Any, tmp_path: Path) -> Run:
    """Runs a scenario with ``mb.record`` here, or with the kit there; gives the folder with the result."""

    def here(scenario: str) -> Path:
        if infos()[framework].where != "here":
            done = elsewhere(scenario)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            getattr(worker_record, scenario)(worker_record.KINDS[framework](), record, tmp_path)
        return tmp_path

    return here


@pytest.fixture(autouse=True)
def _files_are_closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


OPEN: list[Contents] = []


def expected(folder: Path) -> Any:
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        return dict(file)


def opened(folder: Path, name: str = "a.safetensors") -> Contents:
    """A recording, of which the safetensors library also thinks that it is a whole file."""
    contents = open_contents(folder / name)
    OPEN.append(contents)
    if name.endswith(".safetensors"):
        with safetensors.safe_open(folder / name, framework="np") as file:
            assert set(file.keys()) == set(contents.tensors)
        assert not (folder / f"{name}.journal").exists()
    return contents


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Raise unless the bits are the same."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Raise unless two orders of the same float32 sums explain the difference."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5


def argument(contents: Contents, call: int, name: str) -> np.ndarray:
    entry = contents.metadata["calls"][call]["arguments"][name]
    return contents.read(entry["tensor"])


def output(contents: Contents, call: int, number: int = 0) -> np.ndarray:
    return contents.read(contents.metadata["calls"][call]["outputs"][number]["tensor"])


# -- what is recorded --------------------------------------------------------------------------------------------------


def check_plain(framework: str, folder: Path) -> None:
    wanted, found = expected(folder), opened(folder)
    same(wanted["after"], wanted["before"])
    same(wanted["again"], wanted["before"])
    metadata = found.metadata
    assert (metadata["format"], metadata["framework"], metadata["complete"]) == (2, framework, True)
    assert {"python", "numpy", "platform", "device"} <= metadata["environment"].keys()
    assert [(c["index"], c["layer"], c["nth"], c["training"]) for c in metadata["calls"]] == [
        (0, "first", 0, False),
        (1, "between", 0, False),
        (2, "second.0", 0, False),
        (3, "second.0", 1, False),
    ]
    assert wanted["calls"] == 4
    same(argument(found, 0, "query"), QUERY)
    same(argument(found, 0, "key"), MEMORY)
    same(argument(found, 0, "key_padding_mask"), wanted["padding"])
    same(argument(found, 0, "attn_mask"), wanted["mask"])
    given = metadata["calls"][0]["arguments"]
    assert given["value"] == {"same_as": "key"}
    assert given["need_weights"] == {"value": True}
    assert given.keys() == {"query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"}
    same(output(found, 0), wanted["output"])
    same(output(found, 0, 1), wanted["weights"])
    same(output(found, 1), wanted["middle"])
    layers = metadata["layers"]
    assert [(path, layers[path]["kind"], layers[path]["attention"]) for path in ("first", "second.0")] == [
        ("first", "MultiheadAttention", True),
        ("second.0", "MultiheadAttention", True),
    ]
    assert layers["between"]["attention"] is False
    settings = layers["first"]["settings"]
    assert (settings["embed_dim"], settings["num_heads"], settings["batch_first"]) == (8, 2, True)
    for name in wanted:
        if name.startswith("first/"):
            same(found.read(layers["first"]["parameters"][name.partition("/")[2]]), wanted[name])
    assert layers["first"]["parameters"].keys() == {n.partition("/")[2] for n in wanted if n.startswith("first/")}


def test_what_goes_in_and_comes_out(framework: str, run: Run) -> None:
    folder = run("plain")
    check_plain(framework, folder)
    left_out = opened(folder).metadata["left_out"]
    silent = ["second.0: attn_weights: the model did not ask this layer for them"]  # MegEngine's default is not to
    assert left_out == (silent if framework == "megengine" else [])


def test_the_kit_records_the_same(framework: str, elsewhere: Any, tmp_path: Path) -> None:
    done = elsewhere("plain")
    assert done.returncode == 0, done.stderr[-3000:]
    check_plain(framework, tmp_path)


def test_half_precision_is_kept(framework: str, run: Run) -> None:
    folder = run("half")
    found = opened(folder)
    code = "BF16" if framework == "torch" else "F16"
    codes = {place.code for name, place in found.tensors.items()}
    assert codes == {code}
    same(output(found, 0).astype("f4"), expected(folder)["output"])
    assert list(found.metadata["layers"]) == [""]  # the layer is the model


def test_all_layers_each_parameter_once(framework: str, run: Run) -> None:
    found = opened(run("everything"))
    calls = [call["layer"] for call in found.metadata["calls"]]
    assert [layer for layer in calls if layer in ("", "first", "between", "second.0")] == [
        "first",
        "between",
        "second.0",
        "second.0",
        "",  # it ends after its parts
    ]
    assert found.metadata["layers"][""]["parameters"] == {}
    assert found.metadata["layers"]["between"]["parameters"].keys() == {"weight", "bias"}
    packed = {"io_weight_bias"} if framework == "megengine" else {"in_proj_weight", "out_proj.weight"}
    assert packed <= found.metadata["layers"]["first"]["parameters"].keys()


def test_layers_by_class_without_parameters(framework: str, run: Run) -> None:
    found = opened(run("of_a_class"))
    assert list(found.metadata["layers"]) == ["between"]
    assert found.metadata["layers"]["between"]["parameters"] == {}
    assert found.metadata["left_out"] == ["parameters: parameters=False"]
    assert all(name.startswith("calls/000000/") for name in found.tensors)


def worker() -> Worker:
    """MegEngine with mhabridge itself, for what the kit has not: the drop-in."""
    sources = {name: shipping.source(name) for name in (*kit.PARTS, "mhabridge.recording.dispatch")}
    sources.update({"mhabridge.checkpoint": "", "mhabridge.checkpoint.storage": ""})
    sources["mhabridge.bridge"] = shipping.source("mhabridge.bridge")
    sources["trial"] = Path(worker_record.__file__).read_text(encoding="utf-8")
    return Worker(infos()["megengine"].python, "megengine", extra_modules=sources)


def test_a_drop_in_is_recorded_once_a_call_with_what_it_has_beyond(framework: str, tmp_path: Path) -> None:
    if infos()[framework].where == "here":
        worker_record.dropin(worker_record.KINDS[framework](), record, tmp_path)
    else:
        there = worker()
        try:
            there.call("trial:dropin_there", {"folder": str(tmp_path)}, timeout=60)
        finally:
            there.close()
    found, wanted = opened(tmp_path), expected(tmp_path)
    assert len(found.metadata["calls"]) == 1
    assert found.metadata["layers"][""]["settings"]["scale"] == 0.25
    assert found.metadata["calls"][0]["arguments"]["is_causal"] == {"value": True}
    same(wanted["after"], wanted["before"])
    same(output(found, 0), wanted["before"])
    assert output(found, 0, 1).shape == (2, 3, 3)


def test_parameters_that_change_are_recorded_again(framework: str, run: Run) -> None:
    """One of the first layer's changes between two calls; the others, and the other layers', do not."""
    folder = run("trained")
    found, wanted = opened(folder), expected(folder)
    calls = [call for call in found.metadata["calls"] if call["layer"] == "first"]
    name = str(wanted["name"])
    assert [sorted(call.get("parameters", {})) for call in calls] == [[], [], [name], []]
    same(found.read(calls[2]["parameters"][name]["tensor"]), wanted["value"])
    assert not any("parameters" in call for call in found.metadata["calls"] if call["layer"] != "first")


def test_a_copy_that_is_made_meanwhile_is_not_recorded(framework: str, run: Run) -> None:
    folder = run("copied")
    wanted, found = expected(folder), opened(folder)
    same(wanted["after"], wanted["before"])
    assert np.abs(wanted["copied"] - wanted["before"]).max() > 1e-3
    calls = [call["layer"] for call in found.metadata["calls"]]
    assert calls == ["first", "second.0", "second.0", ""] * 2
    assert not any("parameters" in call for call in found.metadata["calls"])


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients(framework: str, run: Run) -> None:
    folder = run("grads")
    wanted = expected(folder)
    found = opened(folder)
    (call,) = found.metadata["calls"]
    grads = {name: found.read(entry["tensor"]) for name, entry in call["grads"].items()}
    same(grads["outputs/0"], SLOPE)
    for name in ("query", "key", "value"):
        close(grads[f"arguments/{name}"], wanted[name])
    parameters = {name for name in wanted if name.startswith("first/")}
    for name in parameters:
        close(grads[f"parameters/{name.partition('/')[2]}"], wanted[name])
    assert len(grads) == 4 + len(parameters)


def test_the_gradient_of_an_input_is_the_layers_own(framework: str, run: Run) -> None:
    """One tensor is all three inputs, and flows round the layer too."""
    folder = run("grads")
    wanted = expected(folder)
    close(wanted["around"], wanted["bare"])
    found = opened(folder, "b.safetensors")
    (call,) = found.metadata["calls"]
    assert call["grads"]["arguments/key"] == call["grads"]["arguments/value"] == {"same_as": "arguments/query"}
    own = found.read(call["grads"]["arguments/query"]["tensor"])
    close(own + SLOPE, wanted["bare"])
    assert np.abs(own - wanted["bare"]).max() > 0.1
    for name in [name for name in wanted if name.startswith("second/")]:
        close(found.read(call["grads"][f"parameters/{name.partition('/')[2]}"]["tensor"]), wanted[name])


def test_gradients_that_nobody_computes_are_missed(framework: str, run: Run) -> None:
    found = opened(run("no_backward"))
    assert all("grads" not in call for call in found.metadata["calls"])
    said = [line for line in found.metadata["left_out"] if "backward" in line]
    assert said == ["gradients of calls/000001, calls/000002, calls/000003: backward did not reach them in the block"]


# -- single-step mode --------------------------------------------------------------------------------------------------


def check_replayed(first: Contents, second: Contents, parts: int) -> None:
    calls = [[call for call in side.metadata["calls"] if call["layer"]] for side in (second, first)]
    for number, (call, other) in enumerate(zip(*calls, strict=True)):
        assert call["replaced"].keys() >= {"query", "key", "value"}
        assert set(call["replaced"].values()) == {other["layer"]}
        for name in ("query", "key", "value"):
            entry = other["arguments"][name]
            assert ("same_as" in call["arguments"][name]) == ("same_as" in entry)
            if "tensor" in entry:
                same(argument(second, number, name), first.read(entry["tensor"]))
    assert len(calls[0]) == parts
    assert not any("replaced" in call for call in second.metadata["calls"] if not call["layer"])


def test_each_layer_is_given_the_recorded_inputs(framework: str, run: Run) -> None:
    folder = run("replay")
    first, second = opened(folder), opened(folder, "b.safetensors")
    assert second.metadata["inputs_from"] == "a.safetensors"
    check_replayed(first, second, 3)
    # The layers' own answers to these inputs: another net's.
    assert np.abs(output(first, 0) - output(second, 0)).max() > 1e-3
    assert not [line for line in second.metadata["left_out"] if "its own" in line]


def test_inputs_of_another_framework_in_another_order_of_axes(framework: str, run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (torch.nn.MultiheadAttention(8, 2) for _ in range(2))  # (L, N, E)

        def forward(self, x: Any, memory: Any) -> Any:
            x = x + self.one(x, memory, memory, torch.from_numpy(worker_record.PADDING))[0]
            for _ in range(2):
                x = x + self.two(x, x, x)[0]
            return x

    net = Net()
    with record(net, tmp_path / "a.safetensors"):
        net(*(torch.from_numpy(np.array(one.swapaxes(0, 1))) + 1 for one in (QUERY, MEMORY)))
    run("replay_only")
    first, second = opened(tmp_path), opened(tmp_path, "b.safetensors")
    matched = [(call["layer"], set(call["replaced"].values())) for call in second.metadata["calls"] if call["layer"]]
    assert matched == [("first", {"one"}), ("second.0", {"two"}), ("second.0", {"two"})]
    for number in range(3):
        same(argument(second, number, "query"), argument(first, number, "query").swapaxes(0, 1))
    padding = argument(second, 0, "key_padding_mask")
    assert "key_padding_mask" in second.metadata["calls"][0]["replaced"]
    assert ((padding != 0) == worker_record.PADDING).all()
    lines = [line for line in second.metadata["left_out"] if "attn_mask" in line]
    assert lines == ["calls/000001: first: attn_mask: it is its own: the other recording has none for it"]


def test_one_tensor_here_and_two_in_the_recording(framework: str, run: Run) -> None:
    folder = run("told_apart")
    wanted = expected(folder)
    close(wanted["found"], wanted["wanted"])
    same(argument(opened(folder, "b.safetensors"), 0, "value"), MEMORY[::-1].copy())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_an_error_of_the_model_finishes_the_file(framework: str, run: Run) -> None:
    folder = run("failure")
    found = opened(folder)
    assert str(expected(folder)["error"]) not in ("CheckpointError", "RuntimeWarning")
    assert found.metadata["complete"] is False
    whole = [call for call in found.metadata["calls"] if call["outputs"]]
    assert [call["layer"] for call in whole] == ["first", "second.0", "second.0", ""]
    (broken,) = [call for call in found.metadata["calls"] if not call["outputs"]]
    assert broken["arguments"]["query"] == {"value": "no tensor"}
    assert "calls/000004: outputs: first did not return" in found.metadata["left_out"]


def test_a_killed_process_leaves_all_that_it_had_recorded(framework: str, elsewhere: Any, tmp_path: Path) -> None:
    done = elsewhere("killed")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.safetensors").exists()
    found = opened(tmp_path, "a.safetensors.journal")
    assert found.metadata["complete"] is False
    assert [call["layer"] for call in found.metadata["calls"]] == ["first", "second.0", "second.0", ""] * 2
    same(argument(found, 0, "query"), QUERY)
    same(output(found, 4), output(found, 0))
    assert any("the recording was not ended" in line for line in found.metadata["left_out"])


def test_nothing_recorded_is_said_aloud(framework: str, run: Run) -> None:
    folder = run("unused")
    said = [str(text) for text in expected(folder)["said"]]
    assert any("nothing was recorded" in text and "first: it was not called" in text for text in said)
    assert len(opened(folder).metadata["left_out"]) == 2


def test_the_model_s_own_answer_is_recorded(framework: str, run: Run) -> None:
    folder = run("trained")
    found, wanted = opened(folder), expected(folder)
    assert found.metadata["layers"][""]["whole"] is True
    assert found.metadata["layers"][""]["parameters"] == {}
    calls = [call for call in found.metadata["calls"] if not call["layer"]]
    assert [call["arguments"] for call in calls] == [{}] * 4
    same(found.read(calls[3]["outputs"][0]["tensor"]), wanted["answer"])


def test_memory_stays_bounded(framework: str, elsewhere: Any, tmp_path: Path) -> None:
    """50 calls with 4 MiB each, and making the file of 200 MiB, take less than a tenth of that."""
    done = elsewhere("growth")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "a.safetensors").stat().st_size > 50 * (4 << 20)
    wanted = expected(tmp_path)
    assert wanted["inside"] < 20 << 20
    assert wanted["after"] < 20 << 20
