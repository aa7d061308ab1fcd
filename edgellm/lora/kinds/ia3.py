"""(IA)^3: each output of a layer, or each input of a feed-forward one, times a learnt number.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3: keys, values and the inner
activations of the feed-forward network. PEFT (``tuners/ia3/layer.py``, ``Linear.merge``, peft
0.21.2) multiplies the columns of ``[out, in]`` for ``feedforward_modules``, and for the others the
rows and the bias; a layer's bias comes to ``bind`` as a target of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Target
from edgellm.lora.kinds.parts import exactly, linear, only_whole, shaped
from edgellm.tensors import Array, TensorRef

PART = "ia3_l"


@dataclass(frozen=True)
class Scaling:
    """``rows * vector``: one number for each row of the weight, or for each column.

    A bias is one row, as wide as the layer has outputs.
    """

    vector: TensorRef
    by_rows: bool
    name: str
    rank: int = field(default=0, init=False)
    scale: float = field(default=1.0, init=False)

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        only_whole("IA3", self.name, weight)
        if weight:
            rows *= self.numbers(start, stop)
        return rows

    def numbers(self, start: int, stop: int) -> Array:
        """What rows ``start:stop`` are multiplied by: ``[stop - start, 1]`` or ``[1, columns]``."""
        vector = self.vector.load().reshape(-1)
        return vector[start:stop, None] if self.by_rows else vector[None, :]


@dataclass(frozen=True)
class WeightedScaling:
    """Several scalings as one, ``rows * sum(weight * vector)``: what PEFT makes of them.

    ``IA3Model.add_weighted_adapter`` sums the vectors themselves, so weights that do not sum to 1
    make the layer's output weaker or stronger as a whole.
    """

    scalings: Sequence[Scaling]
    weights: Sequence[float]
    rank: int = field(default=0, init=False)
    scale: float = field(default=1.0, init=False)

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        only_whole("IA3", self.scalings[0].name, weight)
        if weight:
            rows *= sum_of_numbers(self.scalings, self.weights, start, stop)
        return rows


def sum_of_numbers(
    scalings: Sequence[Scaling], weights: Sequence[float], start: int, stop: int
) -> Array:
    """``sum(weight * vector)`` of ``scalings``, in their order."""
    vectors = [each.numbers(start, stop) for each in scalings]
    total = np.zeros(vectors[0].shape, dtype=np.float32)
    for vector, weight in zip(vectors, weights, strict=True):
        total += vector * np.float32(weight)
    return total


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Scaling:
    """The scaling of ``target``, a weight or the bias of a layer that ``scales_outputs``.

    Raises ``AdapterError`` for a vector that does not fit, and where ``feedforward_modules``
    contradicts its shape.
    """
    (vector,) = exactly(target, parts, PART)
    if target.kind == "bias":
        shaped(target, PART, vector, (*target.shape, 1))
        return Scaling(vector, False, target.name)
    out, into = linear(target, "IA3", conv1d=True)
    shaped(target, PART, vector, (out, 1), (1, into))
    by_rows = scales_outputs(parts)
    _check_side(target, config.get("feedforward_modules"), by_rows)
    return Scaling(vector, by_rows, target.name)


def scales_outputs(parts: Mapping[str, TensorRef]) -> bool:
    """Whether ``parts`` scale a layer's outputs, and with them its bias."""
    return PART in parts and parts[PART].shape[-1:] == (1,)


def _check_side(target: Target, feedforward: Any, by_rows: bool) -> None:
    """``IA3Model._check_target_module_feedforward`` must agree with the stored shape."""
    if feedforward is None or 1 in target.shape:
        return
    module = target.name.removesuffix(".weight")
    if isinstance(feedforward, str):
        inputs = re.fullmatch(feedforward, module) is not None
    else:
        inputs = any(module.endswith(name) for name in feedforward)
    if inputs == by_rows:
        raise AdapterError(
            f"{target.name}: {PART} scales its {'outputs' if by_rows else 'inputs'}, and by "
            f"feedforward_modules of adapter_config.json it is "
            f"{'a' if inputs else 'no'} feed-forward layer: config and weights belong to different "
            "adapters; fetch both again"
        )
