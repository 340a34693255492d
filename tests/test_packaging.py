"""The sdist and the wheel: what is in them, and that a clean environment can use the wheel.

Needs PyPI (or pip's own settings of another index) for NumPy and the other requirements.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]  # makes an environment, as a framework's worker needs

ROOT = Path(__file__).parent.parent
NOT_SOURCES = (".git", ".venv*", ".mhabridge", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info")

ROUND_TRIP = """
import sys, numpy as np, mhabridge as mb
assert "site-packages" in mb.__file__, mb.__file__
spec = mb.MHASpec(embed_dim=8, num_heads=2, kdim=4)
assert mb.MHASpec.from_json(spec.to_json()) == spec
assert mb.MHASpec.from_kwargs("mindspore", **spec.to_kwargs("mindspore")) == spec
weights = mb.MHAWeights.random(spec)
assert mb.MHAWeights.from_layout("torch", weights.to_layout("torch", spec), spec) == weights
query, key, value = np.ones((3, 2, 8), "float32"), np.ones((5, 2, 4), "float32"), np.ones((5, 2, 8), "float32")
result = mb.backend("numpy").run(spec, weights, query, key, value)
print(result.output.shape, result.attn_weights.shape, result.output.dtype)
try:
    mb.build(spec, "torch")
except mb.BackendError as error:
    print(error.advice)
"""


def run(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run in a folder that is not the checkout, with the user's settings of pip but none of this test's Python."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: text for name, text in os.environ.items() if name not in dropped}
    environment.update(MHABRIDGE_HOME=str(folder / "home"), **more)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def succeed(command: list[str], folder: Path) -> str:
    done = run(command, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it, built from a copy with some litter around."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for litter in (".venv/lib/litter.py", ".mhabridge/litter.json", "tests/__pycache__/litter.pyc", "build/litter.py"):
        (source / litter).parent.mkdir(parents=True, exist_ok=True)
        (source / litter).write_text("litter")
    succeed([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)], folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def sdist(built: Path) -> set[str]:
    """The sdist's files, without its top folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment in which nothing but the wheel and its requirements is installed."""
    folder = tmp_path_factory.mktemp("clean")
    succeed([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    install(folder, str(next(built.glob("*.whl"))))
    return folder


def install(folder: Path, what: str) -> None:
    succeed([str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", what], folder)


def sources(folder: str, suffix: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(f"*{suffix}")}


def test_the_sdist_has_all_that_the_tests_and_pages_need(sdist: set[str]) -> None:
    for folder, suffix in (("mhabridge", ".py"), ("adapters", ".py"), ("tests", ".py"), ("mappings", ".toml")):
        assert sources(folder, suffix) <= sdist
    for folder, suffix in (("docs", ".md"), ("docs", ".svg"), ("examples", ".py"), ("benchmarks", ".py")):
        assert sources(folder, suffix)
        assert sources(folder, suffix) <= sdist
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"} <= sdist


def test_the_wheel_has_the_library_its_tables_and_its_types(wheel: set[str]) -> None:
    assert sources("mhabridge", ".py") <= wheel
    for folder, suffix in (("adapters", ".py"), ("mappings", ".toml"), ("mappings", ".py")):
        assert {f"mhabridge/{name}" for name in sources(folder, suffix)} <= wheel
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "mhabridge/diff/page/templates").iterdir()}
    assert templates
    assert templates <= wheel
    assert "mhabridge/py.typed" in wheel
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_wheel_has_nothing_else(wheel: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert "mhabridge" in tops
    assert all(top == "mhabridge" or top.endswith(".dist-info") for top in tops), tops


def test_neither_has_litter(sdist: set[str], wheel: set[str]) -> None:
    for name in sdist | wheel:
        assert "litter" not in name
        assert not any(part in (".venv", ".mhabridge", "__pycache__", ".git") for part in name.split("/")), name


def test_the_wheel_works_without_any_framework(clean: Path) -> None:
    answer, advice = succeed([str(clean / "venv/bin/python"), "-c", ROUND_TRIP], clean).splitlines()
    assert answer == "(3, 2, 8) (2, 3, 5) float64"
    assert "pip install 'mhabridge[torch]'" in advice


def test_the_bare_names_are_not_installed(clean: Path) -> None:
    for name in ("adapters", "mappings"):
        done = run([str(clean / "venv/bin/python"), "-c", f"import {name}"], clean)
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_the_command_without_click_says_what_to_install_and_then_works(clean: Path, built: Path) -> None:
    command = str(clean / "venv/bin/mhabridge")
    done = run([command, "--help"], clean)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "mhabridge: the command line needs click and rich. Install them with: pip install 'mhabridge[cli]'"
    ]
    install(clean, f"{next(built.glob('*.whl'))}[cli]")
    assert "mhabridge [OPTIONS] COMMAND" in succeed([command, "--help"], clean)
    assert "has_bias" in succeed([command, "mapping", "torch@1.8.1", "mindspore@2.3"], clean)
    assert "numpy" in succeed([command, "backends", "list"], clean)
    page = run([command, "diff", "--backends", "numpy", "--html", "report.html"], clean)
    assert page.returncode == 2
    assert "pip install 'mhabridge[report]'" in page.stderr
    assert not (clean / "report.html").exists()
