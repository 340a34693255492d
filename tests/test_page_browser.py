"""The report page in a real browser: what is shown, clicked through, by the keyboard alone, without scripts, on paper.

Needs Playwright and an installed Chromium (Debian: ``apt-get install chromium``). With MHABRIDGE_TEST_BROWSER=required
a missing one is a failure, not a skip.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

from mhabridge.diff.page import colours, rendering
from mhabridge.diff.page.drawing import drawn, key
from mhabridge.diff.report import DiffReport, Run
from tests import reports

pytestmark = pytest.mark.frameworks  # once, beside the frameworks: a browser knows no NumPy

Open = Callable[..., Any]
READBACK = "willReadFrequently"  # Chromium's advice about this test's own looks at the pixels
KINDS: dict[str, Callable[[], DiffReport]] = {
    "off": reports.of_backends,
    "one head": lambda: reports.of_backends(1, faulty=False),
    "nan": lambda: reports.of_backends(2, faulty=False, strange="nan"),
    "masked": lambda: reports.of_backends(4, strange="masked"),
    "average": lambda: reports.of_backends(4, average=True),
    "600": reports.of_recordings,
    "600 fine": lambda: reports.of_recordings(faulty=False),
    "training": reports.of_training,
    "hostile": reports.of_hostile,
    "empty": lambda: DiffReport((), ()),
    "failed": lambda: DiffReport((Run("megengine", "megengine", "", "worker", "failed", "died: SIGSEGV"),), ()),
}


@functools.cache
def made(kind: str) -> DiffReport:
    return KINDS[kind]()


@functools.cache
def rendered(kind: str) -> str:
    return rendering.render(made(kind))


# Elements that a screen reader has no name for.
UNNAMED = """() => [...document.querySelectorAll('button, input, select, a, img, [role], summary')]
    .filter(each => !(each.textContent.trim() || each.labels?.length || each.alt || each.ariaLabel
        || each.getAttribute('aria-labelledby')))
    .map(each => each.outerHTML.slice(0, 200))"""
# Texts whose contrast to their ground is below 4.5, by the formula of WCAG 2.2.
PALE = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const over = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const each of colours) { context.fillStyle = each; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = new Set();
  for (const each of document.querySelectorAll('body *')) {
    const said = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!said || !each.checkVisibility()) continue;
    const grounds = [];
    for (let at = each; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const ground = over(['white', ...grounds]), ink = over([`rgb(${ground})`, getComputedStyle(each).color]);
    const [a, b] = [light(ground), light(ink)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.add(`${ratio.toFixed(2)} ${each.className} ${each.textContent.trim().slice(0, 40)}`);
  }
  return [...found];
}"""
OUTLINE = "(({ outlineStyle, outlineWidth }) => outlineStyle + outlineWidth)(getComputedStyle(document.activeElement))"
PAPER = """() => addEventListener('beforeprint', () => {
  const open = document.querySelectorAll('details.layer[open], details.picture[open]');
  window.paper = [...open].map((each) => each.id || each.dataset.row);
})"""


def missing(why: str) -> None:
    if os.environ.get("MHABRIDGE_TEST_BROWSER") == "required":
        pytest.fail(f"a browser is required: {why}")
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        missing("no Chromium is installed (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed (pip install playwright)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program)
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report of a kind; at the end nothing was complained about, asked for or popped up."""
    contexts, wrong = [], []

    def opened(kind: str, width: int = 1280, fragment: str = "", **options: Any) -> Any:
        target = tmp_path / "report.html"
        target.write_text(rendered(kind), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: READBACK in message.text or wrong.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        address = target.as_uri()
        own = (address, "data:", "blob:")
        tab.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
        tab.goto(address + fragment)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def shown_layers(tab: Any) -> list[str]:
    """The names of the layers that can be seen, from top to bottom."""
    found: list[str] = tab.locator("details.layer").evaluate_all(
        "all => all.filter(each => each.checkVisibility({contentVisibilityAuto: true})).map(each => each.dataset.name)"
    )
    return found


def pixel(tab: Any, canvas: int, row: int, column: int, shape: tuple[int, ...]) -> list[int]:
    """The colour in the middle of a cell's lower right part, where neither a sign nor a frame is drawn."""
    script = """([n, y, x]) => { const c = document.querySelectorAll('details[open] .boards canvas')[n];
        return [...c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data].slice(0, 3) }"""
    found: list[int] = tab.evaluate(script, [canvas, (row + 0.85) / shape[0], (column + 0.85) / shape[1]])
    return found


def test_the_watch_over_a_page_sees_what_it_should(show: Open, tmp_path: Path) -> None:
    """A page with a foreign script, image and request: all are refused, and each refusal is seen."""
    tab = show("empty")
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    target = tmp_path / "bad.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    bad = "<script>document.title = 'taken'</script><img src='https://example.invalid/a.png'><p style='color: red'>"
    target.write_text(text.replace("<main>", f"<main>{bad}"), encoding="utf-8")
    context = tab.context.browser.new_context()
    other = context.new_page()
    other.on("console", lambda message: problems.append(message.text))
    other.goto(target.as_uri())
    assert "taken" not in other.title()
    context.close()
    assert len([each for each in problems if "Content Security Policy" in each]) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_report_opens_without_a_complaint_and_fits(kind: str, width: int, scheme: str, show: Open) -> None:
    tab = show(kind, width, color_scheme=scheme)
    assert tab.locator("h1").inner_text().lower().endswith(made(kind).verdict)
    tab.evaluate("document.querySelectorAll('details').forEach((each, i) => { if (i < 40) each.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(UNNAMED) == []
    names = tab.locator("[id]").evaluate_all("all => all.map(each => each.id)")
    assert len(set(names)) == len(names)


def test_at_the_width_of_a_laptop_no_column_of_numbers_is_cut_off(show: Open) -> None:
    """Numbers as long as they get, with a sign, in float32; the last column says shape and dtype."""
    tab = show("600", 1200)
    tab.evaluate("document.querySelectorAll('details').forEach((each, i) => { if (i < 40) each.open = true })")
    cut = "all => all.map(e => e.closest('.scroll')).filter(e => e.clientWidth && e.scrollWidth > e.clientWidth).length"
    assert tab.locator("table.numbers").evaluate_all("all => all.filter(e => e.clientWidth).length")
    assert tab.locator("table.numbers").evaluate_all(cut) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_ground(scheme: str, show: Open) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3) for every text that is seen, as the browser computes its colours."""
    tab = show("600", color_scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((each, i) => { if (i < 12) each.open = true })")
    assert tab.evaluate(PALE) == []


def test_comparisons_are_filtered_by_words_and_by_verdict(show: Open) -> None:
    tab = show("600")
    status = tab.locator("#shown")
    assert status.inner_text() == "600 comparisons in 100 layers"
    seen = shown_layers(tab)
    assert seen == [f"encoder.layers.{number}.self_attn" for number in (75, 98, 99)]  # the rest is put away
    tab.fill("#find", "layers.7.")
    assert status.inner_text() == "6 of 600 comparisons in 1 of 100 layers"
    assert shown_layers(tab) == ["encoder.layers.7.self_attn"]
    tab.fill("#find", "ATTN_WEIGHTS")
    assert status.inner_text() == "100 of 600 comparisons in 100 of 100 layers"
    tab.fill("#find", "more than rounding explains")
    assert status.inner_text() == "2 of 600 comparisons in 1 of 100 layers"
    tab.fill("#find", "no such thing")
    assert shown_layers(tab) == []
    tab.get_by_role("button", name="Show all").click()
    assert status.inner_text() == "600 comparisons in 100 layers"
    for verdict in ("equal", "rounding", "off"):
        tab.get_by_role("checkbox", name=verdict).uncheck()
    assert status.inner_text() == "1 of 600 comparisons in 1 of 100 layers"
    assert shown_layers(tab) == ["encoder.layers.98.self_attn"]
    assert tab.locator("#layer-98 tr.entry:visible").count() == 0
    tab.locator("#layer-98 > summary").click()
    assert "value" in tab.locator("#layer-98 tr.entry:visible").inner_text()
    assert "NaN" in tab.locator("#layer-98 tr.why:visible").inner_text()


def test_two_sides_beside_each_other_are_filtered_but_not_counted_again(show: Open) -> None:
    tab = show("off")
    assert tab.locator("#shown").inner_text() == "6 comparisons in 1 layer"
    tab.get_by_role("checkbox", name="rounding").uncheck()
    assert tab.locator("#shown").inner_text() == "2 of 6 comparisons in 1 of 1 layer"
    assert tab.locator("tr.entry:visible").count() == 2 + 4
    assert tab.locator("details.picture:visible").count() == 2


def test_layers_and_rows_are_sorted_and_come_back(show: Open) -> None:
    tab = show("600")
    tree = tab.locator("#tree").inner_text()
    tab.select_option("#sort", "verdict")
    assert shown_layers(tab)[:2] == ["encoder.layers.98.self_attn", "encoder.layers.75.self_attn"]
    assert len(shown_layers(tab)) == 100
    tab.select_option("#sort", "largest")
    assert shown_layers(tab)[0] == "encoder.layers.75.self_attn"
    rows = tab.locator("#layer-75 tr.entry").evaluate_all("all => all.map(each => Number(each.dataset.largest))")
    assert rows == sorted(rows, reverse=True)
    why = tab.locator("#layer-75 tr.why").evaluate_all("all => all.map(e => e.previousElementSibling.dataset.name)")
    assert why == ["output", "attn_weights"]  # a reason goes where its row goes
    tab.select_option("#sort", "name")
    assert shown_layers(tab)[8:12] == [f"encoder.layers.{number}.self_attn" for number in (8, 9, 10, 11)]
    assert tab.locator("#layer-8 > summary").inner_text().count("encoder.layers.8.self_attn") == 1
    tab.select_option("#sort", "order")
    assert tab.locator("#tree").inner_text() == tree


def test_the_first_divergence_and_all_others_are_one_step_away(show: Open) -> None:
    from playwright.sync_api import expect

    tab = show("600")
    tab.get_by_role("button", name="Close all").click()
    assert shown_layers(tab) == []
    link = tab.locator("header a.names")
    for _ in range(2):  # the second time the address does not change
        link.click()
        expect(tab.locator("#layer-75 > summary")).to_be_focused()
        assert tab.evaluate("document.querySelector('#layer-75').open")
        assert "first divergence" in tab.locator("#layer-75 > summary").inner_text()
        tab.get_by_role("button", name="Close all").click()
    visited = []
    for _ in range(3):
        tab.get_by_role("button", name="Next difference").click()
        visited.append(tab.evaluate("document.activeElement.parentElement.id"))
    assert visited == ["layer-75", "layer-98", "layer-75"]
    tab.get_by_role("button", name="Close all").click()
    tab.get_by_role("button", name="Open what differs").click()
    assert tab.locator("details.layer[open]").evaluate_all("all => all.map(e => e.id)") == ["layer-75", "layer-98"]


def test_an_address_with_a_layer_opens_it(show: Open) -> None:
    from playwright.sync_api import expect

    tab = show("600", fragment="#layer-12")
    expect(tab.locator("#layer-12 > summary")).to_be_focused()
    assert "encoder.layers.12.self_attn" in shown_layers(tab)


def test_the_enlarged_maps_show_the_values_cell_by_cell(show: Open) -> None:
    report = made("off")
    given = next(each for each in report.pictures if (each.tensor, each.second) == ("attn_weights", "mindspore"))
    shown = drawn(report)[key(given)]
    tab = show("off")
    tab.wait_for_selector(".boards canvas")
    leading = next(number for number, head in enumerate(shown.heads) if head.leads)
    assert tab.locator(".enlarged h5").inner_text() == f"head {leading}: differs by 0.762"
    for number in (leading, 5, 0):
        tab.get_by_role("button", name=f"head {number}", exact=True).locator("visible=true").click()
        head = given.maps[number]
        planes = (
            colours.SEQUENTIAL[shown.attention.codes(head.first)],
            colours.SEQUENTIAL[shown.attention.codes(head.second)],
            colours.DIVERGING[shown.difference.codes(head.second - head.first)],
        )
        worst = shown.heads[number].place
        for row, column in [(0, 0), (3, 30), (21, 20), (39, 39), (17, 5)]:
            if max(abs(row - worst[0]), abs(column - worst[1])) > 1:  # there is the frame
                for canvas, plane in enumerate(planes):
                    assert pixel(tab, canvas, row, column, head.first.shape) == plane[row, column].tolist()


def test_the_cell_is_moved_by_keys_and_mouse_and_read_out(show: Open) -> None:
    report = made("off")
    given = next(each for each in report.pictures if (each.tensor, each.second) == ("attn_weights", "mindspore"))
    head = next(each for each, shown in zip(given.maps, drawn(report)[key(given)].heads, strict=True) if shown.leads)
    tab = show("off")
    tab.wait_for_selector(".boards canvas")
    readout = tab.locator("output.readout")
    start = readout.inner_text()
    assert start.startswith("query 21, key 22: reference about")
    assert start.endswith("(the cell that differs most)")
    tab.locator(".boards").focus()
    for press in ("ArrowUp", "ArrowUp", "ArrowLeft", "ArrowDown"):
        tab.keyboard.press(press)
    said = re.fullmatch(
        r"query 20, key 21: reference about (\S+), mindspore about (\S+), difference about (\S+)", readout.inner_text()
    )
    assert said is not None
    values = [float(each) for each in said.groups()]
    exact = [head.first[20, 21], head.second[20, 21], head.second[20, 21] - head.first[20, 21]]
    assert values == pytest.approx(exact, abs=0.01)
    tab.keyboard.press("Home")
    assert readout.inner_text() == start
    box = tab.locator(".boards canvas").nth(1).bounding_box()
    tab.mouse.move(box["x"] + 0.5, box["y"] + 0.5)
    assert readout.inner_text().startswith("query 0, key 0:")


def test_nan_is_a_cross_in_the_maps_and_a_word_in_the_readout(show: Open) -> None:
    tab = show("nan")
    tab.wait_for_selector(".boards canvas")
    assert "megengine NaN or infinite, difference NaN or infinite" in tab.locator("output.readout").inner_text()
    ink = """n => { const c = document.querySelectorAll('.boards canvas')[n], s = c.width / 40;
        const data = c.getContext('2d').getImageData(2 * s, 7 * s, s, s).data, seen = new Set();
        for (let i = 0; i < data.length; i += 4) seen.add(data[i] > 200 ? 'white' : data[i] < 60 ? 'black' : 'other');
        return [...seen].sort().join(' ') }"""
    assert "black" in tab.evaluate(ink, 1)
    assert "white" in tab.evaluate(ink, 1)
    assert "white" not in tab.evaluate(ink, 0)


def test_maps_are_drawn_only_when_they_are_opened(show: Open) -> None:
    tab = show("600")
    tab.wait_for_selector("canvas")
    assert tab.locator("canvas").count() == 3
    tab.fill("#find", "layers.3.")
    tab.locator("#layer-3 > summary").click()
    tab.locator("#layer-3 details.picture > summary").click()
    tab.wait_for_selector("#layer-3 canvas")
    assert tab.locator("canvas").count() == 6


def test_everything_is_reached_by_the_keyboard_alone(show: Open) -> None:
    tab = show("600")
    where = "(e => e.id || e.name || e.parentElement.id || e.className || e.tagName)(document.activeElement)"
    tab.keyboard.press("Tab")
    assert tab.evaluate(where) == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") > 0
    tab.keyboard.press("Enter")
    tab.keyboard.press("Tab")
    stops = [tab.evaluate(where)]
    while stops[-1] != "fold":
        assert tab.evaluate(OUTLINE) == "solid3px", stops
        tab.keyboard.press("Tab")
        stops.append(tab.evaluate(where))
    assert stops == ["find", "verdict", "verdict", "verdict", "verdict", "sort", "next", "unfold", "fold"]
    for _ in range(2):
        tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")  # to the next difference
    assert tab.evaluate(where) == "layer-75"
    tab.keyboard.press("Enter")  # closes what stood open
    assert not tab.evaluate("document.querySelector('#layer-75').open")
    tab.keyboard.press("Space")
    assert tab.evaluate("document.querySelector('#layer-75').open")
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.getAttribute('role')") == "application":
            break
    readout = tab.locator("#layer-75 output.readout")
    before = readout.inner_text()
    tab.keyboard.press("ArrowDown")
    assert readout.inner_text() != before
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.locator("#layer-75 .enlarged h5").inner_text().startswith("head 1:")
    assert tab.locator("#layer-75 button[aria-pressed=true]").inner_text() == "head 1"


def test_without_scripts_nothing_but_comfort_is_missing(show: Open) -> None:
    tab = show("off", java_script_enabled=False)
    for words in ("2 of 6 comparisons", "heads: swap 0 and 15", "Each side beside the float64 reference", "2.54e+06×",
                  "Without JavaScript"):  # fmt: skip
        assert tab.get_by_text(words).first.is_visible(), words
    assert tab.locator("tr.entry:visible").count() == 12
    picture = tab.locator("details.picture[open]")
    assert picture.locator(".trio img").count() == 48
    box = picture.locator(".trio img").first.bounding_box()
    assert box["width"] > 60
    for hidden in ("#tools", "#download", ".enlarged"):
        assert not tab.locator(hidden).first.is_visible()
    tab.locator("details.picture:not([open]) > summary").first.click()
    assert tab.locator(".histogram:visible").count() == 2


def test_on_paper_what_differs_stands_open(show: Open, tmp_path: Path) -> None:
    tab = show("600")
    tab.get_by_role("button", name="Close all").click()
    tab.evaluate(PAPER)
    paper = tab.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 12
    assert tab.evaluate("window.paper") == ["layer-75", "row-454", "row-455", "layer-98", "row-590"]
    assert tab.locator("details.layer[open]").count() == 0  # afterwards all is as it was
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("#tools").is_visible()
    assert not tab.locator("nav").is_visible()


def test_on_paper_without_scripts_what_differs_stands_open(show: Open) -> None:
    tab = show("600", java_script_enabled=False)
    tab.emulate_media(media="print")
    assert tab.locator("#layer-98 tr.entry").first.is_visible()
    assert not tab.locator("#layer-3 tr.entry").first.is_visible()


def test_the_numbers_can_be_saved(show: Open) -> None:
    tab = show("off", accept_downloads=True)
    with tab.expect_download() as waiting:
        tab.get_by_role("button", name="Save the numbers as JSON").click()
    assert waiting.value.suggested_filename == "mhabridge-diff.json"
    assert json.loads(Path(waiting.value.path()).read_text()) == json.loads(made("off").to_json())


def test_the_training_is_drawn_where_it_parts(show: Open) -> None:
    tab = show("training")
    points = tab.locator(".training polyline.apart").first.get_attribute("points").split()
    assert len(points) == 30
    marks = tab.locator(".training > svg path.parted").count()
    assert marks == 13
    heights = np.array([float(point.split(",")[1]) for point in points])
    assert (np.diff(heights) < 0).all()  # larger is further up
    tab.get_by_text("The numbers of 30 steps").click()
    assert tab.locator(".training tbody tr.off:visible").count() == 13
    assert "no" in tab.locator(".training tbody tr").nth(17).inner_text()
