"""bitsandbytes' 4-bit blocks: neighbouring values of the flattened weight share their largest size.

A block runs over the weight row by row and may straddle rows. A code is a place in a table of
sixteen levels between -1 and 1 (NF4: arXiv 2305.14314, appendix E; FP4: a float of one sign, two
exponent and one mantissa bit). Equal to ``quantize_4bit`` and ``dequantize_4bit`` of bitsandbytes
0.50 on its default backend, value for value.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm.quant import nf4
from edgellm.tensors import Array

Codes = npt.NDArray[np.uint8]

BLOCK = 64
"""Values that share a scale where nobody says otherwise, as in bitsandbytes."""

_FP4_BY_CODE = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]

LEVELS: dict[str, Array] = {
    "nf4": nf4.LEVELS,
    "fp4": np.asarray(_FP4_BY_CODE, np.float32) / np.float32(12),
}
"""The level that each code stands for (``functional.get_4bit_type``)."""

SMALLEST_ABSMAX = np.float32(1e-38)

CHUNK_VALUES = 1 << 16
"""Values rounded at once, so that their copies stay in the cache."""


def block_absmax(values: Array, block: int = BLOCK) -> Array:
    """The largest magnitude of each ``block`` of ``values`` ``[n]``, the last may be short."""
    sizes = np.empty(-(-len(values) // block), np.float32)
    step = _step(block)
    whole = len(values) // block * block
    for start in range(0, whole, step):
        part = values[start : min(start + step, whole)].reshape(-1, block)
        np.abs(part).max(axis=1, out=sizes[start // block : start // block + len(part)])
    if whole < len(values):
        sizes[-1] = np.abs(values[whole:]).max()
    return sizes


def quantize(values: Array, absmax: Array, kind: str, block: int = BLOCK) -> Codes:
    """The code of each of ``values`` ``[n]``, uint8 ``[n]``; ``absmax`` as ``block_absmax`` gives.

    A value half way between two levels goes to the lower one. As in the reference, a block is
    multiplied by the inverse of its size, a short last one divided by it.
    """
    levels = LEVELS[kind]
    order = np.argsort(levels, kind="stable").astype(np.uint8)
    ordered = levels[order]
    borders = (ordered[:-1] + ordered[1:]) / np.float32(2)
    sizes = np.maximum(absmax, SMALLEST_ABSMAX)
    codes = np.empty(len(values), np.uint8)
    step = _step(block)
    whole = len(values) // block * block
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        inverse: Array = np.reciprocal(sizes[start // block : stop // block, None])
        part: Array = values[start:stop].reshape(-1, block) * inverse
        codes[start:stop] = order[_places(part.reshape(-1), borders)]
    if whole < len(values):
        codes[whole:] = order[_places(values[whole:] / sizes[-1], borders)]
    return codes


def dequantize(codes: Codes, absmax: Array, kind: str, block: int = BLOCK) -> Array:
    """``level * absmax`` in float32 ``[n]`` for codes uint8 ``[n]``; the last block may be short.

    bitsandbytes rounds the product to the dtype of the model as it was loaded; so must the caller.
    """
    values: Array = LEVELS[kind].take(codes)
    whole = len(values) // block * block
    values[:whole].reshape(-1, block)[:] *= absmax[: whole // block, None]
    if whole < len(values):
        values[whole:] *= absmax[-1]
    return values


def unpack(packed: Codes) -> Codes:
    """Two codes of each byte, the high half first; uint8 ``[2 * bytes]``."""
    codes = np.empty((len(packed), 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, 0])
    np.bitwise_and(packed, 15, out=codes[:, 1])
    return codes.reshape(-1)


def _step(block: int) -> int:
    """Values of whole blocks that are worked on at once."""
    return max(1, CHUNK_VALUES // block) * block


def _places(part: Array, borders: Array) -> Codes:
    """How many borders lie below each value; six times quicker than a binary search in numpy."""
    places = np.zeros(part.shape, np.uint8)
    for border in borders:
        places += part > border
    return places
