"""What a code stands for before its scale: integers around zero, or the entries of a codebook."""

from __future__ import annotations

import numpy as np

from edgellm.errors import UnsupportedTarget
from edgellm.quant import nf4
from edgellm.quant.grid import Grid
from edgellm.tensors import Array

IQ4_LEVELS = np.asarray(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""The levels of iq4_nl and iq4_xs (``kvalues_iq4nl`` of llama.cpp, ggml/src/ggml-common.h)."""

CODEBOOKS = {
    "nf4": nf4.LEVELS,
    "nf4-dq": nf4.LEVELS,
    "iq4_nl": IQ4_LEVELS,
    "iq4_xs": IQ4_LEVELS,
}

VECTOR_CODEBOOKS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
"""Grids whose codes stand for several values at once: ggml's own code alone rounds to them."""


def levels_of(grid: Grid) -> Array:
    """The level of each code of ``grid``, lowest first, float32 ``[codes]``.

    Codes of grids with zeros or minima are their own levels. Raises ``UnsupportedTarget`` for
    floats and vector codebooks, whose codes do not stand for one value each.
    """
    if grid.kind == "float" or grid.name in VECTOR_CODEBOOKS:
        raise UnsupportedTarget(f"{grid.name} has no codes that stand for one value each")
    if grid.name in CODEBOOKS:
        return CODEBOOKS[grid.name]
    count = 2 ** int(grid.bits)
    first = count // 2 if grid.symmetric else 0
    return np.arange(count, dtype=np.float32) - np.float32(first)
