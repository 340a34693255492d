"""No framework is imported before it is used: seen in fresh interpreters, and forbidden by the linter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhabridge import mapping

ROOT = Path(__file__).parent.parent
MODULES = sorted(mapping.table(name)["framework"]["module"] for name in mapping.FRAMEWORKS)

LIGHT_USES = {
    "the package": "import mhabridge",
    "every public name": "import mhabridge as mb; [getattr(mb, name) for name in mb.__all__]",
    "a spec": "import mhabridge as mb; mb.MHASpec.from_json(mb.MHASpec(8, 2).to_json()).to_kwargs('mindspore')",
    "weights": (
        "import mhabridge as mb; spec = mb.MHASpec(8, 2); mb.MHAWeights.random(spec).to_layout('megengine', spec)"
    ),
    "masks": "from mhabridge import masks; masks.canonical(None, None, True, sizes=masks.Sizes(1, 1, 2, 2))",
    "a call in other words": "import mhabridge as mb; mb.translate_call('megengine', 'torch', (1, 2, 3), {})",
    "a difference table": "from mhabridge.differences import compare; compare('torch@1.8.1', 'mindspore@2.3')",
    "the list of backends": "import mhabridge as mb; mb.backends(probe=False)",
    "the handle of a backend": "import mhabridge as mb; mb.backend('numpy')",
    "the reference": (
        "import numpy as np, mhabridge as mb; spec = mb.MHASpec(8, 2); x = np.ones((2, 1, 8), 'float32');"
        "mb.backend('numpy').run(spec, mb.MHAWeights.random(spec), x, x, x)"
    ),
    "a diff with the reference": "import mhabridge as mb; mb.diff(mb.MHASpec(8, 2), ['numpy'])",
    "the support table": "from mhabridge import support; support.document()",
    "checkpoints": (
        "import os, numpy as np, mhabridge as mb; at = os.environ['HOME'] + '/a'; np.savez(at, x=np.ones(3));"
        "mb.convert_checkpoint(at + '.npz', at + '.pth', to='torch', kinds={}); mb.inspect_checkpoint(at + '.pth');"
        "mb.fingerprint(at + '.pth')"
    ),
    "the command line": (
        "import mhabridge.cli.main, mhabridge.cli.diff, mhabridge.cli.mapping, mhabridge.cli.backends;"
        "import mhabridge.cli.convert, mhabridge.cli.inspect, mhabridge.cli.fingerprint, mhabridge.cli.plans"
    ),
}


def loaded(code: str, tmp_path: Path, watched: list[str]) -> list[str]:
    """Which of the watched modules a fresh interpreter has after running ``code``."""
    report = f"; import json, sys; print(json.dumps([name for name in {watched!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "MHABRIDGE_HOME": str(tmp_path), "HOME": str(tmp_path)},
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("use", LIGHT_USES)
def test_a_light_use_imports_no_framework(use: str, tmp_path: Path) -> None:
    if use == "the command line" and importlib.util.find_spec("click") is None:
        pytest.skip("click is not installed")
    assert loaded(LIGHT_USES[use], tmp_path, MODULES) == []


def test_the_package_alone_does_not_even_import_numpy(tmp_path: Path) -> None:
    assert loaded("import mhabridge", tmp_path, ["numpy", "execnet", "mhabridge.spec"]) == []


@pytest.mark.frameworks
def test_an_import_of_a_framework_would_be_seen(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert loaded("import mhabridge.adapters.torch", tmp_path, MODULES) == ["torch"]


@pytest.mark.parametrize("name", MODULES)
def test_a_pretended_framework_would_be_seen(name: str, tmp_path: Path) -> None:
    """The same proof where no framework is installed: an empty package of that name."""
    (tmp_path / f"{name}.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mhabridge, {name}"
    assert loaded(code, tmp_path, MODULES) == [name]


@pytest.mark.parametrize("name", ["adapters", "mappings"])
def test_the_bare_names_are_refused(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import mhabridge.{name}, not {name}" in done.stderr


def lint(code: str, path: str) -> str:
    """What ruff, with the project's settings, says about code in a file of that path."""
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise"]
    done = subprocess.run(
        [*command, "--stdin-filename", path, "-"], input=code, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("statement", ["import {}", "import {}.nn as nn", "from {} import Tensor"])
def test_the_linter_forbids_frameworks_in_the_library(name: str, statement: str) -> None:
    for folder in ("mhabridge", "mhabridge/backends", "mappings"):
        assert "TID251" in lint(statement.format(name) + "\n", f"{folder}/made_up.py")


@pytest.mark.parametrize("name", MODULES)
def test_the_linter_allows_frameworks_in_adapters(name: str) -> None:
    for path in ("adapters/made_up.py", "adapters/made_up/native.py"):
        assert "TID251" not in lint(f"import {name}\n", path)
