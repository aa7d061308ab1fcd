"""The memory that a merge takes beside the slabs of its workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgellm.lora.adapter import Adapter
from edgellm.lora.binding import Combination
from edgellm.lora.combine.methods import METHODS
from edgellm.lora.combine.truncation import whole_matrix_bytes
from edgellm.lora.factors import KEPT_BYTES


def merge_bytes(
    adapters: Sequence[Adapter], combination: Combination, shapes: Iterable[tuple[int, ...]]
) -> int:
    """Bytes at the most: the factors that are kept, and one weight whole for methods that need it.

    ``shapes`` are those of the changed weights.
    """
    factors = sum(
        4 * part.size
        for adapter in adapters
        for parts in adapter.parts.values()
        for part in parts.values()
    )
    method, whole = METHODS[combination.method], 0
    if method.truncate and method.prune and len(adapters) > 1:
        matrices = (shape for shape in shapes if len(shape) == 2)
        whole = max(map(whole_matrix_bytes, matrices), default=0)
    return min(KEPT_BYTES, factors) + whole
