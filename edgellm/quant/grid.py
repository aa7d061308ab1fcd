"""Grids: the set of values that a block of weights may take, and tensors rounded to one.

A grid says nothing about bytes on disk (``export/packing.py`` does) nor about how codes are
chosen (``rtn.py`` and later solvers do).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnknownGrid

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


def _ggml(name: str, ggml_type: int, bits: float, block: int, symmetric: bool = False) -> Grid:
    return Grid(name, "ggml", bits, block, symmetric, ggml_type)


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("f32", "float", 32, 1, ggml_type=0),
        Grid("f16", "float", 16, 1, ggml_type=1),
        Grid("bf16", "float", 16, 1, ggml_type=30),
        Grid("int8", "affine", 8, 32, symmetric=True),
        Grid("int8-dynamic", "per_channel", 8, 0, symmetric=True),
        *(Grid(f"int4-g{group}", "affine", 4, group) for group in (32, 64, 128)),
        *(
            Grid(f"int4-g{group}-sym", "affine", 4, group, symmetric=True)
            for group in (32, 64, 128)
        ),
        Grid("nf4", "codebook", 4, 64, symmetric=True),
        _ggml("q4_0", 2, 4, 32, symmetric=True),
        _ggml("q4_1", 3, 4, 32),
        _ggml("q5_0", 6, 5, 32, symmetric=True),
        _ggml("q5_1", 7, 5, 32),
        _ggml("q8_0", 8, 8, 32, symmetric=True),
        _ggml("q2_k", 10, 2, 256),
        _ggml("q3_k", 11, 3, 256, symmetric=True),
        _ggml("q4_k", 12, 4, 256),
        _ggml("q5_k", 13, 5, 256),
        _ggml("q6_k", 14, 6, 256, symmetric=True),
        _ggml("iq3_xxs", 18, 3, 256),
        _ggml("iq4_nl", 20, 4, 32),
        _ggml("iq3_s", 21, 3, 256),
        _ggml("iq2_s", 22, 2, 256),
        _ggml("iq4_xs", 23, 4, 256),
    )
}


def grid_named(text: str) -> Grid:
    """The grid called ``text``, in any case; raises ``UnknownGrid`` with the nearest names."""
    if text.lower() not in GRIDS:
        raise unknown_grid(text, GRIDS)
    return GRIDS[text.lower()]


def unknown_grid(text: str, names: Iterable[str]) -> UnknownGrid:
    """The error that says which of ``names`` come nearest to ``text``, or all where none does."""
    near = get_close_matches(text.lower(), names := tuple(names), n=4, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
    return UnknownGrid(f"no grid named {text!r}: {hint}")
