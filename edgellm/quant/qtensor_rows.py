"""Rows of a rounded tensor taken out, and tensors laid one below the other."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.quant.grid import QTensor, SuperBlocks


def rows_of(tensor: QTensor, rows: slice | npt.NDArray[np.integer[Any]]) -> QTensor:
    """The rows ``rows`` of ``tensor``, in that order."""
    supers = tensor.supers
    return replace(
        tensor,
        **{name: value[rows] for name, value in _arrays(tensor).items()},
        supers=None
        if supers is None
        else replace(supers, **{name: value[rows] for name, value in _arrays(supers).items()}),
    )


def stacked(tensors: list[QTensor]) -> QTensor:
    """``tensors`` of one grid laid one below the other."""
    first = tensors[0]
    if len(tensors) == 1:
        return first

    def joined(parts: list[QTensor] | list[SuperBlocks]) -> dict[str, Any]:
        found = [_arrays(part) for part in parts]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    supers = [each.supers for each in tensors if each.supers is not None]
    return replace(
        first,
        **joined(tensors),
        supers=replace(supers[0], **joined(supers)) if supers else None,
    )


def _arrays(tensor: QTensor | SuperBlocks) -> dict[str, Any]:
    found = {each.name: getattr(tensor, each.name) for each in fields(tensor)}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
