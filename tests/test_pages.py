"""The pages: README's examples run and print what they say, its table is true, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import mapping, support

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN_BY_HAND = [page for page in PAGES if page.name not in ("api-mapping.md", "support.md")]
NEEDS_DOWNLOADS = ("pip ", "make ", "mhabridge backends install", "mhabridge backends add")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def promised(code: str) -> list[str]:
    """What the comments behind the prints say."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)


def commands() -> list[list[str]]:
    """The commands of each block that has any, without those that need downloads."""
    found = [[line.partition(" #")[0].strip() for line in block.splitlines()] for block in blocks("sh")]
    left = [[line for line in lines if line and not line.startswith(NEEDS_DOWNLOADS)] for lines in found]
    return [lines for lines in left if lines]


def run(code: str, folder: Path) -> str:
    for name in mapping.FRAMEWORKS:
        if f"import {name}" in code or f'"{name}"]' in code:
            pytest.importorskip(name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


EXAMPLES = [
    (page.name, code) for page in WRITTEN_BY_HAND for code in blocks("python", page.read_text(encoding="utf-8"))
]


@pytest.mark.frameworks
@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_an_example_prints_what_it_says(page: str, code: str, tmp_path: Path) -> None:
    assert len(promised(code)) == len(re.findall(r"\bprint\(", code)) > 0
    assert run(code, tmp_path).splitlines() == promised(code)


def test_there_is_an_example_of_each_use() -> None:
    assert len(blocks("python")) == 6
    uses = [line.split()[1] for lines in commands() for line in lines]
    assert list(dict.fromkeys(uses)) == ["inspect", "convert", "fingerprint", "mapping", "backends", "diff"]


@pytest.mark.frameworks
@pytest.mark.parametrize("lines", commands(), ids=lambda lines: lines[-1])
def test_commands_run(lines: list[str], tmp_path: Path) -> None:
    spec = mb.MHASpec(8, 2)
    np.savez(tmp_path / "model.npz", **mb.MHAWeights.random(spec).to_layout("torch", spec, prefix="attn"))
    mb.convert_checkpoint(tmp_path / "model.npz", tmp_path / "model.pth")
    if any("diff checkpoints" in line for line in lines):
        mb.convert_checkpoint(tmp_path / "model.npz", tmp_path / "model.ckpt", to="mindspore")
        record_twice(tmp_path)
    for line in lines:
        program, *arguments = shlex.split(line)
        command = [Path(sys.executable).with_name(program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def record_twice(folder: Path) -> None:
    """Two recordings of one model, which are equal."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, batch_first=True), 1).eval()
    for name in ("before", "after"):
        with mb.record(model, folder / f"{name}.safetensors"):
            model(torch.ones(2, 5, 16))


def test_the_short_table_says_what_the_long_one_says() -> None:
    head, _, first, *rows = re.findall(r"^\| ?(.*) \|$", README, re.MULTILINE)
    columns = {name: mapping.table(name)["dialects"][name]["newest"] for name in mapping.FRAMEWORKS}
    titles = [f"{mapping.table(name)['framework']['title']} {newest}" for name, newest in columns.items()]
    assert [cell.strip() for cell in head.split("|")][1:] == titles
    assert first.endswith("| native | native | native")
    features = {example.title: feature for feature, example in support.EXAMPLES.items()}
    for row in rows:
        title, *cells = row.split(" | ")
        assert cells == [support.form(name, newest, features[title]).kind for name, newest in columns.items()], title


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target
