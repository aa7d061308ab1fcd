"""HRA: a layer's inputs mirrored by a chain of Householder reflections.

Yuan et al. 2024, https://arxiv.org/abs/2405.17484: ``W H_1 ... H_r`` with
``H = I - 2 u u^T``; with ``apply_GS`` the vectors are made orthogonal first
(``HRALinear.get_delta_weight``, ``tuners/hra/layer.py``, peft 0.21.2). ``hra_u`` is ``[in, r]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Target
from edgellm.lora.factors import by_tiles, kept
from edgellm.lora.kinds.multiplying import Multiplying
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.tensors import Array, TensorRef


@dataclass(frozen=True)
class Reflections(Multiplying):
    """``W`` times the reflections at ``vectors`` ``[in, r]``, the first one first."""

    kind: ClassVar[str] = "HRA"
    vectors: TensorRef
    orthogonal: bool
    name: str

    def multiplied(self, rows: Array, start: int, stop: int) -> Array:
        units = kept.get(self, self._units)

        def mirrored(tile: Array) -> Array:
            result = tile
            for unit in units:
                result = result - np.outer(2 * (result @ unit), unit)
            return result

        return by_tiles(rows, start, rows.shape[1], mirrored)

    def _units(self) -> Array:
        """The vectors at length 1, as rows; found in float64."""
        vectors = self.vectors.load().T.astype(np.float64)
        for index, vector in enumerate(vectors):
            if self.orthogonal:
                for before in vectors[:index]:
                    vector -= (before @ vector) * before
            length = np.linalg.norm(vector)
            if not length:
                raise AdapterError(
                    f"{self.name}: vector {index} of hra_u is all zeros and has no direction to "
                    "mirror at: the adapter is damaged; fetch it again"
                )
            vector /= length
        return vectors.astype(np.float32)


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Reflections:
    """The reflections of ``target``; raises ``AdapterError`` for what does not fit."""
    _, into = linear(target, "HRA")
    (vectors,) = exactly(target, parts, "hra_u")
    shaped(target, "hra_u", vectors, (into, int(config.get("r", 8))))
    return Reflections(vectors, bool(config.get("apply_GS")), target.name)
