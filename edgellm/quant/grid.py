"""Grids: the set of values that a block of weights may take, and tensors rounded to one.

A grid says nothing about bytes on disk (``export/packing.py`` does) nor about how codes are
chosen (the solvers do).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnknownGrid
from edgellm.quant.ggml_types import NAMED
from edgellm.registry import suggestion

if TYPE_CHECKING:
    from edgellm.quant.bnb_absmax import Rounded

GridKind = Literal["float", "affine", "per_channel", "codebook", "ggml"]


@dataclass(frozen=True, slots=True)
class Grid:
    """One grid.

    ``block`` is the number of neighbouring values in a row that are stored as one (1 for float
    grids, 0 for a whole row); it must divide a row. ``group`` of them share a scale: as many as in
    a block, but fewer in ggml's super-blocks. ``bits`` counts a code alone, without scales.
    ``symmetric``: no zero point and no minimum. ``ggml_type``: ggml's number, for grids whose
    blocks ggml defines. ``scale_dtype`` is what the container stores scales in: solvers round a
    scale to it before they choose the codes that go with it (ggml's blocks have a type of their
    own; containers with other needs than float32 take ``dataclasses.replace`` of a grid).
    ``minima``: each group has a minimum, a float like its scale.
    """

    name: str
    kind: GridKind
    bits: float
    block: int
    symmetric: bool = False
    ggml_type: int | None = None
    sub_block: int | None = None
    scale_dtype: Literal["f32", "f16", "bf16"] = "f32"
    minima: bool = False

    @property
    def group(self) -> int:
        """How many neighbouring values share a scale; 0 for a whole row."""
        return self.block if self.sub_block is None else self.sub_block


@dataclass(frozen=True, slots=True)
class SuperBlocks:
    """The two levels of scales in ggml's super-blocks of 256 values.

    ``scales`` and ``mins`` float32 ``[rows, super_blocks]`` hold ``d`` and ``dmin`` (f16 on disk,
    so exact in it); ``scale_codes`` int16 and ``min_codes`` uint8 ``[rows, groups]`` the small
    integers that they are multiplied by. Grids without minima have neither ``mins`` nor
    ``min_codes``.
    """

    scales: npt.NDArray[np.float32]
    scale_codes: npt.NDArray[np.int16]
    mins: npt.NDArray[np.float32] | None = None
    min_codes: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class QTensor:
    """Rows rounded to a grid, not yet laid out.

    A value is ``level(code) * scale`` of its group; of grids with integer zeros
    ``(code - zero) * scale``, of those with minima ``code * scale + min``. The level of a code is
    the code less ``2 ** (bits - 1)`` on symmetric integer grids, the entry of the table on
    codebooks (``levels.levels_of``).

    ``codes`` uint8 ``[rows, columns]``; ``scales`` float32 ``[rows, groups]``, already rounded to
    the dtype that the container stores; ``zeros`` uint8 and ``mins`` float32 ``[rows, groups]``
    where the grid has them. With ``supers``, ``scales`` are exactly the float32 products
    ``supers.scales * supers.scale_codes`` and ``mins`` exactly ``-(supers.mins *
    supers.min_codes)``. With ``doubled`` (nf4-dq, all rows of a tensor), ``scales`` are its values.
    Floats, vector codebooks and rows rounded by ggml's own code hold finished blocks in ``packed``
    uint8 ``[rows, row_bytes]`` instead, and the rest is empty.
    """

    grid: Grid
    columns: int
    codes: npt.NDArray[np.uint8] | None = None
    scales: npt.NDArray[np.float32] | None = None
    zeros: npt.NDArray[np.uint8] | None = None
    packed: npt.NDArray[np.uint8] | None = None
    mins: npt.NDArray[np.float32] | None = None
    supers: SuperBlocks | None = None
    doubled: Rounded | None = None


def _ggml(
    name: str,
    bits: float,
    symmetric: bool = False,
    sub_block: int | None = None,
    minima: bool = False,
) -> Grid:
    kind = NAMED[name]
    return Grid(name, "ggml", bits, kind.block, symmetric, kind.number, sub_block, minima=minima)


def _float(name: str, bits: float) -> Grid:
    return Grid(name, "float", bits, 1, ggml_type=NAMED[name].number)


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        _float("f32", 32),
        _float("f16", 16),
        _float("bf16", 16),
        Grid("int8", "affine", 8, 32, symmetric=True),
        *(Grid(f"int8-g{group}", "affine", 8, group, symmetric=True) for group in (64, 128)),
        Grid("int8-dynamic", "per_channel", 8, 0, symmetric=True),
        *(Grid(f"int4-g{group}", "affine", 4, group) for group in (32, 64, 128)),
        *(
            Grid(f"int4-g{group}-sym", "affine", 4, group, symmetric=True)
            for group in (32, 64, 128)
        ),
        *(Grid(f"int4-g{group}-min", "affine", 4, group, minima=True) for group in (32, 64, 128)),
        Grid("nf4", "codebook", 4, 64, symmetric=True),
        Grid("nf4-dq", "codebook", 4, 64, symmetric=True),
        _ggml("q4_0", 4, symmetric=True),
        _ggml("q4_1", 4, minima=True),
        _ggml("q5_0", 5, symmetric=True),
        _ggml("q5_1", 5, minima=True),
        _ggml("q8_0", 8, symmetric=True),
        _ggml("q2_k", 2, sub_block=16),
        _ggml("q3_k", 3, symmetric=True, sub_block=16),
        _ggml("q4_k", 4, sub_block=32),
        _ggml("q5_k", 5, sub_block=32),
        _ggml("q6_k", 6, symmetric=True, sub_block=16),
        _ggml("iq1_s", 1),
        _ggml("iq1_m", 1),
        _ggml("iq2_xxs", 2),
        _ggml("iq2_xs", 2),
        _ggml("iq3_xxs", 3),
        _ggml("iq4_nl", 4, symmetric=True),
        _ggml("iq3_s", 3),
        _ggml("iq2_s", 2),
        _ggml("iq4_xs", 4, symmetric=True, sub_block=32),
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
