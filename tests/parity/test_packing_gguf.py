"""Packed codes against ggml's own readers: every scalar type, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import gguf
import libgguf
import numpy as np
import pytest

from edgellm.errors import TensorError
from edgellm.export.packing import PACKERS
from edgellm.quant import ggml
from edgellm.quant.dequantize import dequantize
from edgellm.quant.ggml_blocks import LAYOUTS, with_supers
from edgellm.quant.ggml_types import NAMED
from edgellm.quant.grid import GRIDS, Grid, QTensor, SuperBlocks
from edgellm.quant.levels import levels_of
from edgellm.tensors import Array

ROWS, COLUMNS = 64, 768
SCALE_CODES = {
    "q2_k": (0, 15),
    "q3_k": (-32, 31),
    "q4_k": (0, 63),
    "q5_k": (0, 63),
    "q6_k": (-128, 127),
    "iq4_xs": (-32, 31),
}
PACKER = PACKERS["ggml"]


def halves(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Scales of every size that f16 has, zeros of both signs and subnormals among them."""
    bits = random.integers(0, 1 << 16, shape, dtype=np.uint16)
    values = bits.view(np.float16)
    return np.where(np.isfinite(values), values, np.float16(0)).astype(np.float32)


def random_tensor(grid: Grid, seed: int) -> QTensor:
    """Codes, scales and scale codes anywhere in their ranges, the ends of each at least once."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, len(levels_of(grid)), (ROWS, COLUMNS)).astype(np.uint8)
    codes[0], codes[1] = 0, len(levels_of(grid)) - 1
    shape = (ROWS, COLUMNS // grid.block)
    scales = halves(random, shape)
    mins = None if grid.symmetric else halves(random, shape)
    if grid.name not in SCALE_CODES:
        return QTensor(grid, COLUMNS, codes=codes, scales=scales, mins=mins)
    low, high = SCALE_CODES[grid.name]
    groups = (ROWS, COLUMNS // grid.group)
    scale_codes = random.integers(low, high + 1, groups).astype(np.int16)
    scale_codes[2], scale_codes[3] = low, high
    min_codes = None
    if mins is not None:
        min_codes = random.integers(0, high + 1, groups).astype(np.uint8)
        min_codes[2], min_codes[3] = high, 0
    return with_supers(grid, codes, SuperBlocks(scales, scale_codes, mins, min_codes))


def assert_same(one: QTensor, other: QTensor) -> None:
    for name in ("codes", "scales", "mins"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.supers is None) == (other.supers is None)
    if one.supers is not None and other.supers is not None:
        for name in ("scales", "scale_codes", "mins", "min_codes"):
            ours, theirs = getattr(one.supers, name), getattr(other.supers, name)
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            assert ours is None or ours.dtype == theirs.dtype


def test_every_scalar_grid_of_ggml_has_a_layout() -> None:
    scalar = {name for name in GRIDS if GRIDS[name].kind == "ggml" and "iq" not in name}
    assert set(LAYOUTS) == scalar | {"iq4_nl", "iq4_xs"}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_readers_get_the_values_of_the_codes(name: str, seed: int) -> None:
    grid = GRIDS[name]
    tensor = random_tensor(grid, seed)
    packed = PACKER.pack(tensor)["data"]
    assert packed.shape[1] == PACKER.row_bytes(grid, COLUMNS)["data"]
    values = dequantize(tensor)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(grid.ggml_type))
    np.testing.assert_array_equal(theirs, values)
    np.testing.assert_array_equal(ggml.dequantize(packed, NAMED[name]), values)
    assert_same(PACKER.unpack({"data": packed}, grid, COLUMNS), tensor)


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_of_ggml_come_back_byte_by_byte(name: str) -> None:
    random = np.random.default_rng(5)
    rows = random.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    rows *= np.exp(random.standard_normal((ROWS, 1), dtype=np.float32))
    rows[0], rows[1] = 0, 1e-9
    theirs = libgguf.quantize_rows(rows, GRIDS[name].ggml_type)
    tensor = PACKER.unpack({"data": theirs}, GRIDS[name], COLUMNS)
    np.testing.assert_array_equal(PACKER.pack(tensor)["data"], theirs)
    np.testing.assert_array_equal(dequantize(tensor), ggml.dequantize(theirs, NAMED[name]))


def test_finished_blocks_pass_through() -> None:
    rows = np.random.default_rng(1).standard_normal((2, 256), dtype=np.float32)
    tensor = ggml.quantize(rows, GRIDS["iq3_s"])
    packed = PACKER.pack(tensor)
    assert packed["data"] is tensor.packed
    assert PACKER.unpack(packed, GRIDS["iq3_s"], 256).packed is tensor.packed


def test_a_scale_that_f16_cannot_hold_is_refused() -> None:
    tensor = random_tensor(GRIDS["q4_1"], 0)
    assert tensor.scales is not None
    assert tensor.mins is not None
    for field, values in (("scales", tensor.scales), ("mins", tensor.mins)):
        for wrong in (1 / 3, 1e6):
            other = values.copy()
            other[5, 2] = wrong
            with pytest.raises(TensorError, match="q4_1 is not exactly an f16"):
                PACKER.pack(replace(tensor, **{field: other}))
