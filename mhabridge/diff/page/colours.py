"""Colour scales that people with any colour vision can read, and heat maps as small PNG images.

Attention goes from dark blue over green to yellow, and gets lighter all the way (viridis, by Nathaniel Smith and
Stéfan van der Walt, CC0). Differences go from blue over near white to orange. Each scale has 255 colours; what is NaN
or infinite is transparent, and the page shows a hatched ground there.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math

import numpy as np

_SEQUENTIAL = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_DIVERGING = ("08306b", "1f64ad", "6ba3d6", "c6dcee", "f7f7f5", "fbd3ae", "f19b52", "c8590a", "6e2a04")
LEVELS = 255
_NOTHING = 255  # the code of what has no colour


def palette(anchors: tuple[str, ...]) -> np.ndarray:
    """LEVELS colours between the anchors, uint8 (LEVELS, 3).

    Example:
        >>> palette(("000000", "ffffff"))[[0, 127, 254]].tolist()
        [[0, 0, 0], [128, 128, 128], [255, 255, 255]]
    """
    known = np.array([[int(each[i : i + 2], 16) for i in (0, 2, 4)] for each in anchors], float)
    at = np.linspace(0, len(known) - 1, LEVELS)
    mixed = [np.interp(at, np.arange(len(known)), channel) for channel in known.T]
    colours: np.ndarray = np.rint(np.stack(mixed, 1)).astype(np.uint8)
    return colours


SEQUENTIAL = palette(_SEQUENTIAL)
DIVERGING = palette(_DIVERGING)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How numbers become colours.

    Args:
        low: the number with the first colour.
        high: that with the last one.
        root: whether square roots are spread evenly: most attention weights are far below the largest one.
        diverging: whether the middle stands for 0.
    """

    low: float
    high: float
    root: bool = False
    diverging: bool = False

    def codes(self, values: np.ndarray) -> np.ndarray:
        """The place of each number among the colours, uint8; 255 for what is not finite.

        Example:
            >>> Scale(0.0, 1.0, root=True).codes(np.array([0.0, 0.25, 1.0, np.nan])).tolist()
            [0, 127, 254, 255]
        """
        span = self.high - self.low
        with np.errstate(invalid="ignore", over="ignore"):
            part = (values - self.low) / span if 0 < span < math.inf else np.full(values.shape, 0.5)
            part = np.sqrt(np.clip(part, 0, 1)) if self.root else np.clip(part, 0, 1)
        fine = np.isfinite(values) & np.isfinite(part)
        return np.where(fine, np.rint(np.where(fine, part, 0) * (LEVELS - 1)), _NOTHING).astype(np.uint8)

    @property
    def ticks(self) -> tuple[float, float, float]:
        """The numbers at the start, in the middle and at the end."""
        middle = self.low + (self.high - self.low) * (0.25 if self.root else 0.5)
        return self.low, middle, self.high


def attention_scale(matrices: list[np.ndarray]) -> Scale:
    """One scale for all matrices: from 0, or from what is less, to the largest."""
    values = np.concatenate([each[np.isfinite(each)].ravel() for each in matrices] or [np.zeros(0)])
    if not values.size:
        return Scale(0.0, 1.0, root=True)
    low, high = min(0.0, float(values.min())), float(values.max())
    low = low if -low * LEVELS > high else 0.0  # rounding below 0 is less than a colour's step
    return Scale(low, high if high > low else low + 1.0, root=low >= 0)


def difference_scale(differences: list[np.ndarray]) -> Scale:
    """One scale for all differences, as far below 0 as above."""
    largest = max((float(np.abs(each[np.isfinite(each)]).max(initial=0.0)) for each in differences), default=0.0)
    return Scale(-largest, largest, diverging=True)


def png(values: np.ndarray, scale: Scale) -> str:
    """A matrix as a ``data:`` address of a PNG image with one pixel for each cell."""
    from PIL import Image

    codes = scale.codes(values)
    colours = DIVERGING if scale.diverging else SEQUENTIAL
    image = Image.frombytes("P", (codes.shape[1], codes.shape[0]), codes.tobytes())
    image.putpalette(colours.tobytes() + bytes(3))
    whole = io.BytesIO()
    image.save(whole, "PNG", optimize=True, transparency=_NOTHING)
    return "data:image/png;base64," + base64.b64encode(whole.getvalue()).decode("ascii")
