"""The support table: the page is fresh, and every cell of it is what the backends really do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhabridge import envelope, mapping, support
from mhabridge.backends import backend
from mhabridge.backends.registry import Backend
from mhabridge.calls import Result
from mhabridge.diff.judge import judge
from mhabridge.diff.rounding import accuracy, bounds, named
from mhabridge.errors import UnsupportedError
from mhabridge.support import EXAMPLES, Form
from tests.cases import reference_answer

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == support.document(), (
        "write it again: python -m mhabridge.support docs/support.md"
    )


# What no table can say beforehand: the adapters find it in the numbers of a call.
IN_NUMBERS = {feature for feature, example in EXAMPLES.items() if example.unfit}


def test_every_feature_has_an_example() -> None:
    assert set(EXAMPLES) - set(envelope.FEATURES) == IN_NUMBERS | {"query_projection_size"}
    assert set(envelope.FEATURES) <= set(EXAMPLES)


@pytest.mark.parametrize("feature", envelope.FEATURES)
def test_an_example_has_its_feature(feature: str) -> None:
    assert envelope.FEATURES[feature](*EXAMPLES[feature].canonical())


@pytest.mark.parametrize("feature", sorted(IN_NUMBERS))
def test_an_example_of_numbers_has_no_feature(feature: str) -> None:
    """Else a limit in a table could be what is seen."""
    call = EXAMPLES[feature].canonical()
    assert not [name for name, has in envelope.FEATURES.items() if has(*call)]


@pytest.mark.parametrize("name", mapping.FRAMEWORKS)
def test_every_limit_is_a_reason_in_its_versions_only(name: str) -> None:
    for entry in mapping.table(name)["envelope"]:
        limit = envelope.Limit(**entry)
        for versions in support.ranges(name):
            found = support.form(name, versions.oldest, limit.feature)
            if not limit.applies(versions.oldest):
                assert limit.reason not in found.reasons
            elif limit.composable:
                assert found.kind == "refused" or (found.kind == "composed" and limit.reason in found.reasons)
            else:
                assert found.kind == "refused"
                assert limit.reason in found.reasons


def test_all_three_forms_occur() -> None:
    found = {support.form("mindspore", "2.10", feature).kind for feature in EXAMPLES}
    assert found == {"native", "composed", "refused"}


@pytest.mark.parametrize(("composable", "kind"), [(True, "composed"), (False, "refused")])
def test_a_changed_table_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch, composable: bool, kind: str) -> None:
    limit = {"feature": "float64", "reason": "Made up.", "composable": composable}
    changed = {name: dict(table) for name, table in mapping.tables().items()}
    changed["torch"]["envelope"] = [*changed["torch"]["envelope"], limit]
    monkeypatch.setattr(mapping, "table", changed.__getitem__)
    assert f"- float64, {kind}: Made up." in support.document()
    assert support.document() != PAGE.read_text(encoding="utf-8")


# -- on the frameworks themselves --------------------------------------------------------------------------------------


def run(used: Backend, feature: str, mode: str) -> Result:
    spec, weights, inputs = EXAMPLES[feature].material()
    return used.run(spec, weights, **inputs, **EXAMPLES[feature].call, mode=mode, timeout=100)


def check_numbers(used: Backend, feature: str, result: Result) -> None:
    spec, weights, inputs = EXAMPLES[feature].material()
    prepared, answer = reference_answer(spec, weights, tuple(inputs.values()), **EXAMPLES[feature].call)
    exact, found = named(answer), named(result)
    limits = bounds(prepared, weights, exact, accuracy(used.framework, spec.dtype))
    assert set(found) == set(exact)
    for tensor, array in exact.items():
        distance = judge(found[tensor], array, limits[tensor])
        assert distance.ok, f"{tensor}: {distance}"


def check_note(expected: Form, notes: tuple[str, ...], names: list[str]) -> None:
    """The first note says the form, and for a composed one names every feature and gives every reason."""
    assert notes[0].startswith(f"{expected.kind}: ")
    for text in (*expected.reasons, *(f"{name}: " for name in names)):
        assert text in notes[0], f"{text!r} is not in {notes[0]!r}"


@pytest.mark.frameworks
@pytest.mark.parametrize("feature", EXAMPLES)
def test_a_backend_does_what_the_table_says(framework: str, feature: str) -> None:
    used = backend(framework)
    version = str(used.info.version)
    expected = support.form(used.framework, version, feature)
    if expected.kind == "refused":
        for mode in ("auto", "native", "composed"):
            with pytest.raises(UnsupportedError) as error:
                run(used, feature, mode)
            assert all(reason in error.value.advice for reason in expected.reasons)
        return
    result = run(used, feature, "auto")
    limits = envelope.violations(used.framework, version, *EXAMPLES[feature].canonical())
    names = [limit.feature for limit in limits]
    if used.framework in EXAMPLES[feature].unfit:
        names.append(feature)
    check_note(expected, result.notes, names)
    check_numbers(used, feature, result)
    if expected.kind == "native":
        assert run(used, feature, "native").notes == result.notes
        return
    with pytest.raises(UnsupportedError) as error:
        run(used, feature, "native")
    assert all(reason in error.value.advice for reason in expected.reasons)


def test_the_checks_of_a_cell_can_fail() -> None:
    composed = Form("composed", ("The cell has no residual connection.",))
    good = "composed: residual: The cell has no residual connection."
    check_note(composed, (good,), ["residual"])
    for notes, names in [
        (("native: torch.nn.MultiheadAttention", good), ["residual"]),
        (("composed: asked for",), ["residual"]),
        ((good,), ["residual", "scale"]),
    ]:
        with pytest.raises(AssertionError):
            check_note(composed, notes, names)
    used = backend("numpy")
    result = run(used, "scale", "auto")
    check_numbers(used, "scale", result)
    wrong = np.array(result.output)
    wrong[0, 0, 0] += 0.01
    with pytest.raises(AssertionError, match="output"):
        check_numbers(used, "scale", Result(wrong, result.attn_weights))
