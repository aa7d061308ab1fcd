"""Slabs of rows: what a worker loads, rounds, packs and writes at once, cut by shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.errors import TensorError
from edgellm.export.layout import OutputTensor
from edgellm.export.packing import PACKERS
from edgellm.export.writer import StagedFolder
from edgellm.parallel import in_parallel
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant.arrays import moved, sums_by_row
from edgellm.quant.dequantize import dequantize
from edgellm.quant.devices import hessian_on, turn
from edgellm.quant.ggml_types import NAMED
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.statistics import Statistics
from edgellm.quant.stored import take_over_stacked
from edgellm.tensors import SLAB_BYTES, Array, check_finite, rows_within, stacked_rows

Solve = Callable[[Array, Grid, Statistics | None], QTensor]


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows ``start:stop`` of one output tensor: the unit of work of a conversion."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Written:
    """A slab that was written: its bytes on disk, and where there are statistics the error.

    ``error`` is ``trace(e @ H @ e.T)`` of what rounding changed, ``power`` the same of the weights
    that it rounded: squares of what the output is off by, and of the output, up to a factor.
    """

    slab: Slab
    nbytes: int
    error: float = 0.0
    power: float = 0.0


def slab_rows(tensor: OutputTensor, most_bytes: int | None = None) -> int:
    """Rows of ``tensor`` that fit into a slab, at least those that are packed together.

    Never of two experts.

    All of one whose rows cannot be rounded apart. ``most_bytes`` of float32, where a slab is not
    to have ``SLAB_BYTES``.
    """
    if tensor.in_one_piece:
        return tensor.rows
    together = tensor.rows_together
    rows = rows_within(most_bytes or SLAB_BYTES, tensor.columns)
    return min(tensor.rows // tensor.experts, max(together, rows - rows % together))


def slab_bytes(tensor: OutputTensor, most_bytes: int | None = None) -> int:
    """Float32 bytes of the largest slab of ``tensor``."""
    return 4 * min(tensor.rows, slab_rows(tensor, most_bytes)) * tensor.columns


def slabs_of(
    tensors: Sequence[OutputTensor], places: Iterable[int], most_bytes: int | None = None
) -> list[Slab]:
    """The slabs of the tensors at ``places``, in that order; the same for any number of threads."""
    return [
        Slab(place, start, min(start + step, first + each))
        for place in places
        for step in (slab_rows(tensors[place], most_bytes),)
        for each in (tensors[place].rows // tensors[place].experts,)
        for first in range(0, tensors[place].rows, each)
        for start in range(first, first + each, step)
    ]


def stored_rows(tensor: OutputTensor, start: int, stop: int) -> Array:
    """Rows ``start:stop`` of ``tensor`` as they are stored, of one expert, float32.

    Raises ``TensorError`` where a part holds NaN or Inf.
    """
    if not tensor.in_turns:
        return stacked_rows(tensor.parts, start, stop)
    each = tensor.rows // tensor.experts
    expert, first = divmod(start, each)
    last = first + stop - start
    low, high = first // 2, -(-last // 2)
    rows = np.empty((2 * (high - low), tensor.columns), np.float32)
    for place, part in enumerate(tensor.parts[2 * expert : 2 * expert + 2]):
        rows[place::2] = part.load(low, high)
        check_finite(rows[place::2], part.name, first_row=low)
    return np.ascontiguousarray(rows[first - 2 * low : last - 2 * low])


def expert_in(tensor: OutputTensor, slab: Slab) -> int:
    """Which part of a stack of experts ``slab`` lies in; 0 for any other tensor."""
    return slab.start // (tensor.rows // tensor.experts)


def write_slab(
    tensor: OutputTensor,
    slab: Slab,
    solve: Solve,
    staged: StagedFolder,
    statistics: Statistics | None = None,
    torch_device: str | None = None,
) -> Written:
    """Load, solve, pack and write one slab; codes that are kept need no solver.

    ``torch_device``: where torch multiplies by the Hessian, in place of numpy.

    Raises ``TensorError`` naming a tensor that holds NaN, Inf, or more than its grid reaches, or
    whose statistics the solver cannot use.
    """
    rows = None
    if statistics is not None or not tensor.keeps_codes:
        rows = stored_rows(tensor, slab.start, slab.stop)
    try:
        if tensor.keeps_codes:
            rounded = take_over_stacked(tensor.parts, tensor.grid, slab.start, slab.stop)
        else:
            assert rows is not None
            rounded = solve(rows, tensor.grid, statistics)
        packed = PACKERS[tensor.packer].pack(rounded)
    except TensorError as error:  # a solver knows values alone
        names = ", ".join(part.name for part in tensor.parts)
        raise TensorError(f"tensor {names}: {error}") from error
    for array in tensor.arrays:
        for offset, content in array.places(slab.start, packed[array.component]):
            staged.write_at(array.file, offset, content)
    nbytes = sum(packed[array.component].size for array in tensor.arrays)
    if statistics is None or rows is None:
        return Written(slab, nbytes)
    off = values_of(rounded)
    off -= rows
    powers = [output_power(each, statistics, torch_device) for each in (off, rows)]
    return Written(slab, nbytes, *powers)


def write_tensors(
    tensors: Sequence[OutputTensor],
    solve: Solve,
    threads: int,
    staged: StagedFolder,
    progress: Progress = unwatched,
) -> None:
    """Write ``tensors``: load, solve, pack and place one slab of rows at a time.

    Raises ``TensorError`` naming a tensor that holds NaN, Inf, or more than its grid reaches.
    """
    slabs = slabs_of(tensors, range(len(tensors)))
    left = [0] * len(tensors)
    for slab in slabs:
        left[slab.tensor] += 1
    total = sum(tensor.nbytes for tensor in tensors)
    done_bytes = done_tensors = 0

    def work(slab: Slab) -> Written:
        return write_slab(tensors[slab.tensor], slab, solve, staged)

    for written in in_parallel(work, slabs, threads):
        place = written.slab.tensor
        done_bytes += written.nbytes
        left[place] -= 1
        done_tensors += not left[place]
        progress(
            ProgressEvent(
                "quantize", tensors[place].name, done_bytes, total, done_tensors, len(left)
            )
        )


def values_of(rounded: QTensor) -> Array:
    """The values that ``rounded`` stands for, codes or finished blocks of ggml's."""
    if rounded.codes is not None or rounded.packed is None:
        return dequantize(rounded)
    from edgellm.quant import ggml  # loads a shared library

    return ggml.dequantize(rounded.packed, NAMED[rounded.grid.name])


def output_power(rows: Array, statistics: Statistics, torch_device: str | None = None) -> float:
    """``trace(rows @ H @ rows.T)``: the mean square of ``rows @ x``, summed over the rows."""
    with turn(torch_device):
        rows, hessian = moved(rows, torch_device), hessian_on(statistics, torch_device)
        by_row = sums_by_row(rows, rows * hessian if hessian.ndim == 1 else rows @ hessian)
    return float(by_row.sum(dtype=np.float64))
