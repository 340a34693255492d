"""``mhabridge diff checkpoints`` and ``diff recordings``: what they print, write and exit with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mhabridge as mb

click_testing = pytest.importorskip("click.testing", reason="click is not installed")
SPEC = mb.MHASpec(8, 2)


def invoke(*arguments: Any) -> Any:
    from mhabridge.cli.diff import command

    return click_testing.CliRunner().invoke(command, [str(each) for each in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """a.npz and b.npz are the same layer in two layouts; in c.npz its output projection is transposed."""
    weights = mb.MHAWeights.random(SPEC)
    assert weights.out_weight is not None
    wrong = mb.MHAWeights(**{**weights.arrays(), "out_weight": weights.out_weight.T.copy()})
    for name, layout, one in (("a", "torch", weights), ("b", "gpt2", weights), ("c", "torch", wrong)):
        np.savez(tmp_path / f"{name}.npz", **one.to_layout(layout, SPEC, prefix="attn"))
    return tmp_path


def test_the_same_weights(files: Path) -> None:
    result = invoke("checkpoints", files / "a.npz", files / "b.npz")
    assert result.exit_code == 0, result.output
    assert "8 tensors compared: 8 equal" in result.output
    assert result.output.endswith("verdict: the same\n")
    assert "q_weight" in invoke("checkpoints", files / "a.npz", files / "b.npz", "--all").output


def test_other_weights_are_named_with_what_mends_them(files: Path) -> None:
    result = invoke("checkpoints", files / "a.npz", files / "c.npz")
    assert result.exit_code == 1, result.output
    assert "out_weight" in result.output
    assert "transpose" in result.output
    assert result.output.endswith("verdict: NOT ok\n")


def test_every_output_says_the_same(files: Path) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    table, html = files / "x.csv", files / "x.html"
    result = invoke("checkpoints", files / "a.npz", files / "c.npz", "--json", "--csv", table, "--html", html)
    assert result.exit_code == 1, result.output
    data = json.loads(result.stdout)
    assert (data["kind"], data["verdict"], data["first_divergence"]) == ("checkpoints", "off", "attn")
    assert table.read_text().count("\n") == 1 + len(data["entries"])
    assert "transpose" in html.read_text()


def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", -np.inf)):
        np.savez(tmp_path / f"{name}.npz", **{'=HYPERLINK("x").weight': np.float32([[value, 2.0]]), "-w": np.ones(3)})
    text = mb.diff_checkpoints(tmp_path / "a.npz", tmp_path / "b.npz").to_csv()
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert [cell for cell in cells if cell[:1] in ("=", "+", "@")] == []
    assert any(cell.startswith("'=HYPERLINK(") for cell in cells)
    assert "-inf" in text


def test_what_cannot_be_done(files: Path) -> None:
    assert invoke("checkpoints", files / "a.npz", files / "none.npz").exit_code != 0
    assert isinstance(invoke("checkpoints", files / "a.npz", files / "none.npz").exception, mb.MHABridgeError)
    assert invoke("checkpoints", files / "a.npz").exit_code == 2
    before = invoke("--grads", "checkpoints", files / "a.npz", files / "b.npz")
    assert before.exit_code == 2
    assert "options of checkpoints come after it" in before.output


@pytest.mark.frameworks
def test_recordings(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3).eval()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for name in "abc":
        if name == "c":
            weight = model.layers[1].self_attn.out_proj.weight
            weight.data = weight.data.T.contiguous()
        with mb.record(model, tmp_path / f"{name}.safetensors"):
            model(x)
    good = invoke("recordings", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert good.exit_code == 0, good.output
    assert "rounding explains every difference" in good.output
    bad = invoke("recordings", tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert bad.exit_code == 1, bad.output
    marked = [line for line in bad.output.splitlines() if "<--- first divergence" in line]
    assert len(marked) == 1
    assert "1.self_attn" in marked[0]
    assert "mend: out_proj.weight: transpose" in bad.output
