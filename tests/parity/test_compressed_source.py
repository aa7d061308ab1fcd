"""Weights that compressed-tensors stored, against what the library itself makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.errors import SourceError, UnsupportedModel
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS
from edgellm.quant.stored import codes_of, take_over, why_not
from edgellm.source.quantized import compressed
from edgellm.source.safetensors_file import RawTensor, read_safetensors

torch = pytest.importorskip("torch")

ROWS, COLUMNS = 20, 128
"""Rows that do not fill their last word of zeros."""

SCHEMES: dict[str, dict[str, Any]] = {
    "pack-quantized int4 in groups": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "pack-quantized int4 with zeros": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 64,
        "symmetric": False,
    },
    "pack-quantized int4 by rows": {"num_bits": 4, "strategy": "channel"},
    "pack-quantized int8 in groups": {"num_bits": 8, "strategy": "group", "group_size": 32},
    "pack-quantized int8 with zeros": {
        "num_bits": 8,
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
    "int-quantized int8 by rows": {"num_bits": 8, "strategy": "channel"},
    "int-quantized int8 with zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "int-quantized int8 in one": {"num_bits": 8, "strategy": "tensor"},
}


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[dict[str, RawTensor], Any]]:
    """``stored(name, dtype)``: a module ``m`` as the library compresses it, and as it reads it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import save_file

    def make(name: str, dtype: str) -> tuple[dict[str, RawTensor], Any]:
        scheme = QuantizationScheme(targets=["Linear"], weights=SCHEMES[name])
        compressor: Any = BaseCompressor.get_value_from_registry(name.split()[0])
        weights = SCHEMES[name]
        groups = {
            "group": (ROWS, COLUMNS // weights.get("group_size", COLUMNS)),
            "channel": (ROWS, 1),
            "tensor": (1,),
        }[weights["strategy"]]
        draw = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)
        state = {
            "weight": torch.randn(ROWS, COLUMNS, generator=draw).to(kind),
            "weight_scale": (0.01 + 0.1 * torch.rand(groups, generator=draw)).to(kind),
            "weight_zero_point": torch.zeros(groups, dtype=torch.int8),
        }
        if not weights.get("symmetric", True):
            half = 2 ** (weights["num_bits"] - 1)
            state["weight_zero_point"] = torch.randint(
                -half, half, groups, generator=draw, dtype=torch.int8
            )
        packed = compressor.compress(state, scheme)
        file = tmp_path / "m.safetensors"
        save_file({f"m.{part}": value.contiguous() for part, value in packed.items()}, file)
        opened = read_safetensors(file)
        raw = {part: opened.raw(part) for part in opened.tensors}
        return raw, compressor.decompress(packed, scheme)["weight"].float().numpy()

    return make


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_those_of_the_library(
    name: str, dtype: str, stored: Callable[..., tuple[dict[str, RawTensor], Any]]
) -> None:
    raw, expected = stored(name, dtype)
    weight = compressed.read(raw, {"format": name.split()[0]}, "here")["m.weight"]
    assert (weight.shape, weight.dtype) == ((ROWS, COLUMNS), f"ct-{SCHEMES[name]['num_bits']}bit")
    np.testing.assert_array_equal(weight.load(), expected)
    slabs = [weight.load(start, min(start + 3, ROWS)) for start in range(0, ROWS, 3)]
    np.testing.assert_array_equal(np.concatenate(slabs), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "grids"),
    [
        ("pack-quantized int4 in groups", "bfloat16", ("int4-g32-sym", "int4-g32", "int8", "q4_0")),
        ("pack-quantized int4 with zeros", "float16", ("int4-g32", "int4-g64", "q5_0", "q8_0")),
        ("pack-quantized int4 by rows", "float16", ("int4-g128-sym", "q4_0", "int8-dynamic")),
        ("pack-quantized int8 in groups", "float32", ("int8",)),
        ("int-quantized int8 by rows", "float16", ("int8", "int8-dynamic", "q8_0")),
        ("int-quantized int8 in one", "float16", ("int8", "int8-dynamic", "q8_0")),
        ("pack-quantized int8 with zeros", "float16", ()),
        ("int-quantized int8 with zeros", "float16", ()),
    ],
)
def test_codes_are_taken_over_with_the_librarys_values(
    name: str,
    dtype: str,
    grids: tuple[str, ...],
    stored: Callable[..., tuple[dict[str, RawTensor], Any]],
) -> None:
    raw, expected = stored(name, dtype)
    weight = compressed.read(raw, {"format": name.split()[0]}, "here")["m.weight"]
    codes = codes_of(weight)
    assert codes is not None
    for grid in grids:
        assert why_not(codes, GRIDS[grid]) == ""
        found = dequantize(take_over(codes, GRIDS[grid], 0, ROWS))
        rounded = torch.from_numpy(found).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(rounded, expected, grid)
    if not grids:
        assert "they have zeros" in why_not(codes, GRIDS["int8"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "float-quantized"}, "format 'float-quantized'"),
        ({}, "format 'dense'"),
        ({"format": "pack-quantized", "sparsity_config": {"format": "24"}}, "sparsity_config"),
        ({"format": "pack-quantized", "transform_config": {"groups": 1}}, "transform_config"),
    ],
)
def test_what_is_more_than_integers_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{said}.*dequantize=True"):
        compressed.read({}, settings, "here")


def test_damaged_weights_are_named(
    stored: Callable[..., tuple[dict[str, RawTensor], Any]],
) -> None:
    settings = {"format": "pack-quantized"}
    raw, _ = stored("pack-quantized int4 with zeros", "float16")
    for part in ("weight_packed", "weight_shape"):
        with pytest.raises(SourceError, match=f"m.{part}|m.weight is missing"):
            compressed.read({k: v for k, v in raw.items() if k != f"m.{part}"}, settings, "here")
    other, _ = stored("pack-quantized int8 in groups", "float16")
    with pytest.raises(SourceError, match="do not fit together"):
        compressed.read(raw | {"m.weight_packed": other["m.weight_packed"]}, settings, "here")
    with pytest.raises(UnsupportedModel, match="input_scale"):
        compressed.read(raw | {"m.input_scale": raw["m.weight_scale"]}, settings, "here")


def test_inputs_may_belong_to_groups_out_of_order(
    stored: Callable[..., tuple[dict[str, RawTensor], Any]], tmp_path: Path
) -> None:
    """As releases before 0.20 stored what was solved in the order of activations."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import save_file

    raw, _ = stored("pack-quantized int4 in groups", "float16")
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // 32
    packed = torch.from_numpy(raw["m.weight_packed"].read().view("<i4").reshape(ROWS, -1).copy())
    scales = torch.from_numpy(raw["m.weight_scale"].read().view("<f2").reshape(ROWS, -1).copy())
    codes = unpack_from_int32(packed, 4, torch.Size([ROWS, COLUMNS]))
    expected = (codes.half() * scales[:, order]).float().numpy()
    for name, indices, values in (
        ("order", order, expected),
        ("none", torch.full_like(order, -1), None),
        ("damaged", order + 1, None),
    ):
        save_file({"m.weight_g_idx": indices.int()}, tmp_path / f"{name}.safetensors")
        found = raw | {
            "m.weight_g_idx": read_safetensors(tmp_path / f"{name}.safetensors").raw(
                "m.weight_g_idx"
            )
        }
        weight = compressed.read(found, {"format": "pack-quantized"}, "here")["m.weight"]
        if name == "damaged":
            with pytest.raises(SourceError, match="groups 1 to 4 and there are 4"):
                weight.load()
        elif values is not None:
            np.testing.assert_array_equal(weight.load(), values)
        else:
            plain = compressed.read(raw, {"format": "pack-quantized"}, "here")["m.weight"]
            np.testing.assert_array_equal(weight.load(), plain.load())
