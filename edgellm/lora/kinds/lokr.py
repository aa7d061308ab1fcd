"""LoKr: ``W + scale * kron(w1, w2)``, either factor whole or of low rank itself.

Yeh et al. 2023, https://arxiv.org/abs/2309.14859, "LoKr" (KronA, Edalati et al. 2022,
https://arxiv.org/abs/2212.10650, before it). Layout and scale are those of
``LoKrLayer.get_delta_weight`` (``tuners/lokr/layer.py``, peft 0.21.2): ``decompose_factor`` and
``decompose_both`` only choose the shapes, which the file shows; the scale is ``alpha / r`` even
where both factors are whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Additive, Target
from edgellm.lora.factors import kept, row_product
from edgellm.lora.kinds.lycoris import rank_and_scale
from edgellm.lora.kinds.parts import exactly, linear
from edgellm.tensors import Array, TensorRef

CONVOLUTION = "lokr_t2"


@dataclass(frozen=True)
class Factor:
    """One side of the Kronecker product: ``a``, or ``a @ b`` where there is a ``b``."""

    a: TensorRef
    b: TensorRef | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], (self.b or self.a).shape[1]

    def load(self, start: int, stop: int) -> Array:
        """Rows ``start:stop``, float32."""
        rows = self.a.load(start, stop)
        return rows if self.b is None else row_product(rows, kept.get(self, self.b.load), start)


@dataclass(frozen=True)
class Kronecker(Additive):
    """``scale * kron(left, right)``; ``left`` has the fewer, larger steps of a row."""

    left: Factor
    right: Factor
    scale: float

    @property
    def rank(self) -> int:
        """That of a Kronecker product: the product of what both sides can reach."""
        return _reach(self.left) * _reach(self.right)

    def delta(self, start: int, stop: int) -> Array:
        height = self.right.shape[0]
        first, last = start // height, -(-stop // height)
        left = self.left.load(first, last)
        # More than two rows of the left need the right side whole, which is then less than a slab.
        whole = self.right.load(0, height) if last - first > 2 else None
        change = np.empty((stop - start, self.left.shape[1], self.right.shape[1]), np.float32)
        for index in range(first, last):
            low, high = max(start - index * height, 0), min(stop - index * height, height)
            right = self.right.load(low, high) if whole is None else whole[low:high]
            place = index * height + low - start
            block = change[place : place + high - low]
            np.multiply(left[index - first][None, :, None], right[:, None, :], out=block)
        change *= self.scale
        return change.reshape(stop - start, -1)


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Kronecker:
    """The change of ``target`` by LoKr; raises ``AdapterError`` for what does not fit."""
    out, into = linear(target, "LoKr")
    rank, scale = rank_and_scale(target, config)
    if CONVOLUTION in parts:
        raise AdapterError(
            f"{target.name}: the adapter holds {CONVOLUTION} for it, which is for convolutions, "
            "and this is a linear layer: it belongs to another model; name its own base"
        )
    first, second = (
        (side,) if side in parts else (f"{side}_a", f"{side}_b") for side in ("lokr_w1", "lokr_w2")
    )
    refs = exactly(target, parts, *first, *second)
    left = _factor(target, first, refs[: len(first)], rank)
    right = _factor(target, second, refs[len(first) :], rank)
    product = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
    if product != (out, into):
        raise AdapterError(
            f"{target.name} {list(target.shape)}: the factors {list(left.shape)} and "
            f"{list(right.shape)} make a change of shape {list(product)}: the adapter was trained "
            "on another model; name its own base"
        )
    return Kronecker(left, right, scale)


def _factor(
    target: Target, names: tuple[str, ...], refs: tuple[TensorRef, ...], rank: int
) -> Factor:
    shapes = [ref.shape for ref in refs]
    matrices = all(len(shape) == 2 and 0 not in shape for shape in shapes)
    if not matrices or (len(refs) == 2 and (shapes[0][1], shapes[1][0]) != (rank, rank)):
        raise AdapterError(
            f"{target.name}: {' and '.join(names)} have the shapes "
            f"{' and '.join(str(list(shape)) for shape in shapes)}, and adapter_config.json gives "
            f"rank {rank} (r, rank_pattern): config and weights belong to different adapters, or "
            "the adapter is damaged; fetch both again"
        )
    return Factor(*refs)


def _reach(factor: Factor) -> int:
    """The rank that ``factor`` can have."""
    return min(*factor.shape, factor.a.shape[1])
