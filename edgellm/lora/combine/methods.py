"""The ways to combine several adapters, as rows of a table: which steps each method takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Method:
    """The steps of one way to combine adapters; PEFT calls it ``combination_type``.

    ``of``: what is pruned, weighted and summed, the whole ``deltas`` or LoRA's ``factors`` A and B
    apart. ``prune``: how values are thrown away first (``magnitude`` keeps the largest, ``random``
    draws them and scales the rest up). ``elect``: values whose sign the majority does not share are
    left out, and the rest is averaged. ``truncate``: the sum is cut to a low rank. ``summary`` is
    a line for help.
    """

    of: Literal["deltas", "factors"]
    prune: Literal["magnitude", "random"] | None
    elect: bool
    truncate: bool
    summary: str


METHODS: dict[str, Method] = {
    "cat": Method("deltas", None, False, False, "the exact weighted sum"),
    "svd": Method("deltas", None, False, True, "the exact sum, cut to a rank"),
    "linear": Method("factors", None, False, False, "sums of the factors; only roughly the sum"),
    "ties": Method("factors", "magnitude", True, False, "TIES on the factors"),
    "dare_linear": Method("factors", "random", False, False, "DARE on the factors, then linear"),
    "dare_ties": Method("factors", "random", True, False, "DARE on the factors, then TIES' signs"),
    "magnitude_prune": Method(
        "factors", "magnitude", False, False, "the factors' largest values, then linear"
    ),
    "ties_svd": Method("deltas", "magnitude", True, True, "TIES on the changes, cut to a rank"),
    "dare_linear_svd": Method(
        "deltas", "random", False, True, "DARE on the changes, summed, cut to a rank"
    ),
    "dare_ties_svd": Method(
        "deltas", "random", True, True, "DARE on the changes, then TIES' signs, cut to a rank"
    ),
    "magnitude_prune_svd": Method(
        "deltas", "magnitude", False, True, "the changes' largest values, summed, cut to a rank"
    ),
}
"""PEFT's ``combination_type`` by name."""
