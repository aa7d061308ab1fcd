"""The operations of the solver's kernels that numpy and torch spell apart; others are operators.

Kernels are written once, for numpy arrays and for torch tensors on any device. They are typed as
numpy's, whose operators, slices and methods ``sum``, ``reshape`` and ``swapaxes`` torch shares.
numpy computes as it would without this file, and in place where that saves a copy. torch is
imported by the first array that is moved to it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.quant import floats
from edgellm.tensors import Array

Mask = npt.NDArray[np.bool_]
Scalar = float | int | np.float32

LARGEST = {"f16": floats.LARGEST_F16, "bf16": floats.LARGEST_BF16}


def is_tensor(values: object) -> bool:
    """Whether ``values`` are torch's."""
    return not isinstance(values, np.ndarray)


def moved(values: npt.NDArray[Any], torch_device: str | None) -> Array:
    """numpy's ``values`` on torch's device of that name; as they are where that is None."""
    if torch_device is None:
        return values
    import torch

    tensor: Any = torch.from_numpy(np.ascontiguousarray(values)).to(torch_device)
    array: Array = tensor
    return array


def to_numpy(values: Array) -> Array:
    """``values`` in the process's memory, as numpy's."""
    held: Any = values
    array: Array = held.cpu().numpy() if is_tensor(values) else values
    return array


def copy(values: Array) -> Array:
    held: Any = values
    copied: Array = held.clone() if is_tensor(values) else values.copy()
    return copied


def empty_like(values: Array) -> Array:
    return _torch().empty_like(values) if is_tensor(values) else np.empty_like(values)


def zeros_like(values: Array) -> Array:
    return _torch().zeros_like(values) if is_tensor(values) else np.zeros_like(values)


def full_like(values: Array, value: float) -> Array:
    return _torch().full_like(values, value) if is_tensor(values) else np.full_like(values, value)


def subtract(values: Any, others: Array, out: Array) -> None:
    """Put ``values - others`` into ``out``, which may be either of them."""
    if isinstance(values, np.ndarray):
        np.subtract(values, others, out=out)
    else:
        _torch().sub(values, others, out=out)


def where(condition: Mask, values: Array | Scalar, others: Array | Scalar) -> Array:
    """``values`` where ``condition`` holds, else ``others``; one of them at least is an array."""
    found: Array = (_torch() if is_tensor(condition) else np).where(condition, values, others)
    return found


def quotient(above: Array | Scalar, below: Array, condition: Mask) -> Array:
    """``above / below`` where ``condition`` holds, 0 elsewhere."""
    quotients: Any = above / where(condition, below, 1.0)
    return where(condition, quotients, 0.0)


def repeat(values: Array, times: int) -> Array:
    """Each column of ``values`` ``[tiles, columns, rows]`` that many times."""
    if is_tensor(values):
        tensor: Array = _torch().repeat_interleave(values, times, dim=1)
        return tensor
    return np.repeat(values, times, axis=1)


def rounded(values: Array) -> Array:
    """``values`` to the nearest whole number, halves to the even one."""
    held: Any = values
    if is_tensor(values):
        tensor: Array = held.round()
        return tensor
    whole: Array = np.rint(values)
    return whole


def within(values: Array, lowest: Array | Scalar, highest: Array | Scalar) -> Array:
    """``values``, or the nearer bound; both bounds are numbers or both arrays."""
    held: Any = values
    if is_tensor(values):
        tensor: Array = held.clamp(lowest, highest)
        return tensor
    return np.clip(values, lowest, highest)


def round_within(values: Any, lowest: Array | Scalar, highest: Array | Scalar) -> None:
    """As ``rounded`` and then ``within``, in place."""
    if isinstance(values, np.ndarray):
        np.rint(values, out=values)
        np.maximum(values, lowest, out=values)
        np.minimum(values, highest, out=values)
    else:
        values.round_().clamp_(lowest, highest)


def nearest_entries(table: Array, borders: Array, values: Array) -> Array:
    """The entry of ``table`` nearest to each of ``values``; ``borders`` lie between entries."""
    if is_tensor(values):
        held: Any = values
        tensor: Array = table[_torch().searchsorted(borders, held.contiguous())]
        return tensor
    entries: Array = table[np.searchsorted(borders, values)]
    return entries


def as_stored(values: Array, dtype: str) -> Array:
    """``values`` as they come back after being stored as ``dtype``: f32, f16 or bf16.

    Beyond the largest of ``dtype`` they become that.
    """
    if dtype == "f32":
        return values
    values = within(values, -LARGEST[dtype], LARGEST[dtype])
    if is_tensor(values):
        held: Any = values
        tensor: Array = (held.half() if dtype == "f16" else held.bfloat16()).float()
        return tensor
    return (
        values.astype(np.float16).astype(np.float32)
        if dtype == "f16"
        else floats.rounded(values, dtype)
    )


def sums_by_row(values: Array, weighed: Array) -> Array:
    """The sum of ``values * weighed`` over each row of both ``[rows, columns]``, as numpy's."""
    return to_numpy((_torch() if is_tensor(values) else np).einsum("ij,ij->i", weighed, values))


def _torch() -> Any:
    return sys.modules["torch"]
