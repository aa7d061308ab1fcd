"""LLM.int8() weights: signed bytes and the largest magnitude of each row (arXiv 2208.07339).

Equal to bitsandbytes' ``int8_vectorwise_quant`` and ``int8_vectorwise_dequant`` (0.50). Only
weights: its products round the activations too, which no merge can follow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm.quant.floats import rounded
from edgellm.tensors import Array

STEP = np.float32(7.874015718698502e-3)
"""1/127 as the reference writes it."""


def quantize(rows: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """``(codes, absmax)`` of rows float32 ``[rows, columns]``, which are rounded to f16 first.

    A value half way between two codes falls as in the reference, which multiplies by 127 times the
    inverse; a GPU's own division may differ there. Raises ``TensorError`` for a value that f16
    cannot hold.
    """
    halves = rounded(rows, "f16")
    absmax = np.abs(halves).max(axis=1, initial=0)
    inverse = np.zeros_like(absmax)
    np.divide(np.float32(1), absmax, out=inverse, where=absmax > 0)
    scale = inverse * np.float32(127)
    return np.rint(halves * scale[:, None]).astype(np.int8), absmax


def dequantize(codes: npt.NDArray[np.int8], absmax: Array) -> Array:
    """``codes * absmax / 127`` in float32 ``[rows, columns]``."""
    values: Array = codes * absmax[:, None]
    values *= STEP
    return values
