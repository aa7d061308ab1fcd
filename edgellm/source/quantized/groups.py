"""Codes of groups of inputs, packed into 32-bit words: the common ground of GPTQ and AWQ.

Both keep a linear weight as ``[in, out]``: codes of 2, 3, 4 or 8 bits, and for each group of inputs
a scale and a zero of every output. A slab of our rows ``[out, in]`` is a slab of their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.errors import SourceError
from edgellm.quant import floats
from edgellm.quant.stored import StoredCodes
from edgellm.source.safetensors_file import RawTensor
from edgellm.tensors import Array, Item, TensorRef

Words = npt.NDArray[np.uint32]
Codes = npt.NDArray[np.uint8]

WORD_BITS = 32
BITS = (2, 3, 4, 8)
STRIP = 64
"""Outputs that are worked on at once: their codes and values stay in the cache."""

SCALE_DTYPES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}


@dataclass(frozen=True)
class Grouped:
    """``scale[group[i]] * (code[i] - zero[group[i]])``, rounded to the dtype of the scales.

    ``codes(start, stop)`` and ``zeros(start, stop)`` are uint8 ``[in, stop - start]`` and
    ``[groups, stop - start]`` of the outputs ``start:stop``; ``group`` gives each input's group.
    A code has ``bits``.
    """

    bits: int
    codes: Callable[[int, int], Codes]
    zeros: Callable[[int, int], npt.NDArray[np.int16]]
    scales: RawTensor
    group: Callable[[], npt.NDArray[np.intp]]

    def load_rows(self, start: int, stop: int) -> Array:
        codes, zeros = self.codes(start, stop), self.zeros(start, stop)
        dtype = SCALE_DTYPES[self.scales.dtype]
        scales = self._scales(start, stop)
        group = self.group()
        result = np.empty((stop - start, len(group)), np.float32)
        for first in range(0, stop - start, STRIP):
            part = slice(first, min(first + STRIP, stop - start))
            steps = codes[:, part] - zeros[group, part]
            values = steps.astype(np.float32)
            values *= scales[group, part]
            result[part] = floats.rounded(values, dtype).T
        return result

    def rows(self) -> StoredCodes:
        """The codes as rows ``[out, in]``, and what loads the values."""

        def turned(
            load: Callable[[int, int], npt.NDArray[Item]],
        ) -> Callable[[int, int], npt.NDArray[Item]]:
            return lambda start, stop: np.ascontiguousarray(load(start, stop).T)

        return StoredCodes(
            values=self.load_rows,
            rows=self.scales.shape[1],
            bits=self.bits,
            codes=turned(self.codes),
            scales=turned(self._scales),
            zeros=turned(self.zeros),
            groups=self.group,
        )

    def _scales(self, start: int, stop: int) -> Array:
        """float32 ``[groups, stop - start]``."""
        dtype = SCALE_DTYPES[self.scales.dtype]
        return floats.decode(self.scales.read_columns(start, stop), dtype)


def read_modules(
    raw: Mapping[str, RawTensor], parts: Collection[str], weight: Callable[[str], TensorRef]
) -> dict[str, TensorRef]:
    """Every tensor by its full-precision name.

    ``weight(module)`` takes the place of the ``parts`` of each module with a ``qweight``; all else
    is as it is stored.
    """
    modules = [name.removesuffix(".qweight") for name in raw if name.endswith(".qweight")]
    taken = {f"{module}.{part}" for module in modules for part in parts}
    found = {f"{module}.weight": weight(module) for module in modules}
    return found | {name: tensor.ref() for name, tensor in raw.items() if name not in taken}


def unpack_rows(words: Words, bits: int) -> Codes:
    """Codes packed down the columns, uint8 ``[rows, columns]``.

    ``words`` is uint32 ``[rows * bits / 32, columns]``. Those of a column are one stream of bits,
    lowest first: three bits straddle words.
    """
    count = len(words) * WORD_BITS // bits
    codes = np.empty((count, words.shape[1]), np.uint8)
    if bits == 3:
        for place in range(WORD_BITS):
            word, shift = divmod(3 * place, WORD_BITS)
            value = words[word::3] >> np.uint32(shift)
            if shift > WORD_BITS - 3:
                value |= words[word + 1 :: 3] << np.uint32(WORD_BITS - shift)
            codes[place::WORD_BITS] = value & np.uint32(7)
        return codes
    per_word = WORD_BITS // bits
    mask = np.uint32(2**bits - 1)
    for place in range(per_word):
        codes[place::per_word] = (words >> np.uint32(bits * place)) & mask
    return codes


def unpack_columns(words: Words, bits: int) -> Codes:
    """Codes packed along the rows, uint8 ``[rows, columns]``.

    ``words`` is uint32 ``[rows, columns * bits / 32]``.
    """
    return np.ascontiguousarray(unpack_rows(np.ascontiguousarray(words.T), bits).T)


def part(raw: Mapping[str, RawTensor], module: str, name: str, dtype: str, where: str) -> RawTensor:
    """Matrix or vector ``module.name``, checked. Raises ``SourceError`` without it."""
    found = raw.get(f"{module}.{name}")
    if found is None:
        raise SourceError(
            f"{where}: {module} is quantized and {module}.{name} is missing: without it the values "
            "are not known; fetch the model again"
        )
    if found.dtype != dtype and not (name == "scales" and found.dtype in SCALE_DTYPES):
        raise SourceError(
            f"{where}: {module}.{name} is stored as {found.dtype}, expected {dtype}: the file is "
            "damaged, or in a format that edgellm does not know; convert the model that it was "
            "made from"
        )
    return found


def misfit(where: str, module: str, **shapes: tuple[int, ...]) -> SourceError:
    """The error that the parts of ``module`` do not fit together."""
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return SourceError(
        f"{where}: the parts of {module} do not fit together ({listed}): the files belong to "
        "different models, or the quantization_config is not theirs; fetch the model again"
    )
