"""How far two texts begin alike."""

from __future__ import annotations

from collections.abc import Sequence


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens at the beginning that both have."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
