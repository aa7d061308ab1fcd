"""Weights kept as floats: rounded to f32, f16 or bf16 (to nearest, ties to even), and read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm.errors import TensorError, UnsupportedTarget
from edgellm.quant.grid import Grid, QTensor
from edgellm.tensors import Array

LARGEST_F16 = 65504.0
LARGEST_BF16 = 2.0**128 - 2.0**120


def encode(rows: Array, grid: Grid) -> QTensor:
    """``rows`` ``[rows, columns]`` rounded to the float grid, little-endian in ``packed``.

    The bytes equal ggml's and IEEE 754's round-to-nearest-even. Raises ``TensorError`` for a value
    beyond the grid's largest: it would become Inf, and the model's answers NaN.
    """
    if grid.name not in ENCODERS:
        raise UnsupportedTarget(f"{grid.name} is not a float grid: choose {', '.join(ENCODERS)}")
    values = ENCODERS[grid.name](np.ascontiguousarray(rows, dtype=np.float32))
    return QTensor(grid, rows.shape[1], packed=values.view(np.uint8).reshape(len(rows), -1))


def to_f32(rows: Array) -> npt.NDArray[np.uint8]:
    """The same values, as bytes ``[rows, 4 * columns]``."""
    return rows.astype("<f4", copy=False).view(np.uint8)


def to_f16(rows: Array) -> npt.NDArray[np.uint8]:
    """IEEE half precision; raises ``TensorError`` beyond 65504."""
    with np.errstate(over="ignore"):
        halves = rows.astype("<f2")
    _refuse_overflow(rows, np.isfinite(halves), "f16", LARGEST_F16, "bf16 or f32")
    return halves.view(np.uint8)


def to_bf16(rows: Array) -> npt.NDArray[np.uint8]:
    """The upper half of float32, rounded; a carry rightly raises the exponent."""
    bits = rows.view(np.uint32)
    lowest_kept = bits >> np.uint32(16) & np.uint32(1)
    halves = ((bits + np.uint32(0x7FFF) + lowest_kept) >> np.uint32(16)).astype("<u2")
    _refuse_overflow(rows, halves & 0x7F80 != 0x7F80, "bf16", LARGEST_BF16, "f32")
    return halves.view(np.uint8)


def decode(raw: npt.NDArray[np.uint8], dtype: str) -> Array:
    """Little-endian floats of type ``dtype``, one of ``READABLE``, as float32.

    ``raw`` is uint8 ``[..., n * item]``, the result ``[..., n]``. A double out of float32's range
    becomes Inf.
    """
    if dtype == "bf16":  # the upper half of a float32
        values: Array = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32).view(np.float32)
        return values
    with np.errstate(over="ignore"):
        return raw.view(NUMPY_TYPES[dtype]).astype(np.float32, copy=False)


def rounded(rows: Array, dtype: str) -> Array:
    """``rows`` as they come back after being stored as ``dtype`` (f32, f16 or bf16), in float32.

    Raises ``TensorError`` for a value beyond the type's largest.
    """
    if dtype == "f32":
        return rows
    return decode(ENCODERS[dtype](np.ascontiguousarray(rows)), dtype)


def _refuse_overflow(
    rows: Array, fits: npt.NDArray[np.bool_], name: str, largest: float, instead: str
) -> None:
    if not fits.all():
        raise TensorError(
            f"the value {rows[~fits][0]:g} does not fit {name}, whose largest is {largest:g}: "
            f"choose {instead}, or a quantized grid for this tensor"
        )


ENCODERS = {"f32": to_f32, "f16": to_f16, "bf16": to_bf16}

NUMPY_TYPES = {"f32": "<f4", "f16": "<f2", "f64": "<f8"}

READABLE = (*NUMPY_TYPES, "bf16")
"""Types that ``decode`` reads."""


def check_reach(rows: Array, grid: str) -> None:
    """Raise ``TensorError`` for values that f16 scales may not reach: they would become Inf."""
    largest = max(rows.max(initial=0), -rows.min(initial=0))
    if largest > LARGEST_F16:
        raise TensorError(
            f"a value of size {largest:g} does not fit {grid}, whose blocks have f16 scales of at "
            f"most {LARGEST_F16:g}: choose bf16 or f32, or --format onnx"
        )
