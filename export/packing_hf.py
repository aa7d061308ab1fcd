"""Codes as the quantized checkpoints of transformers hold them.

A weight ``[out, in]`` of ours becomes the tensors of one module. GPTQ and AWQ keep it as
``[in, out]``, so that rows of ours are columns there: a *line* of theirs holds a part of every row.
Eight 4-bit codes make a little-endian 32-bit word, lowest first, whatever they belong to.

``gptq``, ``gptq_v2``: eight inputs to a word, zeros eight outputs to a word (v1 stores them less
one), f16 scales (AutoGPTQ 0.7 ``QuantLinear.pack``, gptqmodel 7 ``PackableQuantLinear.pack``).
``awq``: eight outputs to a word in the order 0 2 4 6 1 3 5 7 (AutoAWQ 0.2 ``WQLinear_GEMM``).
``ct_packed``: compressed-tensors' ``pack-quantized`` (0.20), eight inputs to a word, zeros eight
outputs to a word; ``ct_int``: its ``int-quantized``. ``bnb_nf4``, ``bnb_nf4_dq``, ``bnb_int8``:
what bitsandbytes saves (0.50, ``QuantState.as_dict`` and ``Linear8bitLt``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnsupportedTarget
from edgellm.export.packing_onnx import (
    each_code,
    high_first,
    low_first,
    pack_dynamic,
    unpack_high_first,
)
from edgellm.quant import bnb_absmax, bnb_int8, floats
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.nf4 import LEVELS as NF4_LEVELS

Bytes = npt.NDArray[np.uint8]

PER_WORD = 8
"""4-bit codes in a word."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of a word belong to, lowest first."""

STATE_BYTES = 256
"""Room for the JSON text of a quantization state, which spaces fill up: its length is known before
its numbers are. bitsandbytes' own takes 90 to 200."""

STATE_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def gptq_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of eight rows of GPTQ or AWQ."""
    groups = columns // grid.block
    return {"data": 4 * columns, "zeros": 4 * groups, "scales": 2 * PER_WORD * groups}


def pack_gptq(tensor: QTensor) -> Mapping[str, Bytes]:
    """Lines ``[in / 8]`` of codes, ``[groups]`` of zeros less one and ``[groups]`` of scales.

    Raises ``UnsupportedTarget`` for a zero of 0, which has no room in this version.
    """
    zeros = _zeros(tensor)
    if not zeros.all():
        raise UnsupportedTarget(
            "the layout gptq stores zeros less one and cannot hold a zero of 0: choose "
            "--layout gptq_v2, awq or compressed-tensors, or a -sym grid"
        )
    return _gptq(tensor, zeros - np.uint8(1))


def pack_gptq_v2(tensor: QTensor) -> Mapping[str, Bytes]:
    """The same with zeros as they are."""
    return _gptq(tensor, _zeros(tensor))


def unpack_gptq(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_gptq``."""
    return _from_gptq(components, grid, columns, less=1)


def unpack_gptq_v2(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_gptq_v2``."""
    return _from_gptq(components, grid, columns, less=0)


def pack_awq(tensor: QTensor) -> Mapping[str, Bytes]:
    """Lines ``[in]`` of codes, ``[groups]`` of zeros and ``[groups]`` of scales."""
    assert tensor.codes is not None
    return {
        "data": low_first(_in_awq_order(tensor.codes.T), 4),
        "zeros": low_first(_in_awq_order(_zeros(tensor).T), 4),
        "scales": _turned_scales(tensor),
    }


def unpack_awq(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_awq``."""
    groups = columns // grid.block
    codes, zeros = (
        _out_of_awq_order(_codes(_lines(components[component], lines), 4))
        for component, lines in (("data", columns), ("zeros", groups))
    )
    return QTensor(
        grid,
        columns,
        codes=_turned(codes),
        scales=_turned(floats.decode(_lines(components["scales"], groups), "f16")),
        zeros=None if grid.symmetric else _turned(zeros),
    )


def ct_packed_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row for ``pack-quantized``, and of eight rows of zeros."""
    groups = columns // grid.block
    sizes = {
        "data": columns * int(grid.bits) // 8,
        "scales": _item_bytes(grid) * groups,
    }
    return sizes if grid.symmetric else {**sizes, "zeros": 4 * groups}


def pack_ct_packed(tensor: QTensor) -> Mapping[str, Bytes]:
    """Codes by rows; zeros of eight rows a word, the last filled up with nothing."""
    assert tensor.codes is not None
    packed = {
        "data": low_first(tensor.codes, int(tensor.grid.bits)),
        "scales": _scales(tensor),
    }
    if tensor.zeros is not None:
        filled = np.pad(tensor.zeros, ((0, -len(tensor.zeros) % PER_WORD), (0, 0)))
        packed["zeros"] = _turned(low_first(filled.T, 4).view("<u4")).view(np.uint8)
    return packed


def unpack_ct_packed(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_ct_packed``."""
    bits = int(grid.bits)
    data = components["data"].reshape(-1, columns * bits // 8)
    zeros = None
    if not grid.symmetric:
        words = _turned(_lines(components["zeros"], -(-len(data) // PER_WORD)).view("<u4"))
        zeros = _turned(_codes(words.view(np.uint8), 4))[: len(data)]
    return QTensor(
        grid,
        columns,
        codes=_codes(data, bits),
        scales=floats.decode(_lines(components["scales"], len(data)), grid.scale_dtype),
        zeros=zeros,
    )


def ct_int_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row for ``int-quantized``: signed codes and one scale."""
    return {"data": columns, "scales": _item_bytes(grid)}


def pack_ct_int(tensor: QTensor) -> Mapping[str, Bytes]:
    """Signed codes by rows, and their scales."""
    return {"data": pack_dynamic(tensor)["data"], "scales": _scales(tensor)}


def unpack_ct_int(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_ct_int``."""
    codes = components["data"].reshape(-1, columns) ^ np.uint8(128)
    scales = floats.decode(_lines(components["scales"], len(codes)), grid.scale_dtype)
    return QTensor(grid, columns, codes=codes, scales=scales)


def bnb_nf4_dq_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row of codes, and of 8-bit codes of its scales; the rest is the whole tensor's."""
    return {"data": columns // 2, "absmax": columns // grid.block}


def pack_bnb_nf4_dq(tensor: QTensor, *, dtype: str) -> Mapping[str, Bytes]:
    """All rows of a weight: codes, 8-bit scales, their own f32 scales, and the state as JSON.

    ``dtype`` as ``nf4_state`` takes it. Raises ``UnsupportedTarget`` where the scales were not
    rounded twice.
    """
    assert tensor.codes is not None
    if tensor.doubled is None:
        raise UnsupportedTarget(
            "nf4-dq keeps scales that were rounded to 8 bits, which this solver did not do: "
            "choose rtn:nf4-dq, or nf4"
        )
    return {
        "data": high_first(tensor.codes),
        "absmax": tensor.doubled.codes.reshape(len(tensor.codes), -1),
        "nested_absmax": tensor.doubled.absmax.astype("<f4", copy=False).view(np.uint8),
        "quant_state": np.frombuffer(
            nf4_state(tensor.codes.shape, tensor.grid, dtype, float(tensor.doubled.offset)),
            np.uint8,
        ),
    }


def unpack_bnb_nf4_dq(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_bnb_nf4_dq``."""
    state = json.loads(components["quant_state"].tobytes())
    doubled = bnb_absmax.Rounded(
        components["absmax"].reshape(-1),
        components["nested_absmax"].reshape(-1).view("<f4"),
        np.float32(state["nested_offset"]),
    )
    codes = unpack_high_first(components["data"].reshape(-1, columns // 2))
    return QTensor(
        grid,
        columns,
        codes=codes,
        scales=bnb_absmax.values_of(doubled).reshape(len(codes), -1),
        doubled=doubled,
    )


def bnb_int8_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row of LLM.int8(): signed codes and the f32 size that 127 stands for."""
    return {"data": columns, "scales": 4}


def pack_bnb_int8(tensor: QTensor) -> Mapping[str, Bytes]:
    """Signed codes, and ``scale * 127``.

    bitsandbytes multiplies codes by that and then by 1/127, which moves the last bit or two of a
    float32.
    """
    assert tensor.scales is not None
    sizes = (tensor.scales / bnb_int8.STEP).astype("<f4")
    return {"data": pack_dynamic(tensor)["data"], "scales": sizes.view(np.uint8)}


def unpack_bnb_int8(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack_bnb_int8``, up to the last bit of the scales."""
    codes = components["data"].reshape(-1, columns) ^ np.uint8(128)
    sizes = np.ascontiguousarray(components["scales"]).reshape(len(codes), -1).view("<f4")
    return QTensor(grid, columns, codes=codes, scales=sizes * bnb_int8.STEP)


def nf4_state(shape: tuple[int, ...], grid: Grid, dtype: str, offset: float | None = None) -> bytes:
    """The JSON text that bitsandbytes keeps beside a weight, filled up to ``STATE_BYTES``.

    ``dtype`` (f32, f16, bf16) is what values are rounded to, ``offset`` what was taken off scales
    that were rounded twice.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": grid.block,
        "dtype": STATE_DTYPES[dtype],
        "shape": list(shape),
    }
    if offset is not None:
        state |= {
            "nested_blocksize": bnb_absmax.BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
    return json.dumps(state).encode().ljust(STATE_BYTES)


NF4_MAP = NF4_LEVELS.astype("<f4").tobytes()
NESTED_MAP = bnb_absmax.LEVELS.astype("<f4").tobytes()
"""The tables that bitsandbytes stores beside every weight."""


def _gptq(tensor: QTensor, zeros: Bytes) -> Mapping[str, Bytes]:
    assert tensor.codes is not None
    return {
        "data": _turned(low_first(tensor.codes, 4).view("<u4")).view(np.uint8),
        "zeros": low_first(zeros.T, 4),
        "scales": _turned_scales(tensor),
    }


def _from_gptq(components: Mapping[str, Bytes], grid: Grid, columns: int, *, less: int) -> QTensor:
    groups = columns // grid.block
    words = _turned(_lines(components["data"], columns // PER_WORD).view("<u4"))
    zeros = _codes(_lines(components["zeros"], groups), 4) + np.uint8(less)
    return QTensor(
        grid,
        columns,
        codes=_codes(words.view(np.uint8), 4),
        scales=_turned(floats.decode(_lines(components["scales"], groups), "f16")),
        zeros=None if grid.symmetric else _turned(zeros),
    )


def _zeros(tensor: QTensor) -> Bytes:
    """Zeros ``[rows, groups]``; the middle of the codes where the grid has none of its own."""
    assert tensor.scales is not None
    if tensor.zeros is not None:
        return tensor.zeros
    return np.full(tensor.scales.shape, 2 ** (int(tensor.grid.bits) - 1), np.uint8)


def _scales(tensor: QTensor) -> Bytes:
    """Scales by rows in the grid's ``scale_dtype``, which they must have been rounded to before."""
    assert tensor.scales is not None
    dtype = tensor.grid.scale_dtype
    stored = floats.ENCODERS[dtype](np.ascontiguousarray(tensor.scales))
    if not np.array_equal(floats.decode(stored, dtype), tensor.scales):
        raise ValueError(
            f"scales of {tensor.grid.name} are stored as {dtype} and were not rounded to it before "
            "the codes were chosen: the solver does not heed Grid.scale_dtype"
        )
    return stored


def _turned_scales(tensor: QTensor) -> Bytes:
    item = _item_bytes(tensor.grid)
    return _turned(_scales(tensor).view(f"u{item}")).view(np.uint8)


def _item_bytes(grid: Grid) -> int:
    return 4 if grid.scale_dtype == "f32" else 2


def _turned(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(matrix.T)


def _lines(content: Bytes, count: int) -> Bytes:
    """``content`` as ``count`` lines, however it was cut before."""
    return np.ascontiguousarray(content).reshape(count, -1)


def _codes(packed: Bytes, bits: int) -> Bytes:
    return each_code(packed, bits, packed.shape[1] * 8 // bits)


def _in_awq_order(codes: Bytes) -> Bytes:
    words = codes.reshape(len(codes), -1, PER_WORD)
    return words[:, :, AWQ_ORDER].reshape(len(codes), -1)


def _out_of_awq_order(codes: Bytes) -> Bytes:
    words = codes.reshape(len(codes), -1, PER_WORD)
    return words[:, :, np.argsort(AWQ_ORDER)].reshape(len(codes), -1)
