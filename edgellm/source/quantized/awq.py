"""AWQ checkpoints of the ``gemm`` layout: ``qweight``, ``qzeros`` and ``scales`` of each weight.

Values are those of AutoAWQ's ``dequantize_gemm`` (0.2.9): the step times the f16 scale, rounded to
f16. A word holds eight outputs in the order 0 2 4 6 1 3 5 7 (``AWQ_ORDER``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnsupportedModel
from edgellm.source.quantized.groups import Codes, Grouped, Words, misfit, part, read_modules
from edgellm.source.safetensors_file import RawTensor
from edgellm.tensors import TensorRef

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of a word belong to, lowest first."""

PARTS = ("qweight", "qzeros", "scales")


def read(
    raw: Mapping[str, RawTensor], settings: Mapping[str, Any], where: str
) -> dict[str, TensorRef]:
    """Every tensor by its full-precision name; ``settings`` is the ``quantization_config``.

    Raises ``UnsupportedModel`` for another layout or other bits, ``SourceError`` for parts that are
    missing or do not fit together.
    """
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if layout != "gemm" or bits != BITS:
        raise UnsupportedModel(
            f"{where} is quantized by AWQ in the layout {layout!r} with {bits} bits; edgellm reads "
            f"'gemm' with {BITS}: convert the model that it was made from"
        )
    return read_modules(raw, PARTS, lambda module: _weight(raw, module, where))


def _weight(raw: Mapping[str, RawTensor], module: str, where: str) -> TensorRef:
    qweight = part(raw, module, "qweight", "I32", where)
    qzeros = part(raw, module, "qzeros", "I32", where)
    scales = part(raw, module, "scales", "F16", where)
    shapes = {"qweight": qweight.shape, "qzeros": qzeros.shape, "scales": scales.shape}
    if not len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2:
        raise misfit(where, module, **shapes)
    inputs, words = qweight.shape
    groups, outputs = scales.shape
    if outputs != words * PER_WORD or qzeros.shape != (groups, words) or inputs % max(1, groups):
        raise misfit(where, module, **shapes)

    def codes(start: int, stop: int) -> Codes:
        low, high = start // PER_WORD, -(-stop // PER_WORD)
        cut = slice(start - low * PER_WORD, stop - low * PER_WORD)
        return _unpack(qweight.read_columns(low, high).view("<u4"))[:, cut]

    def zeros(start: int, stop: int) -> npt.NDArray[np.int16]:
        words = qzeros.read().view("<u4").reshape(qzeros.shape)
        return _unpack(words)[:, start:stop].astype(np.int16)

    def group() -> npt.NDArray[np.intp]:
        return np.arange(inputs) // (inputs // groups)

    grouped = Grouped(BITS, codes, zeros, scales, group)
    name = f"{module}.weight"
    return TensorRef(
        name, name, (outputs, inputs), "awq-4bit", qweight.stored.nbytes, grouped.rows()
    )


def _unpack(words: Words) -> Codes:
    """uint32 ``[rows, n]`` to uint8 ``[rows, 8 * n]``, outputs in their own order."""
    codes = np.empty((*words.shape, PER_WORD), np.uint8)
    for place, output in enumerate(ORDER):
        codes[:, :, output] = (words >> np.uint32(BITS * place)) & np.uint32(15)
    return codes.reshape(len(words), -1)
