"""Double quantization: the scales of bitsandbytes' 4-bit blocks, themselves rounded to 8 bits.

QLoRA (arXiv 2305.14314, section 3, "Double Quantization") as bitsandbytes does it
(``functional.quantize_4bit`` with ``compress_statistics``): the mean is taken off, the rest is
rounded in blocks of 256 to a table of 256 levels whose steps grow with the magnitude
("8-bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561; ``create_dynamic_map``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.quant.bnb_4bit import SMALLEST_ABSMAX, block_absmax
from edgellm.tensors import Array

BLOCK = 256
EXPONENTS = 7


def _dynamic_levels() -> Array:
    """Both signs of 2^i means between 0.1 and 1 at each of seven powers of ten, 0 and 1."""
    sizes: list[float] = []
    for exponent in range(EXPONENTS):
        count = 2**exponent
        borders = _linspace(count + 1)
        means = (borders[:-1] + borders[1:]) / np.float32(2)
        # torch multiplies a float32 tensor by a Python number: in float32, once.
        power = np.float32(10.0 ** (exponent - EXPONENTS + 1))
        sizes += (power * means).tolist()
    return np.asarray(sorted([*sizes, *(-size for size in sizes), 0.0, 1.0]), np.float32)


def _linspace(count: int) -> Array:
    """``torch.linspace(0.1, 1, count, dtype=float32)``: from the nearer end, each rounded once."""
    first, last = np.float32(0.1), np.float32(1)
    step = float((last - first) / np.float32(count - 1))
    places = np.arange(count)
    from_last = float(last) - step * (count - 1 - places)
    return np.where(places < count // 2, float(first) + step * places, from_last).astype(np.float32)


LEVELS = _dynamic_levels()
"""The 256 levels, lowest first; -1 is not among them (``create_dynamic_map``)."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Scales rounded to 8 bits: ``level[codes] * absmax[i // 256] + offset`` in float32.

    ``codes`` uint8 ``[blocks]``; ``absmax`` float32 ``[ceil(blocks / 256)]``.
    """

    codes: npt.NDArray[np.uint8]
    absmax: Array
    offset: np.float32


def quantize(scales: Array, offset: np.float32 | None = None) -> Rounded:
    """``scales`` float32 ``[blocks]`` rounded to the nearest level, as bitsandbytes' GPU kernel.

    Its CPU kernel looks levels up in a table of 65536 steps and differs for one code in some
    hundreds, half way between two levels. ``offset``: what is taken off; by default the mean,
    summed in double precision, where the order in which a device sums decides the last bit.
    """
    if offset is None:
        offset = np.float32(scales.mean(dtype=np.float64))
    rest = scales - offset
    absmax = block_absmax(rest, BLOCK)
    inverse = np.float32(1) / np.maximum(absmax, SMALLEST_ABSMAX)
    parts = np.clip(rest * np.repeat(inverse, BLOCK)[: len(rest)], -1, 1)
    borders = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
    return Rounded(np.searchsorted(borders, parts, side="left").astype(np.uint8), absmax, offset)


def values_of(rounded: Rounded) -> Array:
    """The scales float32 ``[blocks]`` that ``rounded`` stands for."""
    return dequantize(rounded.codes, rounded.absmax, rounded.offset)


def dequantize(
    codes: npt.NDArray[np.uint8],
    absmax: Array,
    offset: np.float32,
    *,
    first: int = 0,
    block: int = BLOCK,
    levels: Array = LEVELS,
) -> Array:
    """Scales float32 ``[blocks]`` of ``codes``; ``first`` is the place of the first among all."""
    places = np.arange(first, first + len(codes)) // block
    values: Array = levels[codes] * absmax[places]
    values += offset
    return values
