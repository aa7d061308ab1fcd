"""Layouts of quantized checkpoints that transformers knows: what each stores and what it declares.

A layout is a ``quant_method`` of transformers (GPTQ in two versions). ``LAYOUTS`` says which grids
it holds and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import edgellm
from edgellm.export.checkpoint_shards import Part
from edgellm.export.packing_hf import (
    NESTED_MAP,
    NF4_MAP,
    PER_WORD,
    STATE_BYTES,
    STATE_DTYPES,
    nf4_state,
)
from edgellm.quant import bnb_absmax
from edgellm.quant.grid import Grid

WORD_BITS = 32

STATE = "quant_state.bitsandbytes__nf4"

OUTLIER_THRESHOLD = 6.0
"""Activations beyond it are multiplied in f16 by LLM.int8() (arXiv 2208.07339, section 3.2)."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How a layout holds weights of one grid.

    ``packer`` is a row of ``export.packing.PACKERS``; ``{dtype}`` in it stands for the dtype of the
    model. ``parts(rows, columns, grid, dtype)`` are the tensors of a weight, ``config(grid, dtype,
    ignored)`` is the ``quantization_config`` (``ignored``: modules that stay floats). ``dtypes``:
    what the rest of the model may be stored in, the first by default. ``scale_dtype``: of the
    scales, None for that of the model. ``rows_multiple``: rows must be a multiple of it.
    ``conv1d``: whether readers know it for GPT-2's Conv1D. ``in_one_piece``: as ``OutputTensor``.
    ``readers``: what loads it beside transformers itself.
    """

    packer: str
    parts: Callable[[int, int, Grid, str], Iterator[Part]]
    config: Callable[[Grid, str, list[str]], dict[str, Any]]
    readers: str
    dtypes: tuple[str, ...] = ("f16",)
    scale_dtype: str | None = "f16"
    rows_multiple: int = 1
    conv1d: bool = True
    in_one_piece: bool = False


def _turned_parts(rows: int, columns: int, grid: Grid, inputs_in_word: int) -> Iterator[Part]:
    groups, lines = columns // grid.block, columns // inputs_in_word
    words = rows * inputs_in_word // PER_WORD
    yield Part(".qweight", "I32", (lines, words), "data", PER_WORD, lines)
    yield Part(".qzeros", "I32", (groups, rows // PER_WORD), "zeros", PER_WORD, groups)
    yield Part(".scales", "F16", (groups, rows), "scales", PER_WORD, groups)


def _gptq_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    yield from _turned_parts(rows, columns, grid, PER_WORD)
    group = np.arange(columns, dtype="<i4") // grid.block
    yield Part(".g_idx", "I32", (columns,), content=group.astype("<i4").tobytes())


def _awq_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    yield from _turned_parts(rows, columns, grid, 1)


def _ct_packed_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    groups, words = columns // grid.block, columns * int(grid.bits) // WORD_BITS
    yield Part(".weight_packed", "I32", (rows, words), "data")
    yield Part(".weight_scale", dtype.upper(), (rows, groups), "scales")
    shape = np.asarray([rows, columns], "<i8")
    yield Part(".weight_shape", "I64", (2,), content=shape.tobytes())
    if not grid.symmetric:
        eights = -(-rows // PER_WORD)
        yield Part(".weight_zero_point", "I32", (eights, groups), "zeros", PER_WORD)


def _ct_int_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    yield Part(".weight", "I8", (rows, columns), "data")
    yield Part(".weight_scale", dtype.upper(), (rows, 1), "scales")


def _nf4_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    blocks = rows * columns // grid.block
    state = nf4_state((rows, columns), grid, dtype)
    yield Part(".weight", "U8", (rows * columns // 2, 1), "data")
    yield Part(".weight.absmax", "F32", (blocks,), "absmax")
    yield Part(".weight.quant_map", "F32", (16,), content=NF4_MAP)
    yield Part(f".weight.{STATE}", "U8", (STATE_BYTES,), content=state)


def _nf4_dq_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    blocks = rows * columns // grid.block
    nested = -(-blocks // bnb_absmax.BLOCK)
    yield Part(".weight", "U8", (rows * columns // 2, 1), "data")
    yield Part(".weight.absmax", "U8", (blocks,), "absmax")
    yield Part(".weight.nested_absmax", "F32", (nested,), "nested_absmax", rows)
    yield Part(f".weight.{STATE}", "U8", (STATE_BYTES,), "quant_state", rows)
    yield Part(".weight.quant_map", "F32", (16,), content=NF4_MAP)
    yield Part(".weight.nested_quant_map", "F32", (256,), content=NESTED_MAP)


def _bnb_int8_parts(rows: int, columns: int, grid: Grid, dtype: str) -> Iterator[Part]:
    yield Part(".weight", "I8", (rows, columns), "data")
    yield Part(".SCB", "F32", (rows,), "scales")


def _gptq_config(grid: Grid, version: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "format": version,
        "bits": int(grid.bits),
        "group_size": grid.block,
        "sym": grid.symmetric,
        # Columns lie in their own order, whatever order they were solved in.
        "desc_act": False,
        "lm_head": False,
        "meta": {"quantizer": [f"edgellm:{edgellm.__version__}"]},
    }


def _gptq_v1_config(grid: Grid, dtype: str, ignored: list[str]) -> dict[str, Any]:
    return _gptq_config(grid, "gptq")


def _gptq_v2_config(grid: Grid, dtype: str, ignored: list[str]) -> dict[str, Any]:
    return _gptq_config(grid, "gptq_v2")


def _awq_config(grid: Grid, dtype: str, ignored: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": int(grid.bits),
        "group_size": grid.block,
        # Zeros are stored for symmetric grids too: the kernels of this layout read them always.
        "zero_point": True,
        "modules_to_not_convert": ignored,
    }


def _ct_config(grid: Grid, dtype: str, ignored: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "type": "int",
        "num_bits": int(grid.bits),
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.block else "channel",
        "group_size": grid.block or None,
        "dynamic": False,
    }
    by_token = {
        "type": "int",
        "num_bits": 8,
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if grid.block else by_token,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if grid.block else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _bnb_config(grid: Grid, dtype: str, ignored: list[str]) -> dict[str, Any]:
    four = grid.kind == "codebook"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": grid.name == "nf4-dq",
        "bnb_4bit_compute_dtype": STATE_DTYPES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": OUTLIER_THRESHOLD,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ignored,
    }


INT4 = tuple(f"int4-g{group}" for group in (32, 64, 128))
INT4_SYM = tuple(f"{name}-sym" for name in INT4)
INT8 = ("int8", "int8-g64", "int8-g128")
FLOATS = ("f16", "bf16", "f32")

GPTQ_READERS = "optimum and gptqmodel (or gptqmodel alone, or vLLM)"
GPTQ = Storage("gptq", _gptq_parts, _gptq_v1_config, GPTQ_READERS, rows_multiple=PER_WORD)
GPTQ_V2 = Storage("gptq_v2", _gptq_parts, _gptq_v2_config, GPTQ_READERS, rows_multiple=PER_WORD)
AWQ = Storage(
    "awq", _awq_parts, _awq_config, "gptqmodel (or vLLM)", rows_multiple=PER_WORD, conv1d=False
)
CT_READERS = "compressed-tensors (or vLLM)"
CT_PACKED = Storage(
    "ct_packed", _ct_packed_parts, _ct_config, CT_READERS, FLOATS, scale_dtype=None, conv1d=False
)
CT_INT = Storage(
    "ct_int", _ct_int_parts, _ct_config, CT_READERS, FLOATS, scale_dtype=None, conv1d=False
)
BNB_READERS = "bitsandbytes and accelerate (or vLLM)"
NF4 = Storage("bnb4", _nf4_parts, _bnb_config, BNB_READERS, FLOATS, scale_dtype="f32")
NF4_DQ = Storage(
    "bnb_nf4_dq_{dtype}",
    _nf4_dq_parts,
    _bnb_config,
    BNB_READERS,
    FLOATS,
    scale_dtype="f32",
    in_one_piece=True,
)
BNB_INT8 = Storage("bnb_int8", _bnb_int8_parts, _bnb_config, BNB_READERS, FLOATS, "f32")

LAYOUTS: Mapping[str, Mapping[str, Storage]] = {
    "gptq": dict.fromkeys(INT4_SYM, GPTQ),
    "awq": dict.fromkeys((*INT4, *INT4_SYM), AWQ),
    "compressed-tensors": {
        **dict.fromkeys((*INT4, *INT4_SYM, *INT8), CT_PACKED),
        "int8-dynamic": CT_INT,
    },
    "bitsandbytes": {"nf4": NF4, "nf4-dq": NF4_DQ, "int8-dynamic": BNB_INT8},
    "gptq_v2": dict.fromkeys((*INT4, *INT4_SYM), GPTQ_V2),
}
"""Layout, grid, storage. A grid that several layouts hold takes the first where none is named.

``gptq`` stores zeros less one and so no zero of 0, which a group of one sign has: grids with zeros
are left to the others.
"""


def default_layout(grid: str) -> str | None:
    """The layout that holds ``grid`` where nobody says; None for floats and grids of no layout."""
    return next((name for name, held in LAYOUTS.items() if grid in held), None)
