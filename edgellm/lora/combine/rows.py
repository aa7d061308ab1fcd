"""Rows of several tensors of one shape made into one: pruned, weighted, summed or elected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.lora.combine.pruning import Pruning
from edgellm.lora.combine.ties import Sign, merge_agreeing
from edgellm.tensors import Array, TensorRef


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter's tensor, what is thrown away of it, and what the rest is multiplied by."""

    ref: TensorRef
    pruning: Pruning | None
    weight: np.float32

    def load(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` after pruning, not weighted yet."""
        rows = self.ref.load(start, stop)
        if self.pruning is not None:
            self.pruning.prune(rows, start)
        return rows


def merged_rows(tasks: Sequence[Task], sign: Sign | None, start: int, stop: int) -> Array:
    """Rows ``start:stop`` of all tasks together: their sum, or where ``sign`` is given, TIES."""
    loaded = [task.load(start, stop) for task in tasks]
    weights = [task.weight for task in tasks]
    if sign is not None:
        return merge_agreeing(loaded, weights, sign)
    total = loaded[0]
    total *= weights[0]
    for rows, weight in zip(loaded[1:], weights[1:], strict=True):
        rows *= weight
        total += rows
    return total
