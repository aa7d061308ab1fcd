"""Cosines and sines of rotary positions as tensors that flow like stored weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgellm.architectures.decoder import Rope
from edgellm.architectures.rope import inverse_frequencies
from edgellm.tensors import Array, TensorRef


def rope_tables(name: str, rope: Rope, context_length: int) -> tuple[TensorRef, TensorRef]:
    """Cosines and sines ``[context_length, dimensions / 2]``, computed row by row when asked for.

    Angles are taken in float64; the attention factor of the scaling is multiplied in.
    """
    frequencies, factor = inverse_frequencies(rope)
    return (
        _table(f"{name}.cos", np.cos, frequencies, factor, context_length),
        _table(f"{name}.sin", np.sin, frequencies, factor, context_length),
    )


def _table(
    name: str,
    function: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    frequencies: npt.NDArray[np.float64],
    factor: float,
    rows: int,
) -> TensorRef:
    def load_rows(start: int, stop: int) -> Array:
        angles = np.arange(start, stop, dtype=np.float64)[:, None] * frequencies
        return (function(angles) * factor).astype(np.float32)

    shape = (rows, frequencies.size)
    return TensorRef(name, name, shape, "f32", 4 * rows * frequencies.size, load_rows)
