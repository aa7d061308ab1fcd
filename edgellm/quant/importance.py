"""How much each input channel of a weight counts: the mean square of what it is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgellm.errors import TensorError
from edgellm.tensors import Array


class Weighing(Protocol):
    """What knows the importance of a layer's inputs (``Statistics`` does)."""

    @property
    def importance(self) -> Array: ...


@dataclass(frozen=True)
class Importance:
    """Importance float32 ``[in]`` and nothing else, as read from llama.cpp's files."""

    importance: Array


def checked(importance: Array, columns: int) -> Array:
    """``importance`` as float32 ``[columns]``.

    Raises ``TensorError`` for another width, for numbers below 0 and those that are not finite.
    """
    if importance.shape != (columns,):
        raise TensorError(
            f"importance of shape {list(importance.shape)} is given for rows of {columns}: it was "
            "made for another tensor or model"
        )
    values = np.ascontiguousarray(importance, dtype=np.float32)
    sound = np.isfinite(values) & (values >= 0)
    if not sound.all():
        raise TensorError(
            f"importance must be finite numbers of 0 or more, got {values[~sound][0]:g}: collect "
            "it again"
        )
    return values


def lifted(importance: Array) -> Array:
    """``importance`` with the smallest positive one in place of zeros; ones where all are zero.

    Ggml turns a block without any importance into zeros. The input of such channels was zero in the
    calibration; that they stay so in use is not sure, and rounding them as well costs nothing.
    """
    positive = importance[importance > 0]
    if not len(positive):
        return np.where(importance == 0, np.float32(1), importance)
    return np.where(importance == 0, positive.min(), importance)
