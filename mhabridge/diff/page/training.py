"""Two trainings beside each other, step by step, as a line chart with a logarithmic axis."""

from __future__ import annotations

import dataclasses
import math

from mhabridge.diff.page import text
from mhabridge.diff.report import DiffReport, Step

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 34


@dataclasses.dataclass(frozen=True)
class Chart:
    """One pair's trainings.

    Args:
        title: the two sides.
        words: what came out.
        steps: in order.
        apart: the line of the difference between the sides, as points of an SVG polyline.
        grown: the line of what one rounding error grew to.
        marks: the points of steps that rounding does not explain.
        across: labels of the steps with their x.
        up: labels of the powers of ten with their y.
        parts: the x of the first step that rounding does not explain.
    """

    title: str
    words: str
    steps: tuple[Step, ...]
    apart: str
    grown: str
    marks: tuple[tuple[float, float], ...]
    across: tuple[tuple[str, float], ...]
    up: tuple[tuple[str, float], ...]
    parts: float | None


def charts(report: DiffReport) -> tuple[Chart, ...]:
    """A chart for each layer and two sides, in the order in which they come up."""
    trainings: dict[tuple[str, str, str], list[Step]] = {}
    for step in report.steps:
        trainings.setdefault((step.layer, step.first, step.second), []).append(step)
    return tuple(_chart(names, steps) for names, steps in trainings.items())


def _chart(names: tuple[str, str, str], steps: list[Step]) -> Chart:
    low, high = _decades([value for step in steps for value in (step.apart, step.grown)])
    last = max(step.step for step in steps) or 1

    def x(step: int) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * step / last, 1)

    def y(value: float) -> float:
        power = high if math.isinf(value) or math.isnan(value) else math.log10(value) if value > 0 else low
        part = (min(max(power, low), high) - low) / (high - low)
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * part, 1)

    parted = [step for step in steps if not step.explained]
    return Chart(
        (f"{text.visible(names[0])}: " if names[0] else "") + f"{text.visible(names[1])} and {text.visible(names[2])}",
        _words(steps, parted),
        tuple(steps),
        " ".join(f"{x(step.step)},{y(step.apart)}" for step in steps),
        " ".join(f"{x(step.step)},{y(step.grown)}" for step in steps),
        tuple((x(step.step), y(step.apart)) for step in parted),
        tuple((str(step), x(step)) for step in _ticks(last)),
        tuple((f"1e{power:+03d}", y(10.0**power)) for power in _powers(low, high)),
        x(parted[0].step) if parted else None,
    )


def _words(steps: list[Step], parted: list[Step]) -> str:
    if not parted:
        return f"Rounding explains all {text.counted(len(steps), 'step')}."
    first = parted[0]
    return (
        f"They part at step {first.step}: {text.visible(first.tensor)} is {text.number(first.apart)} apart, "
        f"{text.number(first.times)} times what one rounding error grew to."
    )


def _decades(values: list[float]) -> tuple[int, int]:
    """The powers of ten around all positive numbers; a zero lies on the lower edge."""
    known = [math.log10(value) for value in values if 0 < value < math.inf]
    if not known:
        return -8, 0
    low, high = math.floor(min(known)), math.ceil(max(known))
    return (low - 1 if min(values) <= 0 else low), max(high, low + 1)


def _powers(low: int, high: int) -> range:
    return range(low, high + 1, max(1, (high - low) // 6))


def _ticks(last: int) -> list[int]:
    step = max(1, last // 8)
    return list(range(0, last + 1, step))
