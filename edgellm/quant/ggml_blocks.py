"""Rows of codes as ggml's blocks, and back: the scalar types of llama.cpp, one row of a table each.

Layouts are those of ``block_q4_0`` and its neighbours in llama.cpp's ggml/src/ggml-common.h. No bit
of a block is unused, so that packing what was unpacked gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.errors import TensorError
from edgellm.quant import ggml_types
from edgellm.quant.grid import Grid, QTensor, SuperBlocks

Bytes = npt.NDArray[np.uint8]

CHUNK_VALUES = 1 << 16
"""Values packed at once, so that the few copies of them stay in the cache."""


@dataclass(frozen=True, slots=True)
class Half:
    """An f16 of the block: its ``scales`` (``d``) or ``mins`` (``m``, ``dmin``)."""

    source: str


@dataclass(frozen=True, slots=True)
class Bits:
    """``bits`` bits of each integer in ``source``, from bit ``shift`` on.

    Each byte takes ``8 // bits`` of them, the first in its lowest bits, which lie ``run`` apart:
    byte ``l`` of ``run`` bytes has the integers ``l``, ``run + l``, ``2 * run + l``...
    """

    source: str
    bits: int
    run: int
    shift: int = 0


@dataclass(frozen=True, slots=True)
class SixBitPairs:
    """Eight scale codes and eight minimum codes of 6 bits in 12 bytes (``get_scale_min_k4``)."""


Part = Half | Bits | SixBitPairs

_NIBBLES = Bits("codes", 4, 16)
_NIBBLES_OF_64 = Bits("codes", 4, 32)
_SCALE, _MIN = Half("scales"), Half("mins")

LAYOUTS: dict[str, tuple[Part, ...]] = {
    "q4_0": (_SCALE, _NIBBLES),
    "q4_1": (_SCALE, _MIN, _NIBBLES),
    "q5_0": (_SCALE, Bits("codes", 1, 1, shift=4), _NIBBLES),
    "q5_1": (_SCALE, _MIN, Bits("codes", 1, 1, shift=4), _NIBBLES),
    "q8_0": (_SCALE, Bits("codes", 8, 1)),
    "q2_k": (Bits("pairs", 4, 16), Bits("codes", 2, 32), _SCALE, _MIN),
    "q3_k": (
        Bits("codes", 1, 32, shift=2),
        Bits("codes", 2, 32),
        Bits("scale_codes", 4, 8),
        Bits("scale_codes", 2, 4, shift=4),
        _SCALE,
    ),
    "q4_k": (_SCALE, _MIN, SixBitPairs(), _NIBBLES_OF_64),
    "q5_k": (_SCALE, _MIN, SixBitPairs(), Bits("codes", 1, 32, shift=4), _NIBBLES_OF_64),
    "q6_k": (
        Bits("codes", 4, 64),
        Bits("codes", 2, 32, shift=4),
        Bits("scale_codes", 8, 1),
        _SCALE,
    ),
    "iq4_nl": (_SCALE, _NIBBLES),
    "iq4_xs": (
        _SCALE,
        Bits("scale_codes", 2, 1, shift=4),
        Bits("scale_codes", 4, 1),
        _NIBBLES,
    ),
}
"""What a block holds, in order, of every grid whose codes stand for one value each.

``pairs`` are the scale codes of a super-block and then its minimum codes.
"""

STORED_OFFSETS = {"q3_k": 32, "iq4_xs": 32}
"""What is added to scale codes so that they are stored without a sign; q6_k has signed bytes."""


def pack(tensor: QTensor) -> Bytes:
    """Blocks uint8 ``[rows, row_bytes]`` of codes on one of the grids of ``LAYOUTS``.

    Raises ``TensorError`` where a scale or minimum is not exactly an f16: it would be rounded once
    more here, after the codes were chosen for it.
    """
    assert tensor.codes is not None
    sources = _stored(tensor)
    name, blocks = tensor.grid.name, tensor.codes.size // tensor.grid.block
    out = np.empty((blocks, ggml_types.NAMED[name].block_bytes), np.uint8)
    step = max(1, CHUNK_VALUES // tensor.grid.block)
    for start in range(0, blocks, step):
        some = {source: values[start : start + step] for source, values in sources.items()}
        parts = [_encode(part, some) for part in LAYOUTS[name]]
        np.concatenate(parts, axis=1, out=out[start : start + step])
    return out.reshape(len(tensor.codes), -1)


def unpack(packed: Bytes, grid: Grid) -> QTensor:
    """Codes and scales of blocks ``[rows, row_bytes]``: the inverse of ``pack``."""
    blocks = np.ascontiguousarray(packed).reshape(-1, ggml_types.NAMED[grid.name].block_bytes)
    sources: dict[str, Bytes] = {}
    at = 0
    for part in LAYOUTS[grid.name]:
        nbytes = _nbytes(part, grid)
        for source, values in _decode(part, blocks[:, at : at + nbytes]).items():
            sources[source] = sources[source] | values if source in sources else values
        at += nbytes
    return _tensor(grid, len(packed), sources)


def _stored(tensor: QTensor) -> dict[str, Bytes]:
    """The arrays ``[blocks, n]`` that ``LAYOUTS`` names, of bytes as they are stored."""
    assert tensor.codes is not None
    assert tensor.scales is not None
    grid, supers = tensor.grid, tensor.supers
    codes = tensor.codes ^ np.uint8(128) if grid.bits == 8 else tensor.codes
    stored = {"codes": np.ascontiguousarray(codes).reshape(-1, grid.block)}
    scales, mins = (tensor.scales, tensor.mins) if supers is None else (supers.scales, supers.mins)
    stored["scales"] = _halves(scales, grid)
    if mins is not None:
        stored["mins"] = _halves(mins, grid)
    if supers is not None:
        blocks = len(stored["codes"])
        shifted = supers.scale_codes + np.int16(STORED_OFFSETS.get(grid.name, 0))
        stored["scale_codes"] = shifted.astype(np.uint8).reshape(blocks, -1)
        if supers.min_codes is not None:
            min_codes = supers.min_codes.reshape(blocks, -1)
            stored["pairs"] = np.concatenate([stored["scale_codes"], min_codes], axis=1)
    return stored


def _tensor(grid: Grid, rows: int, stored: Mapping[str, Bytes]) -> QTensor:
    """The inverse of ``_stored``."""
    codes = stored["codes"].reshape(rows, -1)
    if grid.bits == 8:
        codes = codes ^ np.uint8(128)
    scales = _floats(stored["scales"], rows)
    mins = _floats(stored["mins"], rows) if "mins" in stored else None
    if grid.sub_block is None:
        return QTensor(grid, codes.shape[1], codes=codes, scales=scales, mins=mins)
    groups = grid.block // grid.sub_block
    min_codes = None
    if "pairs" in stored:
        scale_codes = stored["pairs"][:, :groups].astype(np.int16)
        min_codes = np.ascontiguousarray(stored["pairs"][:, groups:]).reshape(rows, -1)
    elif grid.name in STORED_OFFSETS:
        scale_codes = stored["scale_codes"] - np.int16(STORED_OFFSETS[grid.name])
    else:
        scale_codes = stored["scale_codes"].view(np.int8).astype(np.int16)
    return with_supers(
        grid, codes, SuperBlocks(scales, scale_codes.reshape(rows, -1), mins, min_codes)
    )


def with_supers(grid: Grid, codes: Bytes, supers: SuperBlocks) -> QTensor:
    """The tensor of ``codes`` ``[rows, columns]`` with the products of two levels of scales."""
    groups = supers.scale_codes.shape[1] // supers.scales.shape[1]
    scales = np.repeat(supers.scales, groups, axis=1) * supers.scale_codes
    mins = None
    if supers.mins is not None:
        assert supers.min_codes is not None
        mins = -(np.repeat(supers.mins, groups, axis=1) * supers.min_codes)
    return QTensor(
        grid,
        codes.shape[1],
        codes=codes,
        scales=scales,
        mins=mins,
        supers=supers,
    )


def _halves(values: npt.NDArray[np.float32], grid: Grid) -> Bytes:
    """One f16 of each block as its bytes ``[blocks, 2]``."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.array_equal(halves.astype(np.float32), values, equal_nan=True):
        raise TensorError(
            f"a scale or minimum of {grid.name} is not exactly an f16: round it before codes are "
            "chosen for it"
        )
    return halves.reshape(-1, 1).view(np.uint8)


def _floats(halves: Bytes, rows: int) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(halves).view("<f2").astype(np.float32).reshape(rows, -1)


def _nbytes(part: Part, grid: Grid) -> int:
    if isinstance(part, Half):
        return 2
    if isinstance(part, SixBitPairs):
        return 12
    groups = grid.block // grid.group
    count = {"codes": grid.block, "scale_codes": groups, "pairs": 2 * groups}[part.source]
    return count * part.bits // 8


def _encode(part: Part, stored: Mapping[str, Bytes]) -> Bytes:
    """The bytes ``[blocks, nbytes]`` of one part."""
    if isinstance(part, Half):
        return stored[part.source]
    if isinstance(part, SixBitPairs):
        return _six_bit_pairs(stored["pairs"])
    return _interleave(stored[part.source], part)


def _decode(part: Part, raw: Bytes) -> dict[str, Bytes]:
    """What one part says: by source, the integers or bytes ``[blocks, n]``."""
    if isinstance(part, Half):
        return {part.source: raw}
    if isinstance(part, SixBitPairs):
        return {"pairs": _pairs_of_six_bits(raw)}
    return {part.source: _spread(raw, part)}


def _interleave(values: Bytes, part: Bits) -> Bytes:
    """``values`` ``[blocks, n]`` in ``[blocks, n * bits / 8]``; higher bits than asked are cut."""
    blocks, per_byte = len(values), 8 // part.bits
    if per_byte == 1:
        return values
    if part.bits == 1 and part.run == 1:
        return np.packbits(values >> np.uint8(part.shift) & np.uint8(1), axis=1, bitorder="little")
    mask = np.uint8((1 << part.bits) - 1)
    runs = values.reshape(blocks, -1, per_byte, part.run)
    out = runs[:, :, 0] >> np.uint8(part.shift) & mask
    for place in range(1, per_byte):
        out |= (runs[:, :, place] >> np.uint8(part.shift) & mask) << np.uint8(place * part.bits)
    return out.reshape(blocks, -1)


def _spread(raw: Bytes, part: Bits) -> Bytes:
    """The inverse of ``_interleave``: integers ``[blocks, n]``, other bits of them zero."""
    blocks, per_byte = len(raw), 8 // part.bits
    if per_byte == 1:
        return raw
    mask = np.uint8((1 << part.bits) - 1)
    runs = raw.reshape(blocks, -1, part.run)
    out = np.empty((blocks, runs.shape[1], per_byte, part.run), np.uint8)
    for place in range(per_byte):
        np.bitwise_and(runs >> np.uint8(place * part.bits), mask, out=out[:, :, place])
    out <<= np.uint8(part.shift)
    return out.reshape(blocks, -1)


def _six_bit_pairs(pairs: Bytes) -> Bytes:
    """``[blocks, 16]`` in ``[blocks, 12]``: codes 4 to 7 give two bits to the bytes of 0 to 3."""
    halves = pairs.reshape(-1, 2, 2, 4)  # scales and minima, codes 0-3 and 4-7
    first, last = halves[:, :, 0], halves[:, :, 1]
    out = np.empty((len(pairs), 3, 4), np.uint8)
    out[:, :2] = first | last >> np.uint8(4) << np.uint8(6)
    out[:, 2] = last[:, 0] & np.uint8(15) | last[:, 1] << np.uint8(4)
    return out.reshape(-1, 12)


def _pairs_of_six_bits(raw: Bytes) -> Bytes:
    """The inverse of ``_six_bit_pairs``."""
    scales, mins, low = np.moveaxis(raw.reshape(-1, 3, 4), 1, 0)
    out = np.empty((len(raw), 2, 2, 4), np.uint8)
    for place, (first, low_bits) in enumerate(((scales, low & np.uint8(15)), (mins, low >> 4))):
        out[:, place, 0] = first & np.uint8(63)
        out[:, place, 1] = low_bits | first >> np.uint8(6) << np.uint8(4)
    return out.reshape(-1, 16)
