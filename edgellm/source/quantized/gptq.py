"""GPTQ checkpoints: ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of each linear weight.

Values are those of gptqmodel's ``dequantize_weight`` (7.x; AutoGPTQ's before it): the step times
the f16 scale, rounded to f16. Version 1 of the format (``checkpoint_format: gptq``) stores each
zero less one, version 2 (``gptq_v2``) as it is. As in gptqmodel (``convert_gptq_v1_to_v2_format``)
the one is added to whole words of 2, 4 and 8 bits, so that a zero of 0 that borrowed from its
neighbour when it was saved comes back right, and to each zero of 3 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import SourceError, UnsupportedModel
from edgellm.source.quantized.groups import (
    BITS,
    WORD_BITS,
    Codes,
    Grouped,
    misfit,
    part,
    read_modules,
    unpack_columns,
    unpack_rows,
)
from edgellm.source.safetensors_file import RawTensor
from edgellm.tensors import TensorRef

FORMATS = ("gptq", "gptq_v2")
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read(
    raw: Mapping[str, RawTensor], settings: Mapping[str, Any], where: str
) -> dict[str, TensorRef]:
    """Every tensor by its full-precision name; ``settings`` is the ``quantization_config``.

    Raises ``UnsupportedModel`` for a layout made for one kernel (marlin, bitblas), ``SourceError``
    for parts that are missing or do not fit together.
    """
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if settings.get("is_marlin_format"):
        layout = "marlin"
    if layout not in FORMATS:
        raise UnsupportedModel(
            f"{where} is quantized by GPTQ in the layout {layout!r}, made for one kernel; edgellm "
            f"reads {' and '.join(FORMATS)}: convert the model that it was made from"
        )
    return read_modules(raw, PARTS, lambda module: _weight(raw, module, settings, layout, where))


def _weight(
    raw: Mapping[str, RawTensor], module: str, settings: Mapping[str, Any], layout: str, where: str
) -> TensorRef:
    qweight = part(raw, module, "qweight", "I32", where)
    qzeros = part(raw, module, "qzeros", "I32", where)
    scales = part(raw, module, "scales", "F16", where)
    order = raw.get(f"{module}.g_idx")
    shapes = {"qweight": qweight.shape, "qzeros": qzeros.shape, "scales": scales.shape}
    if not len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2:
        raise misfit(where, module, **shapes)
    words, outputs = qweight.shape
    inputs = order.shape[0] if order else words * WORD_BITS // _bits(settings, where)
    bits = words * WORD_BITS // max(1, inputs)
    groups = scales.shape[0]
    if (
        bits not in BITS
        or words * WORD_BITS != inputs * bits
        or scales.shape != (groups, outputs)
        or qzeros.shape != (groups, math.ceil(outputs * bits / WORD_BITS))
        or (bits == 3 and outputs % WORD_BITS)
    ):
        raise misfit(where, module, inputs=(inputs,), **shapes)
    weight = Weight(
        f"{where}: {module}", qweight, qzeros, order, bits, inputs, groups, layout == "gptq"
    )
    grouped = Grouped(bits, weight.codes, weight.zeros, scales, weight.group)
    name = f"{module}.weight"
    return TensorRef(
        name,
        name,
        (outputs, inputs),
        f"gptq-{bits}bit",
        qweight.stored.nbytes,
        grouped.rows(),
    )


def _bits(settings: Mapping[str, Any], where: str) -> int:
    bits = settings.get("bits")
    if bits not in BITS:
        raise UnsupportedModel(
            f"{where} is quantized by GPTQ to {bits!r} bits; edgellm reads "
            f"{', '.join(map(str, BITS))}: convert the model that it was made from"
        )
    return int(bits)


@dataclass(frozen=True)
class Weight:
    """The codes, zeros and order of groups of one weight, read where they are wanted."""

    name: str
    qweight: RawTensor
    qzeros: RawTensor
    order: RawTensor | None
    bits: int
    inputs: int
    groups: int
    stored_less_one: bool

    def codes(self, start: int, stop: int) -> Codes:
        """uint8 ``[in, stop - start]``."""
        return unpack_rows(self.qweight.read_columns(start, stop).view("<u4"), self.bits)

    def zeros(self, start: int, stop: int) -> npt.NDArray[np.int16]:
        """int16 ``[groups, stop - start]``; read whole, they are small."""
        words = self.qzeros.read().view("<u4").reshape(self.qzeros.shape)
        if self.stored_less_one and self.bits != 3:
            words = words + np.uint32(sum(1 << place for place in range(0, WORD_BITS, self.bits)))
        zeros = unpack_columns(words, self.bits)[:, start:stop]
        if self.stored_less_one and self.bits == 3:
            zeros = (zeros + np.uint8(1)) & np.uint8(7)
        return zeros.astype(np.int16)

    def group(self) -> npt.NDArray[np.intp]:
        """The group of each input. Raises ``SourceError`` for one that does not exist."""
        if self.order is None:
            size = -(-self.inputs // self.groups)
            return np.arange(self.inputs) // size
        group = self.order.read().view("<i4" if self.order.dtype == "I32" else "<i8")
        if len(group) != self.inputs or group.min() < 0 or group.max() >= self.groups:
            raise SourceError(
                f"{self.name}.g_idx names groups {group.min()} to {group.max()} "
                f"and there are {self.groups}: the file is damaged; fetch it again"
            )
        return group.astype(np.intp)
