"""Trainable tokens: a few rows of the embedding are trained whole, the others stay as they are.

PEFT's own method (``TrainableTokensLayer.get_merged_weights``, peft 0.21.2). What it stores as
``trainable_tokens_delta`` are the new rows themselves, not their difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import AdapterError
from edgellm.lora.edit import Edit, Target
from edgellm.tensors import Array, TensorRef

PART = "trainable_tokens_delta"


@dataclass(frozen=True)
class TokenRows:
    """Rows ``indices`` (ascending) of a table become those of ``values``, at places ``order``."""

    values: TensorRef
    indices: npt.NDArray[np.intp]
    order: npt.NDArray[np.intp]

    @property
    def rank(self) -> int:
        return 0

    @property
    def scale(self) -> float:
        return 1.0

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        first, last = np.searchsorted(self.indices, (start, stop))
        for index, place in zip(self.indices[first:last], self.order[first:last], strict=True):
            row, new = rows[index - start], self.values.load(int(place), int(place) + 1)[0]
            rows[index - start] = new if weight == 1.0 else row + weight * (new - row)
        return rows


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Edit:
    """The new rows of ``target``; raises ``AdapterError`` where they do not fit."""
    if list(parts) != [PART]:
        raise AdapterError(
            f"{target.name}: the adapter holds {', '.join(parts)} for it, and {PART} alone is "
            "allowed: it is damaged; save it again"
        )
    return token_rows(target, parts[PART], config["token_indices"])


def token_rows(target: Target, values: TensorRef, indices: Sequence[int]) -> TokenRows:
    """``values`` ``[n, width]`` as rows ``indices`` of ``target``.

    Raises ``AdapterError`` for shapes that do not fit, and tokens that are not there or come twice.
    """
    if values.shape != (len(indices), *target.shape[1:]):
        raise AdapterError(
            f"{target.name}: {PART} has shape {list(values.shape)}, and {len(indices)} tokens of "
            f"width {target.shape[-1]} are needed: config and weights belong to different "
            "adapters, or to another base"
        )
    beyond = [index for index in indices if index >= target.shape[0]]
    if beyond or len(set(indices)) != len(indices):
        what = f"token {beyond[0]}" if beyond else "a token twice"
        raise AdapterError(
            f"{target.name} has {target.shape[0]} rows and the adapter trains {what}: it belongs "
            "to another base, or the vocabulary was resized; name its own base"
        )
    order = np.argsort(np.asarray(indices, dtype=np.intp))
    return TokenRows(values, np.asarray(indices, dtype=np.intp)[order], order)
