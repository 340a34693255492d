"""Names and numbers as the page shows them.

Names come from files that may be hostile: what cannot be seen (control characters, text direction, lone surrogates) is
written out, so that two names that look alike are alike, and very long ones are cut.
"""

from __future__ import annotations

import math
import unicodedata

_LONGEST = 400  # characters
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")


def visible(text: object, longest: int = _LONGEST) -> str:
    r"""A text with nothing hidden in it, and without its middle when it is very long.

    Example:
        >>> visible("a\u202eb\x00"), visible("layer.0 ü"), len(visible("x" * 9999))
        ('a\\u202eb\\x00', 'layer.0 ü', 405)
    """
    whole = str(text)
    if len(whole) > longest:
        whole = f"{whole[: longest // 2]} ... {whole[-(longest // 2) :]}"
    if whole.isascii() and whole.isprintable():
        return whole
    return "".join(_written_out(each) for each in whole)


def _written_out(character: str) -> str:
    if character != "\n" and unicodedata.category(character) in _UNSEEN:
        return character.encode("unicode_escape").decode("ascii")
    return character


def number(value: float | None) -> str:
    """A measured number in at most 9 characters; a dash where there is none.

    Example:
        >>> [number(x) for x in (1.23456e-7, 0.1234567, 0.0, 1.0, 123456.0, float("nan"), float("-inf"), None)]
        ['1.23e-07', '0.123', '0', '1', '1.23e+05', '-', '-inf', '-']
    """
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}".removeprefix("-") if value == 0 else f"{value:g}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def exact(value: float) -> str:
    """A tensor's value, with the digits that float32 has.

    Example:
        >>> exact(0.1), exact(float("nan")), exact(-0.0)
        ('0.1', 'nan', '-0')
    """
    return f"{value:.8g}"


def signed(value: float) -> str:
    """A difference, with its sign.

    Example:
        >>> signed(1.5e-8), signed(-2.0), signed(0.0), signed(float("nan"))
        ('+1.50e-08', '-2', '0', 'nan')
    """
    if math.isnan(value):
        return "nan"
    return f"+{number(value)}" if value > 0 else number(value)


def cosine(value: float) -> str:
    """A cosine; near 1 as its distance to 1, which six digits would hide.

    Example:
        >>> cosine(1.0), cosine(1 - 3e-9), cosine(0.25), cosine(float("nan"))
        ('1', '1-3e-09', '0.25', '-')
    """
    if math.isnan(value):
        return "-"
    return f"1-{1 - value:.0e}" if 0.9999 < value < 1 else f"{value:.4g}"


def size(shape: tuple[int, ...] | None) -> str:
    """A shape.

    Example:
        >>> size((2, 3)), size(()), size(None)
        ('2×3', 'scalar', 'missing')
    """
    return "missing" if shape is None else "×".join(map(str, shape)) or "scalar"


def place(index: tuple[int, ...] | None) -> str:
    """An index.

    Example:
        >>> place((1, 0, 5)), place(None)
        ('[1, 0, 5]', '')
    """
    return "" if index is None else f"[{', '.join(map(str, index))}]"


def counted(count: int, one: str, many: str = "") -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "layer"), counted(2, "layer"), counted(1200, "match", "matches")
        ('1 layer', '2 layers', '1,200 matches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
