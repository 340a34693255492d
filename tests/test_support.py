"""The support table: the page is fresh, and every cell of it is what the backends really do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhabridge import envelope, mapping, support
from mhabridge.backends import backend
from mhabridge.errors import UnsupportedError
from mhabridge.support import EXAMPLES

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == support.document(), (
        "write it again: python -m mhabridge.support docs/support.md"
    )


def test_every_feature_has_an_example() -> None:
    assert set(EXAMPLES) == set(envelope.FEATURES)


@pytest.mark.parametrize("feature", EXAMPLES)
def test_an_example_has_its_feature(feature: str) -> None:
    assert envelope.FEATURES[feature](*EXAMPLES[feature].canonical())


@pytest.mark.parametrize("name", mapping.FRAMEWORKS)
def test_every_limit_is_a_refusal_in_its_versions_only(name: str) -> None:
    for limit in mapping.table(name)["envelope"]:
        for versions in support.ranges(name):
            reason = support.refusal(name, versions.oldest, limit["feature"])
            if envelope.Limit(**limit).applies(versions.oldest):
                assert limit["reason"] in reason
            else:
                assert limit["reason"] not in reason


def test_a_changed_table_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {name: dict(table) for name, table in mapping.tables().items()}
    changed["torch"]["envelope"] = [*changed["torch"]["envelope"], {"feature": "float64", "reason": "Made up."}]
    monkeypatch.setattr(mapping, "table", changed.__getitem__)
    assert "- float64: Made up." in support.document()
    assert support.document() != PAGE.read_text(encoding="utf-8")


@pytest.mark.frameworks
@pytest.mark.parametrize("feature", EXAMPLES)
def test_a_backend_answers_what_is_native_and_refuses_the_rest(framework: str, feature: str) -> None:
    used = backend(framework)
    reason = support.refusal(used.framework, str(used.info.version), feature)
    spec, weights, inputs = EXAMPLES[feature].material()
    if reason:
        with pytest.raises(UnsupportedError):
            used.run(spec, weights, **inputs, **EXAMPLES[feature].call, timeout=100)
    else:
        notes = used.run(spec, weights, **inputs, **EXAMPLES[feature].call, timeout=100).notes
        assert any(note.startswith("native: ") for note in notes)
