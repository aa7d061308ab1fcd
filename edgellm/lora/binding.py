"""An edit bound to how strong it is wanted, and how several of them become one change."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.lora.edit import Edit


@dataclass(frozen=True, slots=True)
class Combination:
    """How several adapters become one change: ``method`` is a row of ``combine.METHODS``.

    ``density``: the share of values that is kept, for the methods that prune. ``sign``: how ties
    elects signs (``total`` or ``frequency``). ``rank`` of the result, for the SVD methods; None for
    the largest of the adapters. ``seed`` of the random masks.
    """

    method: str = "cat"
    density: float | None = None
    sign: str = "total"
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Binding:
    """One adapter's change of one weight, and how strong it is wanted."""

    edit: Edit
    weight: float
