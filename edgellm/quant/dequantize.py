"""The values that a rounded tensor stands for: what every reader of every container must get."""

from __future__ import annotations

import numpy as np

from edgellm.errors import UnsupportedTarget
from edgellm.quant.grid import QTensor
from edgellm.quant.nf4 import LEVELS
from edgellm.tensors import Array


def dequantize(tensor: QTensor) -> Array:
    """Values float32 ``[rows, columns]`` of codes on an affine, per-channel or nf4 grid.

    Raises ``UnsupportedTarget`` for tensors that hold finished ggml blocks or floats.
    """
    if tensor.codes is None or tensor.scales is None:
        raise UnsupportedTarget(f"{tensor.grid.name} holds finished blocks, not codes")
    rows, columns = tensor.codes.shape
    codes = tensor.codes.reshape(rows, tensor.scales.shape[1], -1)
    scales = tensor.scales[:, :, None]
    if tensor.grid.kind == "codebook":
        return (LEVELS[codes] * scales).reshape(rows, columns)
    if tensor.zeros is None:
        zeros = np.float32(2 ** (int(tensor.grid.bits) - 1))
        return ((codes.astype(np.float32) - zeros) * scales).reshape(rows, columns)
    zeros_by_block = tensor.zeros[:, :, None].astype(np.float32)
    return ((codes.astype(np.float32) - zeros_by_block) * scales).reshape(rows, columns)
