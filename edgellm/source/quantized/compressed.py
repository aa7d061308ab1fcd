"""compressed-tensors: integers of 4 or 8 bits, packed into words or stored as signed bytes.

``pack-quantized`` keeps a weight ``[out, in]`` as ``weight_packed`` (words along a row, codes less
the smallest integer), ``weight_shape``, ``weight_scale`` ``[out, groups]`` and, where it is not
symmetric, ``weight_zero_point`` (words down a column). ``int-quantized`` has ``weight`` in signed
bytes and the same scales and zeros, these as bytes.

Values are those of the library's ``dequantize`` (0.20): the step times the scale, rounded to the
dtype of the scales. What it does to activations on the way is not part of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import SourceError, UnsupportedModel
from edgellm.quant import floats
from edgellm.quant.stored import StoredCodes
from edgellm.source.quantized.groups import (
    SCALE_DTYPES,
    WORD_BITS,
    Codes,
    misfit,
    part,
    unpack_columns,
    unpack_rows,
)
from edgellm.source.safetensors_file import ITEM_BYTES, RawTensor
from edgellm.tensors import Array, TensorRef

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
"""Formats of integers, and the names that mix them with others, which are found by their parts."""

BITS = (4, 8)

PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
)  # fmt: skip

FOREIGN = ("weight_global_scale", "input_scale", "input_global_scale", "input_zero_point")
"""Parts that say that more is done than a weight's integers can tell."""

SIGN = np.uint8(128)
"""Flipped, a signed byte counts from 0: as packed codes do."""

Steps = npt.NDArray[np.int16]


def read(
    raw: Mapping[str, RawTensor], settings: Mapping[str, Any], where: str
) -> dict[str, TensorRef]:
    """Every tensor by its full-precision name; ``settings`` is the ``quantization_config``.

    Raises ``UnsupportedModel`` for formats of floats, for rotations, sparse weights and activations
    with fixed scales, ``SourceError`` for parts that are missing or do not fit together.
    """
    layout = str(settings.get("format") or "dense").lower()
    if layout not in FORMATS:
        raise _unsupported(
            where, f"in the format {layout!r}, and edgellm reads {FORMATS[0]} and {FORMATS[1]}"
        )
    for key in ("sparsity_config", "transform_config"):
        if settings.get(key):
            raise _unsupported(where, f"with a {key}, which changes what the weights mean")
    foreign = [name for name in raw if name.rpartition(".")[2] in FOREIGN]
    if foreign:
        raise _unsupported(where, f"and {foreign[0]} says that it takes more than integer weights")
    modules = [name.removesuffix(".weight_scale") for name in raw if name.endswith(".weight_scale")]
    taken = {f"{module}.{each}" for module in modules for each in PARTS}
    found = {f"{module}.weight": _weight(raw, module, where) for module in modules}
    return found | {name: tensor.ref() for name, tensor in raw.items() if name not in taken}


@dataclass(frozen=True)
class Weight:
    """``scale[group[i]] * (code[i] - zero[group[i]])``, rounded to the dtype of the scales.

    ``codes(start, stop)`` are uint8 ``[stop - start, in]``, ``zeros(start, stop)`` int16
    ``[stop - start, groups]``; ``order`` gives each input's group where they are not in order.
    """

    name: str
    bits: int
    rows: int
    columns: int
    groups: int
    codes: Callable[[int, int], Codes]
    zeros: Callable[[int, int], Steps]
    scales: RawTensor
    order: RawTensor | None

    def stored(self) -> StoredCodes:
        """The codes, and what loads the values."""
        return StoredCodes(
            values=self.load_rows,
            rows=self.rows,
            bits=self.bits,
            codes=self.codes,
            scales=self._scales,
            zeros=self.zeros,
            groups=self._group,
        )

    def load_rows(self, start: int, stop: int) -> Array:
        group = self._group()
        values = (self.codes(start, stop) - self.zeros(start, stop)[:, group]).astype(np.float32)
        values *= self._scales(start, stop)[:, group]
        return np.ascontiguousarray(floats.rounded(values, SCALE_DTYPES[self.scales.dtype]))

    def _scales(self, start: int, stop: int) -> Array:
        dtype = self.scales.dtype
        if math.prod(self.scales.shape) == 1:  # one for the whole tensor
            return np.repeat(
                floats.decode(self.scales.read(), SCALE_DTYPES[dtype]).reshape(1, 1),
                stop - start,
                0,
            )
        row_bytes = self.groups * ITEM_BYTES[dtype]
        raw = self.scales.read(start * row_bytes, stop * row_bytes)
        return floats.decode(raw.reshape(stop - start, -1), SCALE_DTYPES[dtype])

    def _group(self) -> npt.NDArray[np.intp]:
        """The group of each input. Raises ``SourceError`` for one that does not exist."""
        in_order = np.arange(self.columns) // (self.columns // self.groups)
        if self.order is None:
            return in_order
        group = self.order.read().view("<i4" if self.order.dtype == "I32" else "<i8")
        if (group == -1).all():  # as the library leaves it where nothing was reordered
            return in_order
        if len(group) != self.columns or group.min() < 0 or group.max() >= self.groups:
            raise SourceError(
                f"{self.name}.weight_g_idx names groups {group.min()} to {group.max()} and there "
                f"are {self.groups}: the file is damaged; fetch it again"
            )
        return group.astype(np.intp)


def _weight(raw: Mapping[str, RawTensor], module: str, where: str) -> TensorRef:
    scales = raw[f"{module}.weight_scale"]
    if scales.dtype not in SCALE_DTYPES:
        raise _unsupported(where, f"with scales of {module} in {scales.dtype}")
    packed = f"{module}.weight_packed" in raw
    name, dtype = ("weight_packed", "I32") if packed else ("weight", "I8")
    stored = part(raw, module, name, dtype, where)
    zeros = raw.get(f"{module}.weight_zero_point")
    if len(stored.shape) != 2:
        raise misfit(where, module, weight=stored.shape)
    rows, columns = _shape(raw, module, where) if packed else stored.shape
    groups = scales.shape[-1] if math.prod(scales.shape) > 1 else 1
    bits = stored.shape[-1] * WORD_BITS // max(1, columns) if packed else 8
    shapes = {"weight": stored.shape, "weight_scale": scales.shape}
    if zeros is not None:
        shapes["weight_zero_point"] = zeros.shape
    if packed and bits not in BITS:
        raise _unsupported(where, f"to {bits} bits ({module}), and edgellm reads 4 and 8")
    if (
        stored.shape[0] != rows
        or columns < 1
        or columns % max(1, groups)
        or (packed and stored.shape[1] * WORD_BITS != columns * bits)
        or (math.prod(scales.shape) > 1 and scales.shape != (rows, groups))
        or (zeros is not None and zeros.shape != _zeros_shape(rows, groups, bits, packed=packed))
        or (zeros is not None and zeros.dtype != ("I32" if packed else "I8"))
    ):
        raise misfit(where, module, shape=(rows, columns), **shapes)

    def codes(start: int, stop: int) -> Codes:
        row_bytes = stored.shape[1] * ITEM_BYTES[stored.dtype]
        content = stored.read(start * row_bytes, stop * row_bytes).reshape(stop - start, -1)
        return unpack_columns(content.view("<u4"), bits) if packed else content ^ SIGN

    def zeros_of(start: int, stop: int) -> Steps:
        if zeros is None:
            return np.full((stop - start, groups), 2 ** (bits - 1), np.int16)
        if not packed:
            return (zeros.read().reshape(zeros.shape)[start:stop] ^ SIGN).astype(np.int16)
        words = zeros.read().view("<u4").reshape(zeros.shape)
        return unpack_rows(words, bits)[start:stop].astype(np.int16)

    name = f"{module}.weight"
    order = raw.get(f"{module}.weight_g_idx")
    weight = Weight(
        f"{where}: {module}", bits, rows, columns, groups, codes, zeros_of, scales, order
    )
    return TensorRef(
        name, name, (rows, columns), f"ct-{bits}bit", stored.stored.nbytes, weight.stored()
    )


def _shape(raw: Mapping[str, RawTensor], module: str, where: str) -> tuple[int, int]:
    """``weight_shape``: rows and columns before they were packed."""
    found = raw.get(f"{module}.weight_shape")
    dtype = "I32" if found is not None and found.dtype == "I32" else "I64"
    stored = part(raw, module, "weight_shape", dtype, where)
    if stored.shape != (2,):
        raise misfit(where, module, weight_shape=stored.shape)
    rows, columns = stored.read().view("<i4" if dtype == "I32" else "<i8").tolist()
    return rows, columns


def _zeros_shape(rows: int, groups: int, bits: int, *, packed: bool) -> tuple[int, int]:
    return (-(-rows * bits // WORD_BITS) if packed else rows, groups)


def _unsupported(where: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where} is quantized by compressed-tensors {what}: convert the model that it was made "
        "from, or load it with transformers' CompressedTensorsConfig(dequantize=True) and save it"
    )
