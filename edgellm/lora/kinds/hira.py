"""HiRA: ``W + W * (B @ A)``, a low rank that multiplies the weight value by value.

Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS; ``get_delta_weight`` and
``_merge`` (``tuners/hira/layer.py``, peft 0.21.2). There is no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgellm.lora.edit import LowRank, Target
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.tensors import Array, TensorRef, transposed


@dataclass(frozen=True)
class HadamardOfWeight:
    """``W * (1 + B @ A)``: what is added depends on the weight, so it has no sum with others."""

    low_rank: LowRank
    scale: ClassVar[float] = 1.0

    @property
    def rank(self) -> int:
        return self.low_rank.rank

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        change = self.low_rank.delta(start, stop)
        change *= rows
        if weight != 1.0:
            change *= weight
        rows += change
        return rows


def bind(
    target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> HadamardOfWeight:
    """The change of ``target`` by HiRA; raises ``AdapterError`` for what does not fit.

    An embedding is taken as the linear layer that it is the transpose of, as LoRA does. The rank
    is that of the factors; nothing is scaled by it, and PEFT does not follow ``rank_pattern``.
    """
    if target.kind == "embedding":
        into, out = target.shape
        names = ("hira_embedding_A", "hira_embedding_B")
    else:
        out, into = linear(target, "HiRA", conv1d=True)
        names = ("hira_A", "hira_B")
    a, b = exactly(target, parts, *names)
    rank = a.shape[0]
    shaped(target, names[0], a, (rank, into))
    shaped(target, names[1], b, (out, rank))
    if target.kind == "embedding":
        return HadamardOfWeight(LowRank(transposed(b), transposed(a), 1.0))
    return HadamardOfWeight(LowRank(a, b, 1.0))
