"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "mhabridge").rglob("*.py")
    if "cli" not in path.parts
)
NEEDS_TORCH = {"mhabridge.bridge", "mhabridge.checkpoint.loading", "mhabridge.recording"}
# Run as scripts by another interpreter, never imported as modules of the package.
SCRIPTS = {"mhabridge.backends.launcher", "mhabridge.backends.child"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name in SCRIPTS:
        return
    if name in NEEDS_TORCH:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


def test_there_are_examples_to_run() -> None:
    counts = [
        len(doctest.DocTestFinder().find(importlib.import_module(name)))
        for name in ("mhabridge.spec", "mhabridge.masks")
    ]
    assert min(counts) > 2
