"""BOFT: a layer's inputs turned by a butterfly of block-diagonal rotations, its outputs scaled.

Liu et al. 2023, https://arxiv.org/abs/2311.06243, block butterfly factorization.
Layout and order are those of ``Linear.merge`` and ``get_delta_weight`` (``tuners/boft/layer.py``,
peft 0.21.2): ``diag(s) W M^T`` with ``M = M_m ... M_1 M_0`` and ``M_i = P_i diag(R_i) P_i^T``;
``boft_R`` is ``[factors, blocks, size, size]`` and ``boft_s`` ``[out, 1]``. The bias is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgellm.errors import AdapterError
from edgellm.lora.edit import Target
from edgellm.lora.factors import kept
from edgellm.lora.kinds.multiplying import Multiplying
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.lora.kinds.rotation import cayley, turned
from edgellm.tensors import Array, TensorRef

PARTS = ("boft_R", "boft_s")


@dataclass(frozen=True)
class Butterfly(Multiplying):
    """``rotations`` ``[factors, blocks, size, size]``, unrestricted; ``lengths`` ``[out, 1]``."""

    kind: ClassVar[str] = "BOFT"
    rotations: TensorRef
    lengths: TensorRef
    name: str

    def multiplied(self, rows: Array, start: int, stop: int) -> Array:
        for level, blocks in enumerate(kept.get(self, self._blocks)):
            order = self._order(level)
            back = np.argsort(order)
            rows = turned(rows[:, back], blocks, start)[:, order]
        rows *= self.lengths.load(start, stop)
        return rows

    def _blocks(self) -> Array:
        """``R_i^T`` of all levels, ``[factors, blocks, size, size]``.

        ``BOFTLayer.cayley_batch``: of the stored matrix, only the skew-symmetric half counts.
        """
        stored = self.rotations.load().reshape(self.rotations.shape)
        result = np.empty_like(stored)
        for index in np.ndindex(stored.shape[:2]):
            result[index] = cayley(0.5 * (stored[index] - stored[index].T)).T
        return result

    def _order(self, level: int) -> npt.NDArray[np.intp]:
        """The butterfly's permutation: column ``i`` of the result is column ``order[i]`` before.

        ``BOFTLayer.block_butterfly_perm``: in each run of ``2^level`` blocks, half-blocks at even
        places come first, then those at odd ones.
        """
        factors, blocks, size, _ = self.rotations.shape
        columns = np.arange(blocks * size, dtype=np.intp)
        if factors == 1:
            return columns
        halves = columns.reshape(blocks >> level, -1, size // 2)
        return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Butterfly:
    """The change of ``target`` by BOFT; raises ``AdapterError`` for what does not fit.

    Blocks and factors are read off the stored shape. Without its CUDA extension PEFT trains one
    factor, whatever ``boft_n_butterfly_factor`` says.
    """
    out, into = linear(target, "BOFT")
    rotations, lengths = exactly(target, parts, *PARTS)
    shaped(target, "boft_s", lengths, (out, 1))
    factors, blocks, size, other = rotations.shape if len(rotations.shape) == 4 else (0, 0, 0, 0)
    step = 1 << max(factors - 1, 0)
    even = factors == 1 or (blocks % step == 0 and size % 2 == 0)
    if not factors or size != other or blocks * size != into or not even:
        raise AdapterError(
            f"{target.name} {list(target.shape)}: boft_R has shape {list(rotations.shape)}, and "
            f"[factors, blocks, size, size] with blocks * size = {into} is needed, with more than "
            "one factor blocks a multiple of 2^(factors - 1) and size even: the adapter was "
            "trained on another model, or is damaged; name its own base"
        )
    return Butterfly(rotations, lengths, target.name)
