"""Memory for the keys and values of one sequence, which grows with it.

All caches of a model lie in one block, in huge pages where Linux leaves that choice to programs:
attention streams them whole for every token, as it does the weights (see ``huge_pages``). A block
is filled as soon as its first token is written, since a page spans several heads; so it begins
small and doubles, and memory follows what the sequence holds instead of the longest possible one.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import GenerationError
from edgellm.runtimes.huge_pages import HUGE_PAGE_BYTES

FIRST_TOKENS = 1024
"""Room at the start: 47 MB for SmolLM2-135M in float32, and most answers never need more."""

ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector: a load that straddles two costs twice."""


def next_room(held: int, needed: int, limit: int) -> int:
    """Tokens to make room for when ``needed`` do not fit into ``held``; at most ``limit``."""
    return min(max(needed, 2 * held, FIRST_TOKENS), limit)


def allocate(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[npt.DTypeLike]
) -> list[npt.NDArray[Any]]:
    """Arrays of zeros of these shapes and types in one block, freed with the last of them.

    Raises ``GenerationError`` when there is no memory for it.
    """
    kinds = [np.dtype(dtype) for dtype in dtypes]
    sizes = [
        -(-math.prod(shape) * kind.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    try:
        block = mmap.mmap(-1, sum(sizes) + HUGE_PAGE_BYTES)
    except (OSError, OverflowError, ValueError) as error:
        raise GenerationError(
            f"no memory for {sum(sizes) / 1e6:,.0f} MB of keys and values ({error}): open the "
            "model with a smaller --context, or convert it with --kv-cache int8"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(block, np.uint8)
    place = -whole.ctypes.data % HUGE_PAGE_BYTES
    arrays = []
    for shape, kind, nbytes in zip(shapes, kinds, sizes, strict=True):
        used = math.prod(shape) * kind.itemsize
        arrays.append(whole[place : place + used].view(kind).reshape(shape))
        place += nbytes
    return arrays
