"""How codes of a grid become bytes of a container: one row of ``PACKERS`` each.

Packing is exact: a reader of the container gets ``QTensor``'s values back bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edgellm.export import packing_gguf, packing_hf, packing_mlx, packing_onnx
from edgellm.quant.grid import Grid, QTensor

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Packer:
    """``row_bytes(grid, columns)`` says, by component, what a row takes; ``pack`` makes the rows.

    Both name the same components (``data``, ``scales``, ...); ``pack`` returns uint8
    ``[rows, row_bytes]`` for each, or the lines of an array that has such (``StoredArray.lines``).
    ``unpack(components, grid, columns)`` is its inverse: codes and scales of rows that were written
    before. Where a few rows are packed together, ``row_bytes`` is what these take
    (``StoredArray.rows_each``); components of a whole tensor are not in it.
    """

    row_bytes: Callable[[Grid, int], Mapping[str, int]]
    pack: Callable[[QTensor], Mapping[str, Bytes]]
    unpack: Callable[[Mapping[str, Bytes], Grid, int], QTensor]


def _finished(tensor: QTensor) -> Mapping[str, Bytes]:
    assert tensor.packed is not None
    return {"data": tensor.packed}


def _as_finished(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    return QTensor(grid, columns, packed=components["data"])


def _float_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    return {"data": int(grid.bits) // 8 * columns}


PACKERS: dict[str, Packer] = {
    "float": Packer(_float_row_bytes, _finished, _as_finished),
    "ggml": Packer(packing_gguf.row_bytes, packing_gguf.pack, packing_gguf.unpack),
    "nbits": Packer(
        packing_onnx.nbits_row_bytes, packing_onnx.pack_nbits, packing_onnx.unpack_nbits
    ),
    "dynamic": Packer(
        packing_onnx.dynamic_row_bytes, packing_onnx.pack_dynamic, packing_onnx.unpack_dynamic
    ),
    "bnb4": Packer(packing_onnx.bnb4_row_bytes, packing_onnx.pack_bnb4, packing_onnx.unpack_bnb4),
    "gptq": Packer(packing_hf.gptq_bytes, packing_hf.pack_gptq, packing_hf.unpack_gptq),
    "gptq_v2": Packer(packing_hf.gptq_bytes, packing_hf.pack_gptq_v2, packing_hf.unpack_gptq_v2),
    "awq": Packer(packing_hf.gptq_bytes, packing_hf.pack_awq, packing_hf.unpack_awq),
    "ct_packed": Packer(
        packing_hf.ct_packed_bytes, packing_hf.pack_ct_packed, packing_hf.unpack_ct_packed
    ),
    "ct_int": Packer(packing_hf.ct_int_bytes, packing_hf.pack_ct_int, packing_hf.unpack_ct_int),
    **{
        f"bnb_nf4_dq_{dtype}": Packer(
            packing_hf.bnb_nf4_dq_bytes,
            partial(packing_hf.pack_bnb_nf4_dq, dtype=dtype),
            packing_hf.unpack_bnb_nf4_dq,
        )
        for dtype in packing_hf.STATE_DTYPES
    },
    "mlx": Packer(packing_mlx.row_bytes, packing_mlx.pack, packing_mlx.unpack),
    "bnb_int8": Packer(
        packing_hf.bnb_int8_bytes, packing_hf.pack_bnb_int8, packing_hf.unpack_bnb_int8
    ),
}
