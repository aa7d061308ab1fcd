"""Sizes as people write them."""

from __future__ import annotations

import re

from edgellm.errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}

SMALLEST = 1000
"""Fewer bytes are a unit that was forgotten."""


def bytes_of(text: str) -> int:
    """``90MB`` as 90,000,000, ``1.5 GiB`` as 1,610,612,736.

    Raises ``UsageError`` for what is no size, and for less than a model takes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = found and UNITS.get(found[2].upper())
    if not found or not unit or not float(found[1]):
        raise UsageError(
            f"{text!r} is no size: --fit reads 90MB, 1.5GB, 700MiB or a number of bytes"
        )
    size = int(float(found[1]) * unit)
    if size < SMALLEST:
        raise UsageError(
            f"--fit {text} is {size} bytes, which hold no model: was {found[1]}MB meant?"
        )
    return size
