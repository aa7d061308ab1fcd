"""Codes of quantized checkpoints taken over onto other grids: the values are gptqmodel's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.errors import TensorError
from edgellm.export.packing import PACKERS
from edgellm.quant import floats
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS
from edgellm.quant.stored import (
    StoredCodes,
    codes_of,
    take_over,
    take_over_stacked,
    why_not,
)
from edgellm.source.quantized import awq, gptq
from edgellm.tensors import Array, TensorRef, derived, reordered, transposed

from .test_quantized_layers import expected, layer

ROWS, COLUMNS = 32, 64

PACKER = {"ggml": "ggml", "affine": "nbits", "per_channel": "dynamic", "codebook": "bnb4"}

HOLDERS_OF_ZEROS = ("int4-g32", "int4-g32-min", "int8")
HELD = {
    "gptq2": ("int4-g32-sym", *HOLDERS_OF_ZEROS, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    "gptq3": ("int4-g32-sym", *HOLDERS_OF_ZEROS, "q4_0", "q5_0", "q8_0"),
    "gptq4": (*HOLDERS_OF_ZEROS, "q5_0", "q8_0"),
    "awq4": (*HOLDERS_OF_ZEROS, "q5_0", "q8_0"),
}
"""Grids that hold each layer, whose groups of 32 have zeros."""

REFUSED = [
    ("gptq4", "int4-g32-sym", "they have zeros"),
    ("gptq4", "q4_0", "they have zeros"),
    ("gptq4", "q4_1", "zeros times scales are not f16"),
    ("gptq4", "int4-g64", "groups are shorter than int4-g64's"),
    ("gptq4", "int8-dynamic", "groups are shorter"),
    ("gptq4", "int4-g128", "groups of 128 do not divide rows of 64"),
    ("gptq4", "q4_k", "not made of integers with one scale"),
    ("gptq4", "nf4", "not made of integers"),
    ("gptq4_act_order", "int4-g32", "permuted"),
    ("gptq8", "int4-g32", "codes of 8 bits are too many"),
    ("gptq8", "q8_0", "they have zeros"),
]


def weight(name: str) -> TensorRef:
    if name.startswith("awq"):
        return awq.read(layer(name), {"bits": 4}, "here")["m.weight"]
    return gptq.read(layer(name, qzeros="qzeros_v1"), {"bits": 4}, "here")["m.weight"]


def stored(name: str) -> StoredCodes:
    codes = codes_of(weight(name))
    assert codes is not None
    return codes


def through_container(codes: StoredCodes, grid: str, start: int, stop: int) -> Array:
    """The values that a reader of ``grid``'s container gets, from what was packed for it."""
    packer = PACKERS["mlx" if grid.endswith("-min") else PACKER[GRIDS[grid].kind]]
    taken = take_over(codes, GRIDS[grid], start, stop)
    return dequantize(packer.unpack(packer.pack(taken), GRIDS[grid], taken.columns))


@pytest.mark.parametrize("name", HELD)
def test_every_grid_that_holds_the_codes_has_gptqmodels_values(name: str) -> None:
    exact: list[Array] = []
    for grid in HELD[name]:
        assert why_not(stored(name), GRIDS[grid]) == ""
        found = np.concatenate(
            [through_container(stored(name), grid, start, start + 8) for start in range(0, 32, 8)]
        )
        # gptqmodel rounds the product of step and scale to f16; the containers' readers do not.
        np.testing.assert_array_equal(floats.rounded(found, "f16"), expected(name), err_msg=grid)
        exact.append(found)
    for other in exact[1:]:
        np.testing.assert_array_equal(other, exact[0])
    codes = stored(name)
    quantized = [grid for grid in GRIDS if GRIDS[grid].kind != "float"]
    assert {grid for grid in quantized if not why_not(codes, GRIDS[grid])} == set(HELD[name])


@pytest.mark.parametrize(("name", "grid", "said"), REFUSED)
def test_what_a_grid_cannot_hold_is_said(name: str, grid: str, said: str) -> None:
    assert said in why_not(stored(name), GRIDS[grid])


def test_versions_of_gptq_and_rows_in_another_order_give_the_same_codes() -> None:
    second = gptq.read(layer("gptq4", qzeros="qzeros_v2"), {"checkpoint_format": "gptq_v2"}, "here")
    codes = codes_of(second["m.weight"])
    assert codes is not None
    whole = through_container(stored("gptq4"), "q5_0", 0, ROWS)
    np.testing.assert_array_equal(through_container(codes, "q5_0", 0, ROWS), whole)
    order = np.arange(ROWS).reshape(2, 16)[:, ::-1].reshape(-1)
    turned = reordered(weight("gptq4"), order)
    np.testing.assert_array_equal(turned.load(3, 20), expected("gptq4")[order[3:20]])
    codes = codes_of(turned)
    assert codes is not None
    np.testing.assert_array_equal(through_container(codes, "q5_0", 3, 20), whole[order[3:20]])


def test_parts_are_stacked_by_rows() -> None:
    parts = (weight("gptq4"), weight("awq4"))
    taken = take_over_stacked(parts, GRIDS["int4-g32"], 20, 50)
    wanted = np.concatenate([expected("gptq4"), expected("awq4")])[20:50]
    np.testing.assert_array_equal(floats.rounded(dequantize(taken), "f16"), wanted)


def test_whatever_changes_the_values_has_no_codes() -> None:
    ref = weight("gptq4")
    assert codes_of(ref) is not None
    assert codes_of(ref.with_role("blk.0.attn_q.weight")) is not None
    assert codes_of(derived(ref, lambda rows: rows * 2)) is None
    assert codes_of(transposed(ref)) is None
    assert codes_of(replace(ref, load_rows=lambda start, stop: ref.load(start, stop))) is None


def made(scale: float = 0.25, *, bits: int = 4, group: int = 128, **more: Any) -> StoredCodes:
    """Codes of 256 columns in groups, each group with another multiple of ``scale``."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (8, 256), np.uint8)
    scales = (scale * np.arange(1, 8 * 256 // group + 1, dtype=np.float32)).reshape(8, -1)
    return StoredCodes(
        values=lambda start, stop: values(codes, scales, group, bits)[start:stop],
        rows=8,
        bits=bits,
        codes=lambda start, stop: codes[start:stop],
        scales=lambda start, stop: scales[start:stop],
        groups=lambda: np.arange(256) // group,
        **more,
    )


def values(codes: npt.NDArray[np.uint8], scales: Array, group: int, bits: int) -> Array:
    return (codes.astype(np.float32) - 2 ** (bits - 1)) * scales.repeat(group, 1)


@pytest.mark.parametrize(
    ("bits", "group", "grid"),
    [
        (4, 128, "q4_0"), (4, 128, "q4_1"), (4, 128, "q8_0"), (4, 128, "int4-g64-sym"),
        (4, 128, "int4-g128"), (4, 256, "int4-g128-sym"), (8, 256, "q8_0"), (8, 256, "int8"),
        (8, 256, "int8-dynamic"), (8, 128, "q8_0"),
    ],
)  # fmt: skip
def test_a_longer_group_repeats_its_scale(bits: int, group: int, grid: str) -> None:
    codes = made(bits=bits, group=group)
    assert why_not(codes, GRIDS[grid]) == ""
    np.testing.assert_array_equal(through_container(codes, grid, 0, 8), codes(0, 8))


def test_scales_must_be_numbers_of_the_container() -> None:
    odd = made(1 + 2.0**-12)
    assert why_not(odd, GRIDS["int4-g32-sym"]) == ""
    assert "are not f16 numbers, as q4_0's are" in why_not(odd, GRIDS["q4_0"])
    in_hf = replace(GRIDS["int4-g32-sym"], scale_dtype="bf16")
    assert "are not bf16 numbers" in why_not(odd, in_hf)
    assert "are not f16 numbers" in why_not(made(1e5), GRIDS["q8_0"])
    assert why_not(made(2.0**-20), GRIDS["q4_0"]) == ""  # subnormal, and exact


def test_a_damaged_scale_is_named() -> None:
    infinite = np.full((8, 2), np.inf, np.float32)
    broken = replace(made(), scales=lambda start, stop: infinite[start:stop])
    with pytest.raises(TensorError, match="scales holds inf at row 0"):
        take_over(broken, GRIDS["int4-g128-sym"], 0, 8)


def test_levels_go_to_the_same_levels_alone() -> None:
    nf4 = made(group=64, codebook="nf4")
    assert why_not(nf4, GRIDS["nf4"]) == ""
    taken = take_over(nf4, GRIDS["nf4"], 0, 8)
    np.testing.assert_array_equal(taken.codes, nf4.codes(0, 8))
    assert "levels of nf4" in why_not(nf4, GRIDS["int4-g32"])
    assert "levels of fp4" in why_not(replace(nf4, codebook="fp4"), GRIDS["nf4"])
    assert "levels of nf4" in why_not(nf4, GRIDS["nf4-dq"])
