"""Edits that multiply the weight: all of the change or nothing, since half of it is not defined."""

from __future__ import annotations

from typing import ClassVar

from edgellm.errors import AdapterError
from edgellm.tensors import Array


class Multiplying:
    """The common ground of (IA)^3 and the rotations; ``kind`` and ``name`` are for messages."""

    kind: ClassVar[str]
    rank: ClassVar[int] = 0
    scale: ClassVar[float] = 1.0
    name: str

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        """Rows ``start:stop`` after the change; raises ``AdapterError`` as ``check`` does."""
        self.check(weight)
        return self.multiplied(rows, start, stop) if weight else rows

    def check(self, weight: float) -> None:
        """Raise ``AdapterError`` for a strength that is neither 1 nor 0."""
        if weight not in (0.0, 1.0):
            raise AdapterError(
                f"{self.name}: {self.kind} multiplies the weight, and {weight:g} times as strong "
                "is not defined for it: give the adapter without a weight"
            )

    def multiplied(self, rows: Array, start: int, stop: int) -> Array:
        """Rows ``start:stop`` after the whole change; ``rows`` may be changed in place."""
        raise NotImplementedError
