"""Figures as people read them: digits that mean something, units, and text fit for one line."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime

from edgellm.profiling.document import Figure

DIGITS = 3
"""Significant digits of a figure; its interval has as many places behind the point."""

SECONDS = (("s", 1.0, 2.0), ("ms", 1e3, 0.001), ("µs", 1e6, 0.0))
"""Unit, how many make a second, and from which duration on a column of them is shown in it."""

BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))

HIDDEN = ("Cc", "Cf", "Zl", "Zp")
"""Unicode's classes of characters that move or hide others: control, format, line, paragraph."""

PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
AMOUNT = re.compile(r" \([^()]*\)$")
"""What a reason ends with in brackets, and is of one cell alone."""


def plain(text: str) -> str:
    """``text`` in one line, without characters that nobody sees."""
    seen = "".join(" " if unicodedata.category(letter) in HIDDEN else letter for letter in text)
    return " ".join(seen.split())


def places(value: float) -> int:
    """Places behind the point that show ``DIGITS`` digits of ``value``."""
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))


def number(value: float, digits: int | None = None) -> str:
    """``1,234`` or ``0.0123``, with ``digits`` places behind the point (None: what matters)."""
    return f"{value:,.{places(value) if digits is None else digits}f}"


def interval(figure: Figure, scale: float = 1.0) -> tuple[str, str]:
    """The median, and ``low to high`` to the same place, each multiplied by ``scale``.

    A single sample has no interval, and is said to be one.
    """
    digits = places(figure.median * scale)
    if len(figure.samples) == 1:
        return number(figure.median * scale, digits), "one sample"
    low, high = (number(each * scale, digits) for each in (figure.low, figure.high))
    return number(figure.median * scale, digits), f"{low} to {high}"


def seconds_unit(values: Iterable[float]) -> tuple[str, float]:
    """The unit that suits all of ``values`` (seconds), and how many of it make a second."""
    most = max(values, default=0.0)
    return next((unit, scale) for unit, scale, least in SECONDS if most >= least)


def seconds(value: float) -> str:
    """``85.2 ms``, ``1.24 s``, ``5 min 3 s``."""
    if value >= 60:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest} s" if minutes < 60 else f"{value / 3600:.1f} h"
    unit, scale = ("s", 1.0) if value >= 1 else seconds_unit([value])
    return f"{number(value * scale)} {unit}"


def seconds_of(figure: Figure) -> str:
    """Median and interval with their unit: ``85.2 ms (84.1 to 86.0)``."""
    unit, scale = ("s", 1.0) if figure.median >= 1 else seconds_unit([figure.median])
    median, span = interval(figure, scale)
    return f"{median} {unit} ({span})"


def size(nbytes: float) -> str:
    """Bytes in powers of ten: ``91.7 MB``."""
    unit, scale = next((each for each in BYTES if nbytes >= each[1]), BYTES[-1])
    return f"{number(nbytes / scale, 0 if unit == 'B' else None)} {unit}"


def percent(share: float) -> str:
    """``34.5 %``."""
    return f"{share * 100:.{1 if share < 1 else 0}f} %"


def count(amount: int, noun: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{amount} {noun}{'s' * (amount != 1)}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """``A, B and C``; of more than ``most`` the first, and how many are left."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""


def gathered(reasons: Iterable[str]) -> list[str]:
    """Reasons of many cells, each kind once: ``other programs had 53% to 99% of the CPU time``."""
    kinds: dict[str, list[float]] = {}
    for reason in reasons:
        text = AMOUNT.sub("", plain(reason).rstrip("."))
        share = PERCENT.search(text)
        kind = PERCENT.sub("%", text, count=1)
        kinds.setdefault(kind, []).extend([float(share[1])] if share else [])
    return [
        kind.replace("%", _span(shares), 1) if shares else kind for kind, shares in kinds.items()
    ]


def _span(shares: Sequence[float]) -> str:
    least, most = min(shares), max(shares)
    return f"{least:g}%" if least == most else f"{least:g}% to {most:g}%"


def moment(text: str) -> str:
    """An ISO date and time without its seconds' fractions; other text as it is."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return plain(text)
    zone = read.strftime("%z")
    name = "UTC" if zone == "+0000" else zone
    return f"{read:%Y-%m-%d %H:%M} {name}".strip()
