"""Every table against the installed framework's own signatures."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mhabridge import arguments, mapping
from mhabridge.backends import backend
from mhabridge.signatures import complaints, signatures

TORCH = "torch.nn.MultiheadAttention"


@pytest.mark.frameworks
def test_the_tables_agree_with_what_is_installed(backend_name: str) -> None:
    there = backend(backend_name)
    found = there.call("mhabridge.signatures:signatures", {})
    for name in mapping.table(there.framework)["dialects"]:
        spoken = arguments.dialect(name, found["version"])
        assert {spoken.constructor, spoken.call, spoken.function} - {None} <= set(found["paths"])
        assert complaints(spoken, found) == []


@pytest.fixture
def said() -> dict[str, Any]:
    """Signatures that agree with the table of torch 2.13, to be spoiled by each test."""
    spoken = arguments.dialect("torch@2.13")
    places = {spoken.constructor: spoken.constructor_arguments(), spoken.call: spoken.call_arguments()}
    paths = {
        path: [{"name": entry.name, "kind": "POSITIONAL_OR_KEYWORD", "default": entry.default} for entry in entries]
        for path, entries in places.items()
    }
    return copy.deepcopy({"version": "2.13", "paths": paths})


def test_agreement_is_silent(said: dict[str, Any]) -> None:
    assert complaints(arguments.dialect("torch@2.13"), said) == []


def spoil(said: dict[str, Any], how: str) -> None:
    parameters = said["paths"][TORCH]
    if how == "missing":
        del parameters[3]
    elif how == "unknown":
        parameters.append({"name": "rope", "kind": "POSITIONAL_OR_KEYWORD", "default": "None"})
    elif how == "renamed":
        parameters[3]["name"] = "has_bias"
    elif how == "swapped":
        parameters[4], parameters[5] = parameters[5], parameters[4]
    elif how == "default":
        parameters[2]["default"] = "0.1"
    elif how == "required":
        parameters[2]["default"] = None
    elif how == "keyword only":
        parameters[8]["kind"] = "KEYWORD_ONLY"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "the table has bias, the signature does not"),
        ("unknown", "the signature has rope, the table does not"),
        ("renamed", "the signature has has_bias, the table does not"),
        ("swapped", "the positional arguments are"),
        ("default", "the default of dropout is 0.1, in the table 0.0"),
        ("required", "the default of dropout is none (required), in the table 0.0"),
        ("keyword only", "the positional arguments are"),
    ],
)
def test_every_disagreement_is_found(said: dict[str, Any], how: str, message: str) -> None:
    spoil(said, how)
    found = complaints(arguments.dialect("torch@2.13"), said)
    assert any(message in text for text in found), found


def test_a_renamed_argument_of_a_real_signature_is_found() -> None:
    found = signatures("numpy")
    found["paths"]["mhabridge.MHASpec"][0]["name"] = "width"
    assert complaints(arguments.dialect("numpy"), found)[0].startswith("mhabridge.MHASpec: the signature has width")
