"""MLX's affine groups: codes low first in words, and by group a scale and a bias.

A value is ``code * scale + bias`` (``mlx.core.quantize``, MLX 0.32): the bias of a grid around zero
is the value of its lowest code, exact in the dtype of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgellm.errors import TensorError
from edgellm.export.packing_onnx import each_code, low_first
from edgellm.quant import floats
from edgellm.quant.grid import Grid, QTensor

Bytes = npt.NDArray[np.uint8]


def row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row: codes, scales, biases."""
    by_group = columns // grid.block * (4 if grid.scale_dtype == "f32" else 2)
    return {"data": columns * int(grid.bits) // 8, "scales": by_group, "biases": by_group}


def pack(tensor: QTensor) -> Mapping[str, Bytes]:
    """Codes, scales and biases by rows. Raises ``TensorError`` for a bias out of the dtype's reach.

    The solver must have rounded scales and minima to the grid's ``scale_dtype``.
    """
    assert tensor.codes is not None
    assert tensor.scales is not None
    biases = tensor.mins
    if biases is None:
        biases = tensor.scales * -_middle(tensor.grid)
    return {
        "data": low_first(tensor.codes, int(tensor.grid.bits)),
        "scales": _stored(tensor.scales, tensor.grid),
        "biases": _stored(biases, tensor.grid),
    }


def unpack(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack``."""
    bits = int(grid.bits)
    data = components["data"].reshape(-1, columns * bits // 8)
    scales, biases = (
        floats.decode(components[name].reshape(len(data), -1), grid.scale_dtype)
        for name in ("scales", "biases")
    )
    return QTensor(
        grid,
        columns,
        codes=each_code(data, bits, columns),
        scales=scales,
        mins=biases if grid.minima else None,
    )


def _middle(grid: Grid) -> np.float32:
    return np.float32(2 ** (int(grid.bits) - 1))


def _stored(values: npt.NDArray[np.float32], grid: Grid) -> Bytes:
    stored: Bytes = floats.ENCODERS[grid.scale_dtype](np.ascontiguousarray(values))
    if not np.array_equal(floats.decode(stored, grid.scale_dtype), values):
        raise TensorError(
            f"scales of {grid.name} leave the reach of {grid.scale_dtype}, so that they would be "
            "stored as other numbers: choose another grid, or --format gguf"
        )
    return stored
