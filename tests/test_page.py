"""The report page, as text: what is on it, that nothing on it can do harm, that it stays small; and the figure."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

from mhabridge.diff import figure, page
from mhabridge.diff.comparing import Comparison, compare
from mhabridge.diff.judge import Distance
from mhabridge.diff.page import colours, rendering
from mhabridge.diff.page.drawing import drawn, key, most_telling
from mhabridge.diff.page.layers import Group, Leaf, all_leaves, tree_of
from mhabridge.diff.pictures import picture
from mhabridge.diff.report import DiffReport, Entry, Layer, Run
from mhabridge.errors import BackendError, CheckpointError
from tests import reports

FAILED = Run("megengine", "megengine", "", "worker", "failed", "died: SIGSEGV in forward")


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and all text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.raw = tag if tag in ("script", "style") else self.raw

    def handle_endtag(self, tag: str) -> None:
        self.raw = "" if tag == self.raw else self.raw

    def handle_data(self, data: str) -> None:
        if not self.raw:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def written(report: DiffReport, folder: Path) -> str:
    page.write(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def between(text: str, start: str, end: str) -> str:
    return text.split(start, 1)[1].split(end, 1)[0]


def data_of(text: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        between(text, '<script type="application/json" id="report">', "</script>"),
        parse_constant=lambda word: pytest.fail(f"{word} is not JSON"),
    )
    return found


def test_the_page_needs_nothing_else_and_forbids_the_rest(tmp_path: Path) -> None:
    text = written(reports.of_backends(), tmp_path)
    elements = Elements(text).elements
    addresses = [item or "" for _, names in elements for name, item in names.items() if name in ("src", "href", "data")]
    assert len(addresses) > 50
    assert all(address.startswith(("data:", "#")) for address in addresses), addresses
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    policy = next(names["content"] or "" for tag, names in elements if names.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        content = text.rsplit(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        allowed = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{allowed}'" in policy
    handlers = [name for _, names in elements for name in names if name.startswith("on") or name == "style"]
    assert handlers == []  # the policy would forbid them


def test_a_hostile_report_is_only_text(tmp_path: Path) -> None:
    text = written(reports.of_hostile(), tmp_path)
    shown = Elements(text)
    tags = [tag for tag, _ in shown.elements]
    assert tags.count("script") == 3
    assert tags.count("style") == 1
    assert "img" not in tags
    assert "alert('named')" in shown.text
    assert "\\u202e\\x00\\ud800" in shown.text  # what cannot be seen is written out
    assert not re.search("[\u202e\x00]", text)
    assert len(text) < 300_000  # a name of 100,000 letters is cut
    assert data_of(text)["notes"] == [reports.HOSTILE]


def test_the_numbers_on_the_page_are_the_report(tmp_path: Path) -> None:
    report = reports.of_backends()
    data = data_of(written(report, tmp_path))
    assert data == json.loads(report.to_json())
    hostile = data_of(written(reports.of_hostile(), tmp_path))
    entry = hostile["entries"][0]  # type: ignore[index]
    assert entry["max_rel"] == "inf"
    assert entry["distances"][1]["times_bound"] == "inf"
    assert entry["distances"][1]["times_mean_bound"] is None


@pytest.mark.parametrize(
    ("report", "verdict", "sentence"),
    [
        (reports.of_backends(2), "off", "2 of 6 comparisons are further apart than rounding explains."),
        (reports.of_backends(1, faulty=False), "rounding", "Rounding explains every difference."),
        (reports.of_backends(2, faulty=False, strange="nan"), "broken", "1 of 6 comparisons is broken: missing,"),
        (reports.of_backends(2, faulty=False, strange="masked"), "rounding", "Rounding explains every difference."),
        (reports.of_training(), "off", "The trainings part at step 17, by more than rounding explains."),
        (reports.of_training(None), "rounding", "Rounding explains how far the trainings part."),
        (DiffReport((), ()), "failed", "Nothing was compared."),
        (DiffReport((FAILED,), ()), "failed", "megengine failed."),
    ],
)
def test_the_verdict_comes_first(report: DiffReport, verdict: str, sentence: str, tmp_path: Path) -> None:
    text = Elements(written(report, tmp_path)).text
    assert text.index(sentence) < text.index("How to read this")
    assert re.search(rf"{re.escape(rendering.GLYPHS[verdict])} {verdict} ", text[:300])


def test_equal_is_said_as_equal(tmp_path: Path) -> None:
    entry = Entry("", "x", "a", "b", compare(np.ones(3), np.ones(3)))
    assert "The only comparison is equal, bit for bit." in Elements(written(DiffReport((), (entry,)), tmp_path)).text


def test_why_and_how_to_mend_it_stand_before_the_comparisons(tmp_path: Path) -> None:
    report = reports.of_recordings(8)
    text = Elements(written(report, tmp_path)).text
    head = text[: text.index("48 comparisons in 8 layers")]
    for words in (
        "First divergence: encoder.layers.6.self_attn",
        "Likely cause: mindspore.safetensors: projection transposed (out_weight)",
        "To mend it: out_proj.weight: transpose",
        "388 hypotheses tried.",
    ):
        assert words in head
    assert "unexplained" not in text
    nothing = dataclasses.replace(report.diagnoses[0], faults=(), others=(), sure="", words="")
    text = Elements(written(dataclasses.replace(report, diagnoses=(nothing,)), tmp_path)).text
    assert "unexplained" in text
    assert "None of the known faults explains the difference." in text
    assert "To mend it" not in text


def test_what_differs_between_the_sides_is_marked(tmp_path: Path) -> None:
    text = Elements(written(reports.of_recordings(2), tmp_path)).text
    assert "device cuda:0 cpu ≠ differs" in text
    assert "python 3.11.7 3.11.7 differs" not in text.replace("≠ ", "")
    assert "died: SIGSEGV in forward" in Elements(written(DiffReport((FAILED,), ()), tmp_path)).text


def test_every_number_of_an_entry_is_shown(tmp_path: Path) -> None:
    numbers = (0.125, 0.0625, 0.5, 0.25, 0.75)
    kinds = ("float32", "float16")
    found = Comparison("off", "second", "why so", ((2, 3), (2, 3)), kinds, *numbers, (1, 2), (1.5, -2.5))
    shown = Elements(written(DiffReport((), (Entry("l", "x", "a", "b", found),)), tmp_path)).text
    assert "≠ off x 0.125 0.0625 0.5 0.25 0.75 - [1, 2] 1.5 -2.5 2×3 float32 and float16 why so" in shown


def test_bounds_are_shown_of_each_side_that_is_judged(tmp_path: Path) -> None:
    report = reports.of_backends(2)
    rows = {(row.entry.first, row.entry.second): row for leaf in all_leaves(tree_of(report)) for row in leaf.rows}
    assert len(rows["reference", "torch"].used) == 1
    assert len(rows["torch", "mindspore"].used) == 2
    assert rows["torch", "mindspore"].bounds.count("×") == 2
    assert 0 < rows["reference", "torch"].times < 1 < rows["reference", "mindspore"].times


def test_the_histogram_marks_the_bound_and_what_is_beyond(tmp_path: Path) -> None:
    report = reports.of_backends(2)
    wrong = next(each for each in report.pictures if (each.tensor, each.second) == ("attn_weights", "mindspore"))
    bins = drawn(report)[key(wrong)].bins
    assert [each.bounds for each in bins if each.bounds] == [("bound of mindspore: 3.00e-07",)]
    assert [each.label for each in bins if each.state == "crossing"] == ["1e-07 to 1e-06"]
    assert {each.state for each in bins if each.label.startswith(("1e-06", "1e-01"))} == {"beyond"}
    assert sum(each.count for each in bins) == 2 * 2 * 40 * 40
    assert max(each.width for each in bins) == 100


def test_the_worst_element_stands_in_its_neighbourhood() -> None:
    report = reports.of_backends(2)
    for entry in report.entries:
        shown = drawn(report)[key(entry)]
        cells = [(row, column, cell) for row, cells in shown.near for column, cell in enumerate(cells) if cell.worst]
        (row, column, cell), index = cells[0], entry.comparison.index
        assert len(cells) == 1
        assert index is not None
        assert (row, shown.near_columns[column]) == index[-2:]
        assert float(cell.second) == pytest.approx(entry.comparison.values[1], rel=1e-4)


def test_heat_maps_are_the_values_that_were_given() -> None:
    from PIL import Image

    report = reports.of_backends(2, size=9, average=True)
    for each in report.pictures:
        for head, given in zip(drawn(report)[key(each)].heads, each.maps, strict=True):
            image = Image.open(io.BytesIO(base64.b64decode(head.images[1].partition(",")[2]))).convert("RGB")
            codes = drawn(report)[key(each)].attention.codes(given.second)
            assert np.array_equal(np.asarray(image), colours.SEQUENTIAL[codes])
            row, column = head.place
            apart = np.abs(given.first - given.second)
            assert apart[row, column] == apart.max()


def test_the_page_stays_small_and_the_worst_keep_their_maps() -> None:
    report = reports.of_backends(16)
    everything = drawn(report)
    size = sum(len(image) for image in everything[key(report.pictures[1])].heads[0].images) * 16
    some = drawn(report, room=2 * size)
    assert all(each.heads for name, each in everything.items() if name[1] == "attn_weights")
    kept = {name[3] for name, each in some.items() if each.heads}
    assert "mindspore" in kept
    assert len(kept) < 3
    left = [each for name, each in some.items() if name[1] == "attn_weights" and not each.heads]
    assert all(each.left_out == "16 heat maps: no room on this page" and each.bins for each in left)


def test_the_tree_holds_every_comparison_once_and_shows_what_differs() -> None:
    report = reports.of_recordings(100)
    members = tree_of(report)
    rows = [row.number for leaf in all_leaves(members) for row in leaf.rows]
    assert rows == list(range(600))
    (root,) = members
    assert isinstance(root, Group)
    assert (root.label, root.verdict, root.first, root.unfold) == ("encoder.layers.", "broken", True, True)
    assert [
        (each.label, each.count, each.unfold) if isinstance(each, Group) else each.tail for each in root.members
    ] == [("0.self_attn to 74.self_attn", 75, False), "75.self_attn",
          ("76.self_attn to 97.self_attn", 22, False), "98.self_attn", "99.self_attn"]  # fmt: skip
    first = root.members[1]
    assert isinstance(first, Leaf)
    assert first.first
    assert first.unfold


def test_a_layer_without_comparisons_and_one_that_only_entries_name_are_there(tmp_path: Path) -> None:
    entry = Entry("only.here", "x", "a", "b", compare(np.ones(1), np.ones(1)))
    layer = Layer("lonely", "", "Linear", "", ("the second side did not call it",))
    text = Elements(written(DiffReport((), (entry,), "recordings", layers=(layer,)), tmp_path)).text
    for words in ("not compared lonely", "The second side does not have it.", layer.notes[0], "only.here"):
        assert words in text


def test_a_picture_without_its_entry_is_not_shown() -> None:
    report = reports.of_backends(2)
    other = picture("nowhere", "output", "a", "b", np.ones(3), np.zeros(3))
    assert drawn(dataclasses.replace(report, pictures=(other,))) == {}


def test_a_new_page_replaces_an_old_one_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(CheckpointError, match="does not exist"):
        page.write(DiffReport((), ()), tmp_path / "missing" / "report.html")
    with monkeypatch.context() as patched:
        patched.setattr(rendering, "render", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            page.write(DiffReport((), ()), target)
    assert target.read_text() == "old"
    page.write(DiffReport((), ()), target)
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("module", "writer"), [("jinja2", page), ("PIL.Image", page), ("matplotlib.figure", figure)])
def test_what_is_not_installed_is_named(
    module: str, writer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering._environment.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=r"mhabridge\[report\]"):
        writer.write(DiffReport((), ()), tmp_path / "out")  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()


def pixels(report: DiffReport, folder: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    figure.write(report, folder / "figure.png")
    with image.open(folder / "figure.png") as opened:
        return np.asarray(opened.convert("RGB"))


def has(image: np.ndarray, colour: object) -> bool:
    return bool((image == np.asarray(colour)).all(-1).any())


def test_the_figure_has_the_heads_that_differ_and_the_verdict(tmp_path: Path) -> None:
    image = pixels(reports.of_backends(16), tmp_path)
    assert image.shape == (990, 1650, 3)
    assert has(image[:200], (0xA1, 0x4A, 0x00))  # the verdict, in the colour of "off"
    assert has(image[200:], colours.DIVERGING[0])
    assert sum(has(image[200:], colour) for colour in colours.SEQUENTIAL[::8]) > 10
    clean = pixels(reports.of_backends(1, faulty=False), tmp_path)
    assert not has(clean, (0xA1, 0x4A, 0x00))
    assert has(clean[:200], (0x33, 0x65, 0x8A))


def of_two_tensors(output: float, weights: float, verdicts: tuple[str, str] = ("off", "equal")) -> DiffReport:
    """An output and four heads that differ by so much, of a layer with a long path."""
    names = ("encoder.layers.11.attention.self.<b>multi</b>", "first", "second")
    entries, pictures = [], []
    for tensor, shape, apart, verdict in zip(
        ("output", "attn_weights"), ((2, 9, 32), (2, 4, 9, 9)), (output, weights), verdicts, strict=True
    ):
        exact = np.random.default_rng(0).random(shape)
        found = exact.copy()
        found[1, ..., 3, 5] += apart
        sides = tuple(Distance("rounding", bound=bound) for bound in (2.9e-7, 3.1e-7))
        found_entry = compare(exact, found, distances=sides)
        entries.append(
            Entry(names[0], tensor, *names[1:], dataclasses.replace(found_entry, verdict=verdict, distances=sides))
        )
        pictures.append(picture(names[0], tensor, *names[1:], exact, found))
    return DiffReport((), tuple(entries), pictures=tuple(pictures))


@pytest.mark.parametrize(
    ("output", "weights", "verdicts", "telling"),
    [
        (0.5, 0.0, ("off", "equal"), "output"),
        (0.5, 1e-8, ("off", "rounding"), "output"),
        (0.5, 0.0, ("rounding", "equal"), "output"),  # two recordings with other weights: each right by its own
        (0.5, 1e-8, ("rounding", "rounding"), "output"),
        (0.5, 0.1, ("off", "off"), "attn_weights"),
        (0.5, 0.1, ("rounding", "rounding"), "attn_weights"),
        (1e-8, 1e-8, ("rounding", "rounding"), "attn_weights"),
        (1e-8, 0.0, ("rounding", "equal"), "output"),
    ],
)
def test_heads_that_are_equal_tell_nothing(
    output: float, weights: float, verdicts: tuple[str, str], telling: str, tmp_path: Path
) -> None:
    report = of_two_tensors(output, weights, verdicts)
    found = most_telling(report)
    assert found is not None
    assert (found[0].tensor, found[1].tensor) == (telling, telling)
    apart = pixels(report, tmp_path)[250:, 660:980]  # the matrices of the difference
    assert has(apart, colours.DIVERGING[0]) or has(apart, colours.DIVERGING[-1])


def test_nothing_in_the_figure_runs_out_of_it_or_into_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    figures = pytest.importorskip("matplotlib.figure")
    plain = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (kept.append(self), plain(self, *a, **k))[1])
    for verdicts in (("off", "equal"), ("off", "off")):
        figure.write(of_two_tensors(0.5, 0.1, verdicts), tmp_path / "figure.png")
    texts = []
    for one in kept:
        drawn_texts = [each for each in one.findobj(figures.mpl.text.Text) if each.get_text()]
        drawn_texts = [each for each in drawn_texts if "mathdefault" not in each.get_text()]  # ticks beyond the axis
        boxes = [each.get_window_extent() for each in drawn_texts]
        for box in boxes:
            assert box.x0 >= 0
            assert box.x1 <= one.bbox.width
        titles = [box for each, box in zip(drawn_texts, boxes, strict=True) if "b" in each.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
        texts += [each.get_text() for each in drawn_texts]
    assert "bound of first: 2.90e-07\nbound of second: 3.10e-07" in texts
    assert any("3 of 4 heads, those that differ most" in each for each in texts)
    assert sum(each.endswith("output\nelements by difference") for each in texts) == 1


def test_a_bound_below_the_smallest_difference_lies_between_that_and_what_is_equal() -> None:
    edges = (0.0, 1e-4, 1e-3, 1e-2)
    assert [figure._between(bound, edges) for bound in (3e-7, 1e-4, 1.0)] == [0.5, 0.5, 2.5]
    apart = figure._lines([(2e-4, "a"), (9e-3, "b")], edges)
    assert [words for _, words in apart] == ["bound of a: 2.00e-04", "bound of b: 0.009"]


@pytest.mark.parametrize("kind", ["hostile", "nan", "masked", "average", "dots", "formula", "empty", "infinite"])
def test_a_figure_of_anything(kind: str, tmp_path: Path) -> None:
    infinite = Comparison("off", "both", max_abs=math.inf)
    names = ("", r"$\frac{$_^", r"$\nonsense{", "b")
    formula = Entry(*names, compare(np.ones(3), np.zeros(3)))
    report = {
        "hostile": reports.of_hostile,
        "nan": lambda: reports.of_backends(2, faulty=False, strange="nan"),
        "masked": lambda: reports.of_backends(2, strange="masked"),
        "average": lambda: reports.of_backends(2, average=True),
        "dots": lambda: dataclasses.replace(reports.of_recordings(4), pictures=()),
        "formula": lambda: DiffReport((), (formula,), pictures=(picture(*names, np.ones(3), np.zeros(3)),)),
        "empty": lambda: DiffReport((), ()),
        "infinite": lambda: DiffReport((), (Entry("", "x", "a", "b", infinite),)),
    }[kind]()  # fmt: skip
    assert pixels(report, tmp_path).std() > 1
