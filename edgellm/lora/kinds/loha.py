"""LoHa: ``W + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``, a product value by value of two low ranks.

FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098, proposition 1, as LyCORIS uses it
(Yeh et al. 2023, https://arxiv.org/abs/2309.14859, "LoHa"). Layout and scale are those of
``LoHaLayer.get_delta_weight`` (``tuners/loha/layer.py``, peft 0.21.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.lora.edit import Additive, Target
from edgellm.lora.factors import kept, row_product
from edgellm.lora.kinds.lycoris import rank_and_scale
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.tensors import Array, TensorRef

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class Hadamard(Additive):
    """``left`` are both ``[out, rank]``, ``right`` both ``[rank, in]``."""

    left: tuple[TensorRef, TensorRef]
    right: tuple[TensorRef, TensorRef]
    scale: float

    @property
    def rank(self) -> int:
        """The square of the factors' own rank, which is what their product can reach."""
        return self.right[0].shape[0] ** 2

    def delta(self, start: int, stop: int) -> Array:
        first, second = self._right_values()
        change = row_product(self.left[0].load(start, stop), first, start)
        change *= row_product(self.left[1].load(start, stop), second, start)
        change *= self.scale
        return change

    def _right_values(self) -> tuple[Array, Array]:
        both = kept.get(self, lambda: np.concatenate([each.load() for each in self.right]))
        rank = self.right[0].shape[0]
        return both[:rank], both[rank:]


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Hadamard:
    """The change of ``target`` by LoHa; raises ``AdapterError`` for what does not fit.

    Factors with ``hada_t1`` and ``hada_t2`` are of convolutions, and refused.
    """
    out, into = linear(target, "LoHa")
    rank, scale = rank_and_scale(target, config)
    refs = exactly(target, parts, *PARTS)
    shapes = ((out, rank), (rank, into)) * 2
    w1_a, w1_b, w2_a, w2_b = (
        shaped(target, part, ref, shape)
        for part, ref, shape in zip(PARTS, refs, shapes, strict=True)
    )
    return Hadamard((w1_a, w2_a), (w1_b, w2_b), scale)
