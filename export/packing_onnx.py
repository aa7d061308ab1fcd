"""Rows of codes as onnxruntime's operators read them.

``MatMulNBits`` and ``GatherBlockQuantized`` share one layout, so that a tied embedding and head are
one copy on disk. ``DynamicQuantizeMatMul`` takes int8, ``MatMulBnb4`` bitsandbytes' nibbles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgellm.quant.grid import Grid, QTensor

Bytes = npt.NDArray[np.uint8]


def nbits_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row for ``MatMulNBits``: codes, f32 scales, and zeros where the grid has them."""
    blocks = columns // grid.block
    sizes = {"data": columns * int(grid.bits) // 8, "scales": 4 * blocks}
    return sizes if grid.symmetric else {**sizes, "zeros": -(-blocks * int(grid.bits) // 8)}


def pack_nbits(tensor: QTensor) -> Mapping[str, Bytes]:
    """Codes low nibble first within a byte, zeros alike; 8-bit codes as they are."""
    assert tensor.codes is not None
    assert tensor.scales is not None
    bits = int(tensor.grid.bits)
    packed = {"data": low_first(tensor.codes, bits), "scales": _as_bytes(tensor.scales)}
    if tensor.zeros is not None:
        packed["zeros"] = low_first(tensor.zeros, bits)
    return packed


def unpack_nbits(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_nbits``."""
    bits, blocks = int(grid.bits), columns // grid.block
    return QTensor(
        grid,
        columns,
        codes=each_code(components["data"], bits, columns),
        scales=_as_floats(components["scales"]),
        zeros=None if grid.symmetric else each_code(components["zeros"], bits, blocks),
    )


def dynamic_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row for ``DynamicQuantizeMatMul``: int8 codes and one f32 scale."""
    return {"data": columns, "scales": 4}


def pack_dynamic(tensor: QTensor) -> Mapping[str, Bytes]:
    """Codes around 128 become int8 around 0 (their top bit flips)."""
    assert tensor.codes is not None
    assert tensor.scales is not None
    return {"data": tensor.codes ^ np.uint8(128), "scales": _as_bytes(tensor.scales)}


def unpack_dynamic(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_dynamic``."""
    codes = components["data"] ^ np.uint8(128)
    return QTensor(grid, columns, codes=codes, scales=_as_floats(components["scales"]))


def bnb4_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row for ``MatMulBnb4``: two codes a byte and an f32 absmax a block."""
    return {"data": columns // 2, "absmax": 4 * (columns // grid.block)}


def pack_bnb4(tensor: QTensor) -> Mapping[str, Bytes]:
    """Codes *high* nibble first within a byte, as bitsandbytes stores them."""
    assert tensor.codes is not None
    assert tensor.scales is not None
    return {"data": high_first(tensor.codes), "absmax": _as_bytes(tensor.scales)}


def unpack_bnb4(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_bnb4``."""
    codes = unpack_high_first(components["data"])
    return QTensor(grid, columns, codes=codes, scales=_as_floats(components["absmax"]))


def high_first(codes: Bytes) -> Bytes:
    """Two 4-bit codes a byte, the first in its high half: uint8 ``[rows, columns / 2]``."""
    packed: Bytes = (codes[:, 0::2] << np.uint8(4)) | codes[:, 1::2]
    return packed


def unpack_high_first(packed: Bytes) -> Bytes:
    """The inverse of ``high_first``."""
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2] = packed >> np.uint8(4)
    codes[:, 1::2] = packed & np.uint8(15)
    return codes


def each_code(packed: Bytes, bits: int, count: int) -> Bytes:
    """``count`` codes of each row, of which ``packed`` holds the low nibble of a byte first."""
    if bits == 8:
        return packed
    codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2] = packed & np.uint8(15)
    codes[:, 1::2] = packed >> np.uint8(4)
    return codes[:, :count]


def low_first(codes: Bytes, bits: int) -> Bytes:
    """Codes of 8 bits as they are, of 4 bits two a byte, the first in its low half."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    if not codes.flags.c_contiguous:
        codes = np.ascontiguousarray(codes)
    # A pair of codes is one little-endian u16: 0x0H0L. Shifting by 4 brings H beside L.
    pairs = codes.view("<u2")
    packed: Bytes = (pairs | (pairs >> 4)).astype(np.uint8)
    return packed


def _as_bytes(values: npt.NDArray[np.float32]) -> Bytes:
    return np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(values.shape[0], -1)


def _as_floats(stored: Bytes) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(stored).view("<f4")
