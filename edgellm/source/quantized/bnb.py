"""bitsandbytes: 4-bit weights (nf4, fp4; scales plain or rounded twice) and LLM.int8() rows.

A 4-bit weight ``w`` is stored as ``w`` (two codes a byte, in words of whatever type), ``w.absmax``,
``w.quant_map`` and a JSON text in ``w.quant_state.bitsandbytes__nf4``; with double quantization
also ``w.nested_absmax`` and ``w.nested_quant_map`` (``QuantState.as_dict``, bitsandbytes 0.50). An
8-bit one is ``w`` and, beside it, ``SCB``.

Values are those of ``functional.dequantize_4bit``, which rounds to the dtype that the model had
when it was quantized, and of ``int8_vectorwise_dequant``, which stays in float32: PEFT merges into
these, and training multiplies by these as long as it computes in the dtype of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from edgellm.errors import SourceError, UnsupportedModel
from edgellm.quant import bnb_4bit, bnb_absmax, bnb_int8
from edgellm.quant.floats import rounded
from edgellm.quant.stored import StoredCodes
from edgellm.source.safetensors_file import ITEM_BYTES, RawTensor
from edgellm.tensors import Array, LoadRows, TensorRef

STATE = ".quant_state.bitsandbytes__"
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
TABLE_TOLERANCE = 1e-6
"""How far a stored table may be from ours (``QuantState.__eq__``)."""


def read(
    raw: Mapping[str, RawTensor], settings: Mapping[str, Any], where: str
) -> dict[str, TensorRef]:
    """Every tensor by its full-precision name; those with a quantization state are dequantized.

    Raises ``SourceError`` for statistics that are missing or do not fit their weight.
    """
    result: dict[str, TensorRef] = {}
    taken: set[str] = set()
    for name in raw:
        if STATE in name:
            weight, kind = name.split(STATE)
            result[weight] = _four_bit(raw, weight, kind, where)
            taken |= {name, weight, *(f"{weight}.{part}" for part in STATISTICS)}
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            result[f"{module}.weight"] = _int8(raw, module, where)
            taken |= {name, f"{module}.weight", f"{module}.weight_format"}
    for name, tensor in raw.items():
        if name not in taken:
            result[name] = tensor.ref()
    return result


@dataclass(frozen=True)
class FourBit:
    """One weight of 4-bit blocks that run over ``shape`` row by row.

    ``nested``: ``absmax`` holds codes, ``dtype`` is what the values are rounded to.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: int
    dtype: str
    packed: RawTensor
    absmax: RawTensor
    nested: Nested | None

    def rows(self) -> LoadRows:
        """What loads the values, with the codes where no block runs on into the next row."""
        rows, columns = self.shape
        if columns % self.block:
            return self.load_rows
        blocks = columns // self.block

        def codes(start: int, stop: int) -> bnb_4bit.Codes:
            return self._codes(start * blocks, stop * blocks).reshape(-1, columns)

        def scales(start: int, stop: int) -> Array:
            return self._scales(start * blocks, stop * blocks).reshape(-1, blocks)

        return StoredCodes(
            values=self.load_rows,
            rows=rows,
            bits=4,
            codes=codes,
            scales=scales,
            groups=lambda: np.arange(columns) // self.block,
            codebook=self.kind,
        )

    def load_rows(self, start: int, stop: int) -> Array:
        columns = math.prod(self.shape[1:])
        first, last = start * columns, stop * columns
        low, high = first // self.block, -(-last // self.block)
        codes = self._codes(low, high)
        values = bnb_4bit.dequantize(
            codes[: last - low * self.block], self._scales(low, high), self.kind, self.block
        )
        part = values[first - low * self.block :].reshape(stop - start, columns)
        return np.ascontiguousarray(rounded(part, self.dtype))

    def _codes(self, low: int, high: int) -> bnb_4bit.Codes:
        """Those of the blocks ``low:high``, uint8 ``[values]``."""
        last = min(high * self.block, math.prod(self.shape))
        return bnb_4bit.unpack(self.packed.read(low * self.block // 2, -(-last // 2)))

    def _scales(self, low: int, high: int) -> Array:
        if self.nested is None:
            return self.absmax.read(4 * low, 4 * high).view("<f4")
        return self.nested.scales(self.absmax.read(low, high), low)


@dataclass(frozen=True)
class Nested:
    """What scales rounded to 8 bits need besides their codes."""

    absmax: RawTensor
    levels: RawTensor
    block: int
    offset: np.float32

    def scales(self, codes: bnb_4bit.Codes, first: int) -> Array:
        absmax, levels = self._tables
        return bnb_absmax.dequantize(
            codes, absmax, self.offset, first=first, block=self.block, levels=levels
        )

    @cached_property
    def _tables(self) -> tuple[Array, Array]:
        return self.absmax.read().view("<f4"), self.levels.read().view("<f4")


def _four_bit(raw: Mapping[str, RawTensor], weight: str, kind: str, where: str) -> TensorRef:
    what = f"{where}: tensor {weight}"
    state = _state(raw[f"{weight}{STATE}{kind}"], what)
    shape, block, dtype = state["shape"], state["blocksize"], DTYPES.get(state["dtype"])
    if (
        kind not in bnb_4bit.LEVELS
        or dtype is None
        or block < 2
        or block % 2
        or len(shape) != 2
        or min(shape) < 1
    ):
        raise SourceError(
            f"{what} has the quantization state {state}: edgellm reads matrices of "
            f"{' or '.join(bnb_4bit.LEVELS)} blocks in {', '.join(DTYPES)}; the file is damaged"
        )
    size = math.prod(shape)
    blocks = -(-size // block)
    nested = None
    if f"{weight}.nested_absmax" in raw:
        nested = _nested(raw, weight, state, blocks, what)
    four_bit = FourBit(
        name=weight,
        kind=kind,
        shape=shape,
        block=block,
        dtype=dtype,
        packed=_part(raw, weight, -(-size // 2), what),
        absmax=_part(raw, f"{weight}.absmax", blocks * (1 if nested else 4), what),
        nested=nested,
    )
    _check_table(_part(raw, f"{weight}.quant_map", 4 * 16, what), bnb_4bit.LEVELS[kind], what)
    stored = kind + ("-dq" if nested else "")
    return TensorRef(weight, weight, shape, stored, four_bit.packed.stored.nbytes, four_bit.rows())


def _nested(
    raw: Mapping[str, RawTensor], weight: str, state: Mapping[str, Any], blocks: int, what: str
) -> Nested:
    try:
        block, offset = int(state["nested_blocksize"]), np.float32(state["nested_offset"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{what} has scales that were rounded twice and no {error} in its quantization state: "
            "the file is damaged; fetch it again"
        ) from error
    if block < 1:
        raise SourceError(f"{what} has nested_blocksize {block}: the file is damaged")
    count = -(-blocks // block)
    return Nested(
        absmax=_part(raw, f"{weight}.nested_absmax", 4 * count, what),
        levels=_part(raw, f"{weight}.nested_quant_map", 4 * 256, what),
        block=block,
        offset=offset,
    )


def _state(tensor: RawTensor, what: str) -> dict[str, Any]:
    """The JSON text that ``pack_dict_to_tensor`` made a tensor of."""
    try:
        state = json.loads(tensor.read().tobytes())
        shape = tuple(int(size) for size in state["shape"])
        block, dtype = int(state["blocksize"]), str(state["dtype"])
        return {**state, "shape": shape, "blocksize": block, "dtype": dtype}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise SourceError(
            f"{what} has an unreadable quantization state ({error!r}): the file is damaged; fetch "
            "it again"
        ) from error


def _part(raw: Mapping[str, RawTensor], name: str, nbytes: int, what: str) -> RawTensor:
    """Tensor ``name``, which must be there and take ``nbytes``."""
    if name not in raw:
        raise SourceError(
            f"{what} is quantized and {name} is missing: without it the values are not known; "
            "fetch the model again"
        )
    found = raw[name].stored.nbytes
    if found != nbytes:
        raise SourceError(
            f"{what}: {name} takes {found} bytes and the quantization state gives it {nbytes}: the "
            "files belong to different models; fetch them again"
        )
    return raw[name]


def _check_table(table: RawTensor, levels: Array, what: str) -> None:
    """bitsandbytes multiplies by its own levels whatever is stored, so both must be the same."""
    found = table.read().view("<f4")
    if not np.allclose(found, levels, rtol=0, atol=TABLE_TOLERANCE):
        raise UnsupportedModel(
            f"{what} was rounded to levels that bitsandbytes does not use "
            f"({', '.join(f'{level:g}' for level in found)}): convert the model that it was made "
            "from"
        )


def _int8(raw: Mapping[str, RawTensor], module: str, where: str) -> TensorRef:
    name = f"{module}.weight"
    what = f"{where}: tensor {name}"
    weight = raw.get(name)
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        found = "is missing" if weight is None else f"is {weight.dtype} {list(weight.shape)}"
        raise SourceError(f"{what} has SCB scales and {found}: the file is damaged; fetch it again")
    layout = raw.get(f"{module}.weight_format")
    if layout is not None and layout.read().any():
        raise UnsupportedModel(
            f"{what} lies in a layout for one kind of GPU (weight_format "
            f"{layout.read().tolist()}), which bitsandbytes no longer reads either: save it again "
            "with bitsandbytes 0.43, or convert the model that it was made from"
        )
    rows, columns = weight.shape
    scales = _part(raw, f"{module}.SCB", rows * ITEM_BYTES["F32"], what)

    def codes(start: int, stop: int) -> bnb_4bit.Codes:
        return weight.read(start * columns, stop * columns).reshape(stop - start, columns)

    def sizes(start: int, stop: int) -> Array:
        return scales.read(4 * start, 4 * stop).view("<f4")

    def load_rows(start: int, stop: int) -> Array:
        return bnb_int8.dequantize(codes(start, stop).view(np.int8), sizes(start, stop))

    stored = StoredCodes(
        values=load_rows,
        rows=rows,
        bits=8,
        codes=lambda start, stop: codes(start, stop) ^ np.uint8(128),
        # bitsandbytes multiplies by the size first: its values differ in the last bits.
        scales=lambda start, stop: sizes(start, stop)[:, None] * bnb_int8.STEP,
        groups=lambda: np.zeros(columns, np.intp),
    )
    return TensorRef(name, name, weight.shape, "int8", weight.stored.nbytes, stored)
