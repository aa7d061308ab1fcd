"""(IA)^3: each output of a layer, or each input of a feed-forward one, times a learnt number.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3: keys, values and the inner
activations of the feed-forward network. PEFT (``tuners/ia3/layer.py``, ``Linear.merge``, peft
0.21.2) multiplies the columns of ``[out, in]`` for ``feedforward_modules``, and for the others the
rows and the bias; a layer's bias comes to ``bind`` as a target of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Edit, Target
from edgellm.lora.kinds.multiplying import Multiplying
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.tensors import Array, TensorRef

PART = "ia3_l"


@dataclass(frozen=True)
class Scaling(Multiplying):
    """``rows * vector``: one number for each row of the weight, or for each column.

    A bias is one row, as wide as the layer has outputs.
    """

    kind: ClassVar[str] = "IA3"
    vector: TensorRef
    by_rows: bool
    name: str

    def multiplied(self, rows: Array, start: int, stop: int) -> Array:
        rows *= self.numbers(start, stop)
        return rows

    def numbers(self, start: int, stop: int) -> Array:
        """What rows ``start:stop`` are multiplied by: ``[stop - start, 1]`` or ``[1, columns]``."""
        vector = self.vector.load().reshape(-1)
        return vector[start:stop, None] if self.by_rows else vector[None, :]


@dataclass(frozen=True)
class WeightedScaling(Multiplying):
    """Several scalings as one, ``rows * sum(weight * vector)``: what PEFT makes of them.

    ``IA3Model.add_weighted_adapter`` sums the vectors themselves, so weights that do not sum to 1
    make the layer weaker or stronger as a whole.
    """

    kind: ClassVar[str] = "IA3"
    scalings: Sequence[Scaling]
    weights: Sequence[float]
    name: str

    def multiplied(self, rows: Array, start: int, stop: int) -> Array:
        vectors = [each.numbers(start, stop) for each in self.scalings]
        total = np.zeros_like(vectors[0])
        for vector, weight in zip(vectors, self.weights, strict=True):
            total += vector * np.float32(weight)
        rows *= total
        return rows


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


def weighted(edits: Sequence[Edit | None], weights: Sequence[float], name: str) -> WeightedScaling:
    """The scalings of weight ``name`` by several adapters as one; None where one leaves it alone.

    Raises ``AdapterError`` where not all are scalings of one side. PEFT takes a vector of zeros
    for an adapter without one, which would switch off a part of the layer; that is refused, too.
    """
    scalings = [edit for edit in edits if isinstance(edit, Scaling)]
    if len(scalings) < len(edits) or len({each.by_rows for each in scalings}) > 1:
        raise AdapterError(
            f"{name}: IA3 adapters have a weighted sum where each of them scales the same side of "
            "the same weights, and here they do not: merge one, then the other into the result"
        )
    return WeightedScaling(scalings, weights, name)


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
