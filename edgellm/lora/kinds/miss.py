"""MiSS: one small block repeated over a layer's inputs and added, or ``bat``, multiplied as well.

Kang and Yin 2024, https://arxiv.org/abs/2409.15371 (Bone, later MiSS). Layout is that of
``MissLinear`` (``tuners/miss/layer.py``, peft 0.21.2); ``init_weights`` says which of its three
forms it is: ``mini`` repeats the block over the outputs, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Additive, Edit, Target
from edgellm.lora.factors import kept, row_product
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.tensors import Array, TensorRef

PART = "miss_block"


@dataclass(frozen=True)
class Repeated(Additive):
    """``block`` ``[r, outputs]``, added over and over: input ``j`` of output ``o`` gets
    ``block[j % r, o % outputs]``.
    """

    block: TensorRef
    into: int
    scale: ClassVar[float] = 1.0

    @property
    def rank(self) -> int:
        return self.block.shape[0]

    def delta(self, start: int, stop: int) -> Array:
        block = kept.get(self, self.block.load)
        outputs = np.arange(start, stop) % block.shape[1]
        inputs = np.arange(self.into) % block.shape[0]
        return np.ascontiguousarray(block[:, outputs].T[:, inputs])


@dataclass(frozen=True)
class BlockAffine:
    """``W + W B + B``, block by block: ``blocks`` ``[out / r, r, r]`` has one for ``r`` outputs."""

    blocks: TensorRef
    scale: ClassVar[float] = 1.0
    rank: ClassVar[int] = 0

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        size, columns = self.blocks.shape[-1], rows.shape[1]
        for index in range(start // size, -(-stop // size)):
            first, last = max(start, index * size), min(stop, (index + 1) * size)
            block = self.blocks.load(index, index + 1).reshape(size, size)
            own = rows[first - start : last - start]
            pieces = own.reshape(-1, size)
            # A row of the weight is cut into columns / size rows, which all meet this block.
            begin = first * (columns // size)
            change = row_product(pieces, block, begin)
            change = change.reshape(len(own), columns // size, size)
            change += block[first - index * size : last - index * size, None, :]
            own += np.float32(weight) * change.reshape(len(own), columns)
        return rows


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Edit:
    """The change of ``target`` by MiSS; raises ``AdapterError`` for what does not fit."""
    out, into = linear(target, "MiSS")
    (block,) = exactly(target, parts, PART)
    rank, form = int(config.get("r", 64)), config.get("init_weights", True)
    outputs = int(config.get("mini_r", 1)) if form == "mini" else out
    if out % outputs or (form == "bat" and (out % rank or into % rank)):
        raise AdapterError(
            f"{target.name} {list(target.shape)} cannot be cut into the blocks that init_weights "
            f"{form!r}, r {rank} and mini_r {config.get('mini_r')} of adapter_config.json ask for: "
            "the adapter was trained on another model, or the config belongs to another adapter"
        )
    if form == "bat":
        return BlockAffine(shaped(target, PART, block, (out // rank, rank, rank)))
    return Repeated(shaped(target, PART, block, (rank, outputs)), into)
