"""The record kit: one file that stands alone, also on Python 3.8, and the command that writes it."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mhabridge as mb
from mhabridge import mapping
from mhabridge.errors import ArgumentError
from mhabridge.recording import kit
from mhabridge.recording.contents import open_contents
from tests import test_worker_calls

python38 = test_worker_calls.python38  # the fixture: an interpreter with NumPy 1.23 and nothing else

# Without a framework: its adapter is the plain one of the tests, as PyTorch's would be.
STANDS_ALONE = """
import sys
sys.path[:0] = sys.argv[1:3]
import mhabridge_record as kit
assert sys.modules.keys() & {"numpy", "torch"} == set(), "nothing is imported before it is needed"
record = kit.record
root = "mhabridge_record_parts"
import importlib
Recorder, Options = (getattr(importlib.import_module(root + ".recording.recorder"), n) for n in ("Recorder", "Options"))
import numpy as np
import plain_framework as plain
x = plain.Tensor(np.ones((2, 3), "f4"))
layer = plain.Attention(num_heads=1, weight=x)
with Recorder(plain, layer, sys.argv[3], Options()):
    layer(x, x, x)
assert not [name for name in sys.modules if name.split(".")[0] == "mhabridge"]
try:
    record(layer, "never")
except TypeError as error:
    assert "for which this file was written" in str(error), error
print(sys.version_info[:2])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mhabridge_record.py").write_text(kit.compose(["torch"]), encoding="utf-8")
    return tmp_path


def stand_alone(python: str, folder: Path) -> str:
    target = folder / "a.safetensors"
    command = [python, "-I", "-c", STANDS_ALONE, str(folder), str(Path(__file__).parent), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    contents = open_contents(target)
    contents.close()
    assert contents.metadata["complete"] is True
    assert contents.metadata["calls"][0]["arguments"]["key"] == {"same_as": "query"}
    return done.stdout.strip()


def test_it_stands_alone(folder: Path) -> None:
    assert stand_alone(sys.executable, folder) == str(sys.version_info[:2])


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_it_stands_alone_on_python_3_8(folder: Path, python38: str) -> None:
    assert stand_alone(python38, folder) == "(3, 8)"


# A layer of each framework's own, and a call of it.
MODELS = {
    "torch": """
import torch
model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2), 2).eval()
call = lambda: model(torch.randn(5, 2, 16))
""",
    "mindspore": """
import mindspore, numpy as np
mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
model = mindspore.nn.TransformerEncoder(mindspore.nn.TransformerEncoderLayer(16, 2), 2)
model.set_train(False)
call = lambda: model(mindspore.Tensor(np.random.default_rng(0).standard_normal((5, 2, 16)).astype("float32")))
""",
    "megengine": """
import megengine, numpy as np
class Model(megengine.module.Module):
    def __init__(self):
        super().__init__()
        self.attention = megengine.module.MultiHeadAttention(16, 2)
        self.again = megengine.module.MultiHeadAttention(16, 2)
    def forward(self, x):
        y = self.attention(x, x, x)[0]
        return self.again(y, y, y)[0]
model = Model()
model.eval()
call = lambda: model(megengine.tensor(np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32")))
""",
}
RECORDS = """
import sys
sys.path.insert(0, sys.argv[1])
import mhabridge_record
{model}
with mhabridge_record.record(model, sys.argv[2]):
    call()
"""


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_it_records_each_framework_where_only_that_is(framework: str, tmp_path: Path) -> None:
    """In the framework's own environment, of any version; both layers are judged right by what was recorded."""
    info = next(info for info in mb.backends() if info.name == framework)
    (tmp_path / "mhabridge_record.py").write_text(kit.compose([info.framework]), encoding="utf-8")
    target = tmp_path / "a.safetensors"
    code = RECORDS.format(model=MODELS[info.framework])
    command = [info.python, "-I", "-c", code, str(tmp_path), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = mb.diff_recordings(target, target)
    assert report.ok, report.to_json()
    outputs = [entry.comparison for entry in report.entries if entry.tensor == "output" and entry.layer != "(model)"]
    assert len(outputs) == 2
    assert report.layers[-1].name == "(model)"
    assert all(each.distances[0] is not None for each in outputs)  # held against float64, not only against itself


GRADIENTS = """
import sys
sys.path.insert(0, sys.argv[1])
import mhabridge_record, mindspore, numpy as np
mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
model = mindspore.nn.MultiheadAttention(16, 2, batch_first=True)
model.set_train(False)
x = mindspore.Tensor(np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32"))
with mhabridge_record.record(model, sys.argv[2], grads=True):
    mindspore.ops.grad(lambda x: (model(x, x, x)[0] ** 2).sum(), 0)(x)
"""


@pytest.mark.frameworks
@pytest.mark.timeout(300)
def test_an_old_mindspore_s_gradients_are_recorded(tmp_path: Path) -> None:
    """Its hooks are given another class of tensors."""
    infos = [info for info in mb.backends() if info.name == "mindspore@2.0.0"]
    if not infos:
        pytest.skip("there is no MindSpore 2.0.0")
    (tmp_path / "mhabridge_record.py").write_text(kit.compose(["mindspore"]), encoding="utf-8")
    command = [infos[0].python, "-I", "-c", GRADIENTS, str(tmp_path), str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    contents = open_contents(tmp_path / "a.safetensors")
    contents.close()
    assert all("gradients of parameters" in line for line in contents.metadata["left_out"])
    assert contents.metadata["calls"][0]["grads"].keys() == {"arguments/query", "outputs/0"}


def test_it_is_python_3_8() -> None:
    ast.parse(kit.compose(), feature_version=(3, 8))
    for part in kit.PARTS:
        ast.parse(kit._source(part), feature_version=(3, 8))


def test_it_has_the_sources_as_they_are(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("a_kit", folder / "mhabridge_record.py")
    assert spec is not None
    assert spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    root = Path(__file__).parent.parent
    assert made.SOURCES.keys() == {*kit.PARTS, "mhabridge.adapters.torch.recording"}
    for name, text in made.SOURCES.items():
        place = root.joinpath(*name.replace("mhabridge.adapters", "adapters").split("."))
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert text == file.read_text(encoding="utf-8"), name
    assert made.FRAMEWORKS == {"torch": "torch"}


def test_each_framework_can_be_alone_or_all() -> None:
    whole = kit.compose()
    for name in mapping.FRAMEWORKS:
        assert f"SOURCES['mhabridge.adapters.{name}.recording']" in whole
        assert kit.compose([name]).count("SOURCES['mhabridge.adapters.") == 1
    with pytest.raises(ArgumentError, match="one of torch, mindspore, megengine"):
        kit.compose(["numpy"])


def test_it_says_how_to_use_it(folder: Path) -> None:
    done = subprocess.run([sys.executable, str(folder / "mhabridge_record.py")], capture_output=True, text=True)
    assert 'with mhabridge_record.record(model, "a.safetensors"):' in done.stdout


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("click")
    from click.testing import CliRunner

    from mhabridge.cli.record_kit import command

    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    done = run(command, ["mhabridge_record.py", "--framework", "torch", "--framework", "megengine"])
    assert done.exit_code == 0
    assert "for torch, megengine; `import mhabridge_record` there." in done.output
    assert Path("mhabridge_record.py").read_text(encoding="utf-8") == kit.compose(["torch", "megengine"])
    assert "force" in str(run(command, ["mhabridge_record.py"]).exception)
    again = run(command, ["mhabridge_record.py", "--force", "--json"])
    said = json.loads(again.output)
    assert said["frameworks"] == list(mapping.FRAMEWORKS)
    assert said["bytes"] == Path("mhabridge_record.py").stat().st_size
    for wrong in ("record-kit.py", "record.txt"):
        assert isinstance(run(command, [wrong]).exception, ArgumentError)
    assert "Example:" in run(command, ["--help"]).output
