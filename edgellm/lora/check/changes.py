"""How large a merge's change of each weight is, and what of it a narrow float type would lose.

Both sides are read by slabs of rows, so memory does not follow the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.hardware import detect
from edgellm.parallel import one_blas_thread
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant.floats import LARGEST_F16
from edgellm.source.matching import embedding_row
from edgellm.source.model import ModelSource
from edgellm.tensors import COLUMN_CHUNK_BYTES, Array, TensorRef, rows_within

Bits = npt.NDArray[np.unsignedinteger]


class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge does to one weight.

    ``relative`` is the Frobenius norm of the change over that of the weight before, None where the
    weight was zero. ``vanishing_bf16`` and ``vanishing_f16`` are shares of the values that change
    which would be the same as before in that type. ``largest`` is the greatest magnitude after the
    merge; ``beyond_f16`` counts values that f16 cannot hold and that it could before.
    """

    role: str
    name: str
    change_norm: float
    weight_norm: float
    relative: float | None
    vanishing_bf16: float
    vanishing_f16: float
    largest: float
    beyond_f16: int


def measure(
    base: ModelSource,
    merged: ModelSource,
    roles: Collection[str],
    *,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> tuple[TensorChange, ...]:
    """The change of each of ``roles`` from ``base`` to ``merged``, in their order.

    A head that was tied before is compared with the table that it shared; rows of added tokens with
    zeros. The figures do not depend on ``threads``. Raises ``AdapterError`` and ``TensorError`` as
    loading does.
    """
    table = base.tensors[embedding_row(base.family, base.decoder).role]
    pairs = [(base.tensors.get(role, table), merged.tensors[role]) for role in roles]
    found = []
    workers = threads or detect().physical_cores.value
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        for change in pool.map(lambda pair: change_of(*pair), pairs):
            found.append(change)
            progress(ProgressEvent("check", change.name, 0, 0, len(found), len(pairs)))
    return tuple(found)


def change_of(before: TensorRef, after: TensorRef) -> TensorChange:
    """What lies between two weights of equal width; ``after`` may have more rows."""
    step = rows_within(COLUMN_CHUNK_BYTES, after.columns)
    change_squares: list[float] = []
    weight_squares: list[float] = []
    changed = beyond = lost_bf16 = lost_f16 = 0
    largest = 0.0
    for start in range(0, after.rows, step):
        new = after.load(start, min(start + step, after.rows))
        old = np.zeros_like(new)
        if start < before.rows:
            known = before.load(start, min(start + step, before.rows))
            old[: len(known)] = known
        delta = new - old
        moved = delta != 0
        change_squares.append(_square_sum(delta))
        weight_squares.append(_square_sum(old))
        changed += int(moved.sum())
        lost_bf16 += _same(old, new, moved, _bf16_bits)
        lost_f16 += _same(old, new, moved, _f16_bits)
        largest = max(largest, float(np.abs(new).max(initial=0)))
        beyond += int(((np.abs(new) > LARGEST_F16) & (np.abs(old) <= LARGEST_F16)).sum())
    change_norm, weight_norm = (
        math.sqrt(math.fsum(squares)) for squares in (change_squares, weight_squares)
    )
    return TensorChange(
        role=after.role,
        name=after.name,
        change_norm=change_norm,
        weight_norm=weight_norm,
        relative=change_norm / weight_norm if weight_norm else None,
        vanishing_bf16=lost_bf16 / changed if changed else 0.0,
        vanishing_f16=lost_f16 / changed if changed else 0.0,
        largest=largest,
        beyond_f16=beyond,
    )


def overall(changes: Sequence[TensorChange]) -> float | None:
    """The norm of all ``changes`` together over that of the weights before; None of nothing."""
    weight = math.fsum(change.weight_norm**2 for change in changes)
    change = math.fsum(change.change_norm**2 for change in changes)
    return math.sqrt(change / weight) if weight else None


def _square_sum(values: Array) -> float:
    return math.fsum(np.einsum("ij,ij->i", values, values, dtype=np.float64).tolist())


def _same(
    old: Array, new: Array, moved: npt.NDArray[np.bool_], bits: Callable[[Array], Bits]
) -> int:
    return int(((bits(old) == bits(new)) & moved).sum())


def _f16_bits(values: Array) -> Bits:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


def _bf16_bits(values: Array) -> Bits:
    """Rounded to nearest, ties to even, as ``floats.to_bf16``; what overflows becomes Inf."""
    bits = values.view(np.uint32)
    halves: Bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(
        16
    )
    return halves
