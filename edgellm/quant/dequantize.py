"""The values that a rounded tensor stands for: what every reader of every container must get."""

from __future__ import annotations

from edgellm.errors import UnsupportedTarget
from edgellm.quant.grid import QTensor
from edgellm.quant.levels import levels_of
from edgellm.tensors import Array


def dequantize(tensor: QTensor) -> Array:
    """Values float32 ``[rows, columns]`` of codes on any grid whose codes stand for one value each.

    Steps and rounding are those of the readers (gguf's numpy for ggml's blocks). Raises
    ``UnsupportedTarget`` for tensors that hold finished blocks or floats.
    """
    if tensor.codes is None or tensor.scales is None:
        raise UnsupportedTarget(f"{tensor.grid.name} holds finished blocks, not codes")
    rows, columns = tensor.codes.shape
    groups = tensor.scales.shape[1]
    values = levels_of(tensor.grid)[tensor.codes].reshape(rows, groups, -1)
    if tensor.zeros is not None:
        values -= tensor.zeros[:, :, None]
    values *= tensor.scales[:, :, None]
    if tensor.mins is not None:
        values += tensor.mins[:, :, None]
    return values.reshape(rows, columns)
