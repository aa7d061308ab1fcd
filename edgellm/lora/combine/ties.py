"""TIES: the sign that most adapters want for a value, and the mean of those who share it.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023), section 4, steps 2
and 3 (step 1, the trimming, is ``pruning.py``); arXiv:2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np

from edgellm.tensors import Array

Sign = Literal["total", "frequency"]
"""What decides the sign: the sum of the values (the paper's way), or the number of adapters."""


def merge_agreeing(tasks: Sequence[Array], weights: Sequence[np.float32], sign: Sign) -> Array:
    """The mean of the weighted values of ``tasks`` that have the elected sign, 0 where none has.

    As PEFT 0.21 (``calculate_majority_sign_mask``, ``disjoint_merge``): the election takes the
    values before they are weighted, a tie goes to plus, and the mean divides by the number of
    values, not by their weights. ``tasks`` are of one shape, float32, and may be changed in place.
    """
    votes = tasks if sign == "total" else [np.sign(task) for task in tasks]
    plus = reduce(np.add, votes) >= 0
    total = np.zeros_like(tasks[0])
    count = np.zeros(total.shape, dtype=np.float32)
    for task, weight in zip(tasks, weights, strict=True):
        agrees = np.where(plus, task > 0, task < 0)
        count += agrees
        task *= weight
        task *= agrees  # a product, not a choice: NaN stays NaN and is found later
        total += task
    total /= np.maximum(count, 1)
    return total
