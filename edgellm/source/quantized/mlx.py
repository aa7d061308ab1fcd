"""MLX folders: ``weight`` in words, ``scales`` and ``biases`` of each linear layer and embedding.

Values are ``code * scale + bias`` in float32 (``mlx.core.dequantize`` of MLX 0.32, which rounds to
the scales' dtype on its way in folders of halves). Codes follow one another in a row, low bits
first, across words where 3, 5 or 6 bits do not divide one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import SourceError, UnsupportedModel
from edgellm.quant import floats
from edgellm.quant.stored import StoredCodes
from edgellm.source.quantized.groups import SCALE_DTYPES, WORD_BITS, Codes, misfit, part
from edgellm.source.safetensors_file import ITEM_BYTES, RawTensor
from edgellm.tensors import Array, TensorRef

BITS = (2, 3, 4, 5, 6, 8)
PARTS = ("weight", "scales", "biases")


def read(
    raw: Mapping[str, RawTensor], settings: Mapping[str, Any], where: str
) -> dict[str, TensorRef]:
    """Every tensor by its full-precision name; ``settings`` is the config's ``quantization``.

    Raises ``UnsupportedModel`` for modes other than affine, ``SourceError`` for parts that are
    missing or do not fit together.
    """
    modules = [name.removesuffix(".scales") for name in raw if name.endswith(".scales")]
    taken = {f"{module}.{each}" for module in modules for each in PARTS}
    found = {f"{module}.weight": _weight(raw, module, settings, where) for module in modules}
    return found | {name: tensor.ref() for name, tensor in raw.items() if name not in taken}


@dataclass(frozen=True)
class Weight:
    """One matrix ``[rows, columns]`` in groups of ``group`` values."""

    bits: int
    rows: int
    columns: int
    group: int
    words: RawTensor
    scales: RawTensor
    biases: RawTensor

    def stored(self) -> StoredCodes:
        """The codes, and what loads the values."""
        return StoredCodes(
            values=self.load_rows,
            rows=self.rows,
            bits=self.bits,
            codes=self.codes,
            scales=lambda start, stop: self._by_group(self.scales, start, stop),
            minima=lambda start, stop: self._by_group(self.biases, start, stop),
            groups=lambda: np.arange(self.columns) // self.group,
        )

    def load_rows(self, start: int, stop: int) -> Array:
        values = self.codes(start, stop).astype(np.float32)
        blocks = values.reshape(stop - start, -1, self.group)
        blocks *= self._by_group(self.scales, start, stop)[:, :, np.newaxis]
        blocks += self._by_group(self.biases, start, stop)[:, :, np.newaxis]
        return values

    def codes(self, start: int, stop: int) -> Codes:
        """uint8 ``[stop - start, columns]``."""
        row_bytes = self.columns * self.bits // 8
        content = self.words.read(start * row_bytes, stop * row_bytes).reshape(stop - start, -1)
        if self.bits == 8:
            return content
        places: npt.NDArray[np.uint8] = np.unpackbits(content, axis=1, bitorder="little")
        codes: Codes = np.packbits(
            places.reshape(-1, self.bits), axis=1, bitorder="little"
        ).reshape(stop - start, self.columns)
        return codes

    def _by_group(self, tensor: RawTensor, start: int, stop: int) -> Array:
        row_bytes = self.columns // self.group * ITEM_BYTES[tensor.dtype]
        content = tensor.read(start * row_bytes, stop * row_bytes).reshape(stop - start, -1)
        return floats.decode(content, SCALE_DTYPES[tensor.dtype])


def _weight(
    raw: Mapping[str, RawTensor], module: str, settings: Mapping[str, Any], where: str
) -> TensorRef:
    own = settings.get(module)
    found = {**settings, **own} if isinstance(own, dict) else settings
    mode, bits, group = found.get("mode", "affine"), found.get("bits"), found.get("group_size")
    if mode != "affine" or bits not in BITS or not isinstance(group, int) or group < 1:
        raise UnsupportedModel(
            f"{where} is quantized by MLX in the mode {mode!r} to {bits!r} bits in groups of "
            f"{group!r} ({module}); edgellm reads 'affine' with {', '.join(map(str, BITS))} bits: "
            "convert the model that it was made from"
        )
    words = part(raw, module, "weight", "U32", where)
    scales = raw[f"{module}.scales"]
    if scales.dtype not in SCALE_DTYPES:
        raise SourceError(f"{where}: {module}.scales is {scales.dtype}: the file is damaged")
    biases = part(raw, module, "biases", scales.dtype, where)
    if not len(words.shape) == len(scales.shape) == len(biases.shape) == 2:
        raise misfit(where, module, weight=words.shape, scales=scales.shape, biases=biases.shape)
    rows, columns = words.shape[0], words.shape[1] * WORD_BITS // bits
    if (
        words.shape[1] * WORD_BITS != columns * bits
        or columns != scales.shape[1] * group
        or scales.shape[0] != rows
        or biases.shape != scales.shape
    ):
        raise misfit(where, module, weight=words.shape, scales=scales.shape, biases=biases.shape)
    name = f"{module}.weight"
    weight = Weight(bits, rows, columns, group, words, scales, biases)
    return TensorRef(
        name, name, (rows, columns), f"mlx-{bits}bit", words.stored.nbytes, weight.stored()
    )
