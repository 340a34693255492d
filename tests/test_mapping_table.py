"""The tables themselves, the difference table made from them, and its page and command."""

from __future__ import annotations

import dataclasses
import json
from itertools import permutations
from pathlib import Path

import pytest

from mhabridge import arguments, dialects, differences
from mhabridge.arguments import CALL_FIELDS
from mhabridge.errors import ArgumentError
from mhabridge.spec import MHASpec

LAYER_FIELDS = {field.name for field in dataclasses.fields(MHASpec)}
BIASES = {"q_bias", "k_bias", "v_bias", "out_bias"}
VERSIONS = (
    "torch@1.8.1",
    "torch@1.9",
    "torch@1.11",
    "torch@1.13",
    "torch@2.0",
    "torch",
    "mindspore@2.0",
    "mindspore@2.3",
    "mindspore",
    "mindspore@2.12",
    "megengine",
    "megengine.functional",
    "numpy",
)
PAGE = Path(__file__).parent.parent / "docs" / "api-mapping.md"

# The table of MindSpore's own page for PyTorch 1.8.1 and MindSpore 2.3: (category, PyTorch's name, MindSpore's name).
MINDSPORES_OWN_ROWS = [
    ("Parameters", "embed_dim", "embed_dim"),
    ("Parameters", "num_heads", "num_heads"),
    ("Parameters", "dropout", "dropout"),
    ("Parameters", "bias", "has_bias"),
    ("Parameters", "add_bias_kv", "add_bias_kv"),
    ("Parameters", "add_zero_attn", "add_zero_attn"),
    ("Parameters", "kdim", "kdim"),
    ("Parameters", "vdim", "vdim"),
    ("Parameters", "", "batch_first"),
    ("Parameters", "", "dtype"),
    ("Input", "query", "query"),
    ("Input", "key", "key"),
    ("Input", "value", "value"),
    ("Input", "key_padding_mask", "key_padding_mask"),
    ("Input", "need_weights", "need_weights"),
    ("Input", "attn_mask", "attn_mask"),
    ("Input", "", "average_attn_weights"),
]


@pytest.mark.parametrize("name", VERSIONS)
def test_every_canonical_field_is_covered_once(name: str) -> None:
    spoken = arguments.dialect(name)
    said = {entry.field for entry in spoken.arguments if entry.field}
    covered = said | (BIASES if "bias" in said else set())
    fixed = [entry.field for entry in spoken.fixed]
    assert len(fixed) == len(set(fixed))
    assert covered & set(fixed) == set()
    assert (covered | set(fixed)) - {"bias"} == LAYER_FIELDS | set(CALL_FIELDS)


@pytest.mark.parametrize("name", VERSIONS)
def test_entries_are_complete(name: str) -> None:
    spoken = arguments.dialect(name)
    names = [entry.name for entry in spoken.arguments]
    assert len(names) == len(set(names))
    for entry in spoken.arguments:
        assert entry.role in ("parameter", "input", "weights")
        assert entry.field or entry.reason, entry.name
        assert entry.only is None or (entry.reason and entry.only == entry.default), entry.name
        assert entry.operation is None or entry.operation in dialects.OPERATIONS
        assert not entry.field or (entry.field in CALL_FIELDS) == (entry.role == "input"), entry.name
        assert set(entry.matters_with) <= set(names)
        assert set(entry.dtypes) <= {"bool", "uint8", "int", "float"}
        if entry.default is not None:
            arguments.literal(entry.default)
    for fixed in spoken.fixed:
        assert fixed.reason
        assert fixed.operation is None or fixed.operation in dialects.OPERATIONS
        assert fixed.tensor is None or fixed.tensor in names


@pytest.mark.parametrize("name", VERSIONS)
def test_rules_for_two_masks_are_about_kinds_that_are_taken(name: str) -> None:
    spoken = arguments.dialect(name)
    if spoken.masks_together is not None:
        rule = spoken.masks_together
        masks = [spoken.argument_for(field) for field in ("key_padding_mask", "attn_mask")]
        kinds = [kind for group in rule.kinds for kind in group]
        assert sorted(kinds) == sorted({kind for mask in masks for kind in mask.dtypes})
        assert rule.reason
        assert rule.advice


@pytest.mark.parametrize(
    ("version", "words"),
    [("2.0", "NaN (measured"), ("2.1", "not measured"), ("2.9", "not measured"), ("2.10", "uninitialised memory in")],
)
def test_only_what_was_measured_is_said_to_be(version: str, words: str) -> None:
    said = {entry.topic: entry.text for entry in arguments.dialect(f"mindspore@{version}").behaviour}
    assert said["Fully masked rows"].startswith(words)


@pytest.mark.parametrize("operation", list(dialects.OPERATIONS))
def test_every_operation_is_used_by_a_table(operation: str) -> None:
    used = {entry.operation for name in VERSIONS for entry in arguments.dialect(name).arguments}
    used |= {entry.operation for name in VERSIONS for entry in arguments.dialect(name).fixed}
    assert operation in used


def test_versions_bring_and_rename_arguments() -> None:
    def names(spoken: str) -> set[str]:
        return {entry.name for entry in arguments.dialect(spoken).arguments}

    assert names("torch@1.9") - names("torch@1.8.1") == {"batch_first", "device", "dtype"}
    assert names("torch@1.11") - names("torch@1.10.2") == {"average_attn_weights"}
    assert names("torch@2.0.0") - names("torch@1.13.1") == {"is_causal"}
    assert names("mindspore@2.3.0rc1") - names("mindspore@2.0") == {"dtype"}
    assert names("mindspore@2.12") ^ names("mindspore@2.11") == {"has_bias", "bias"}
    assert arguments.dialect("mindspore").argument_for("bias").name == "has_bias"


def test_the_rows_are_those_of_mindspores_own_page() -> None:
    rows = differences.compare("torch@1.8.1", "mindspore@2.3").rows
    assert [(row.category, row.source, row.target) for row in rows] == MINDSPORES_OWN_ROWS
    assert [row.subcategory for row in rows[-2:]] == ["Input6", "Input7"]
    assert {row.target for row in rows if not row.kinds} >= {
        "embed_dim",
        "num_heads",
        "dropout",
        "query",
        "need_weights",
    }


@pytest.mark.parametrize(("source", "target"), list(permutations(arguments.names(), 2)))
def test_any_ordered_pair_has_every_argument_in_one_row(source: str, target: str) -> None:
    found = differences.compare(source, target)
    for spoken, side in ((found.source, "source"), (found.target, "target")):
        cells = [name for row in found.rows for name in getattr(row, side).split(", ") if name]
        assert sorted(cells) == sorted(entry.name for entry in spoken.arguments)
    assert all(row.difference.startswith("Consistent function") or row.kinds for row in found.rows)
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["category"] == "Parameters"


def test_a_dialect_does_not_differ_from_itself() -> None:
    found = differences.compare("torch", "torch")
    assert all(row.kinds == () for row in found.rows)
    assert found.behaviour == ()


@pytest.mark.parametrize(
    ("source", "target", "name", "kinds", "words"),
    [
        (
            "torch",
            "megengine",
            "need_weights",
            ("default", "position"),
            "True in PyTorch 2.13, False in MegEngine 1.13",
        ),
        ("torch", "megengine", "attn_mask", ("position",), "6 in PyTorch 2.13, 5 in MegEngine 1.13"),
        ("torch", "megengine", "dropout", ("name",), "resets attn_dropout to 0"),
        ("torch", "megengine", "add_bias_kv", ("only", "position"), "MegEngine 1.13 accepts only False"),
        ("torch", "mindspore", "is_causal", ("missing",), "In MindSpore 2.10 always False"),
        ("torch", "mindspore", "dtype", ("default", "position"), "None (that is float32) in PyTorch 2.13"),
        ("torch@1.8.1", "torch", "key_padding_mask", ("dtypes",), "bool or uint8 in PyTorch 1.8.1"),
        ("torch@1.8.1", "mindspore", "bias", ("name",), "bias=False still leaves an out_proj.bias"),
        ("torch", "megengine.functional", "bias", ("name", "default"), "False in MegEngine functional"),
        ("torch", "megengine.functional", "kdim", ("missing",), "read from the key's shape"),
    ],
)
def test_differences_are_named(source: str, target: str, name: str, kinds: tuple[str, ...], words: str) -> None:
    row = next(row for row in differences.compare(source, target).rows if row.source == name)
    assert row.kinds == kinds
    assert words in row.difference


def test_differences_without_an_argument_are_listed() -> None:
    topics = {topic: (here, there) for topic, here, there in differences.compare("torch", "mindspore").behaviour}
    assert topics["Mode of a fresh layer"][0] == "training"
    assert topics["Returned for need_weights=False"] == ("(output, None)", "(output,): a tuple of one")
    assert "Initial out bias" in topics
    assert "Axis order" not in topics


@pytest.mark.parametrize("name", VERSIONS)
def test_every_dialect_says_something_on_every_topic(name: str) -> None:
    topics = [entry.topic for entry in arguments.dialect("numpy").behaviour]
    assert [entry.topic for entry in arguments.dialect(name).behaviour] == topics


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == differences.document(), (
        "docs/api-mapping.md is stale: python -m mhabridge.differences docs/api-mapping.md"
    )


def test_the_signature_is_python() -> None:
    assert differences.signature(arguments.dialect("torch@1.8.1")).splitlines()[-1] == (
        ")(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None)"
    )
    compile(differences.signature(arguments.dialect("megengine.functional")), "signature", "exec")


def test_markdown_cells_cannot_break_the_table() -> None:
    for line in differences.compare("torch", "megengine.functional").to_markdown().splitlines():
        if line.startswith("| Parameters") or line.startswith("|  |"):
            assert line.replace("\\|", "").count("|") == 6


class TestCommand:
    """``mhabridge mapping``."""

    @staticmethod
    def invoke(*args: str) -> tuple[int, str]:
        testing = pytest.importorskip("click.testing", reason="the command line is not installed")
        pytest.importorskip("rich", reason="the command line is not installed")
        from mhabridge.cli.mapping import command

        result = testing.CliRunner().invoke(command, list(args), env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    def test_json(self) -> None:
        code, output = self.invoke("torch@1.8.1", "mindspore@2.3", "--json")
        assert code == 0
        assert [row["target"] for row in json.loads(output)["rows"]][3] == "has_bias"

    def test_markdown(self) -> None:
        code, output = self.invoke("torch@1.8.1", "mindspore@2.3", "--markdown")
        assert code == 0
        assert output == differences.compare("torch@1.8.1", "mindspore@2.3").to_markdown()

    def test_terminal(self) -> None:
        code, output = self.invoke("torch", "megengine")
        assert code == 0
        assert "maybe_cudnn_style_mask" in output
        assert "Mode of a fresh layer" not in output
        assert "class megengine.module.MultiHeadAttention(" in output

    def test_not_both_formats(self) -> None:
        assert self.invoke("torch", "megengine", "--json", "--markdown")[0] == 2

    def test_an_unknown_dialect_is_our_error(self) -> None:
        with pytest.raises(ArgumentError, match="dialect: given 'jax'"):
            self.invoke("torch", "jax")
