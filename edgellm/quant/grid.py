"""Grids: the set of values that a block of weights may take, and tensors rounded to one.

A grid says nothing about bytes on disk (``export/packing.py`` does) nor about how codes are
chosen (``rtn.py`` and later solvers do).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnknownGrid
from edgellm.quant.ggml_types import NAMED
from edgellm.registry import suggestion

GridKind = Literal["float", "affine", "per_channel", "codebook", "ggml"]


@dataclass(frozen=True, slots=True)
class Grid:
    """One grid.

    ``block`` is the number of neighbouring values in a row that share a scale (1 for float grids,
    0 for one scale a row). ``bits`` counts a code alone, without scales. ``symmetric``: no zero
    point. ``ggml_type``: ggml's number, for grids whose blocks ggml defines.
    """

    name: str
    kind: GridKind
    bits: float
    block: int
    symmetric: bool = False
    ggml_type: int | None = None


@dataclass(frozen=True, slots=True)
class QTensor:
    """Rows rounded to a grid, not yet laid out: ``value = (code - zero) * scale`` per block.

    ``codes`` uint8 ``[rows, columns]`` (a codebook's index for nf4); ``scales`` float32
    ``[rows, blocks]``, already rounded to the dtype that the container stores; ``zeros`` uint8
    ``[rows, blocks]`` or None where the grid is symmetric. For ggml grids rounded by ggml's own
    code, ``packed`` uint8 ``[rows, row_bytes]`` holds finished blocks and the rest is empty.
    """

    grid: Grid
    columns: int
    codes: npt.NDArray[np.uint8] | None = None
    scales: npt.NDArray[np.float32] | None = None
    zeros: npt.NDArray[np.uint8] | None = None
    packed: npt.NDArray[np.uint8] | None = None


def _ggml(name: str, bits: float, symmetric: bool = False) -> Grid:
    kind = NAMED[name]
    return Grid(name, "ggml", bits, kind.block, symmetric, kind.number)


def _float(name: str, bits: float) -> Grid:
    return Grid(name, "float", bits, 1, ggml_type=NAMED[name].number)


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        _float("f32", 32),
        _float("f16", 16),
        _float("bf16", 16),
        Grid("int8", "affine", 8, 32, symmetric=True),
        Grid("int8-dynamic", "per_channel", 8, 0, symmetric=True),
        *(Grid(f"int4-g{group}", "affine", 4, group) for group in (32, 64, 128)),
        *(
            Grid(f"int4-g{group}-sym", "affine", 4, group, symmetric=True)
            for group in (32, 64, 128)
        ),
        Grid("nf4", "codebook", 4, 64, symmetric=True),
        _ggml("q4_0", 4, symmetric=True),
        _ggml("q4_1", 4),
        _ggml("q5_0", 5, symmetric=True),
        _ggml("q5_1", 5),
        _ggml("q8_0", 8, symmetric=True),
        _ggml("q2_k", 2),
        _ggml("q3_k", 3, symmetric=True),
        _ggml("q4_k", 4),
        _ggml("q5_k", 5),
        _ggml("q6_k", 6, symmetric=True),
        _ggml("iq3_xxs", 3),
        _ggml("iq4_nl", 4),
        _ggml("iq3_s", 3),
        _ggml("iq2_s", 2),
        _ggml("iq4_xs", 4),
    )
}


def grid_named(text: str) -> Grid:
    """The grid called ``text``, in any case; raises ``UnknownGrid`` with the nearest names."""
    if text.lower() not in GRIDS:
        raise unknown_grid(text, GRIDS)
    return GRIDS[text.lower()]


def unknown_grid(text: str, names: Iterable[str]) -> UnknownGrid:
    """The error that says which of ``names`` come nearest to ``text``, or all where none does."""
    return UnknownGrid(f"no grid named {text!r}: {suggestion(text.lower(), names)}")
