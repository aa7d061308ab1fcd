"""Codes in the layouts of transformers' quantized checkpoints, against the libraries' own code.

GPTQ and AWQ against layers that gptqmodel packed (``tests/unit/make_gptqmodel_layers.py``), the
others against compressed-tensors and bitsandbytes as they are installed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.errors import TensorError, UnsupportedTarget
from edgellm.export.hf_layouts import LAYOUTS
from edgellm.export.packing import PACKERS
from edgellm.quant import floats
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS, Grid, QTensor
from edgellm.quant.rtn import solve
from edgellm.source.safetensors_file import read_safetensors

LAYERS = Path(__file__).parents[1] / "unit" / "gptqmodel_layers.safetensors"

CELLS = [(layout, grid) for layout, held in LAYOUTS.items() for grid in held]

NUMPY = {"I32": "<i4", "I64": "<i8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1"}

ROWS, COLUMNS = 40, 384
"""Three groups of 128, an odd number; five words of outputs."""


def awkward_rows(columns: int = COLUMNS) -> npt.NDArray[np.float32]:
    """Normal values with a zero row, an outlier, a row of one sign, and rows huge and tiny."""
    rows = np.random.default_rng(0).normal(size=(ROWS, columns)).astype(np.float32)
    rows[2] = 0
    rows[3, 4] = 30
    rows[5] = np.abs(rows[5])
    rows[7] *= 100
    rows[8] *= np.float32(1e-9)
    return rows


def grid_of(layout: str, name: str) -> Grid:
    return dataclasses.replace(GRIDS[name], scale_dtype=LAYOUTS[layout][name].scale_dtype or "f16")


def stored(layout: str, tensor: QTensor) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a module ``m`` of the checkpoint, made from slabs of eight rows."""
    storage = LAYOUTS[layout][tensor.grid.name]
    assert tensor.codes is not None
    rows, columns = tensor.codes.shape
    packed = PACKERS[storage.packer.format(dtype="f16")].pack(tensor)
    result = {}
    for part in storage.parts(rows, columns, tensor.grid, "f16"):
        content = part.content or np.ascontiguousarray(packed[part.component]).tobytes()
        result[part.suffix] = np.frombuffer(content, NUMPY[part.dtype]).reshape(part.shape)
    return result


@pytest.mark.parametrize(("layout", "name"), CELLS)
def test_what_was_packed_is_read_back(layout: str, name: str) -> None:
    grid = grid_of(layout, name)
    rows = awkward_rows()
    tensor = solve(rows, grid)
    storage = LAYOUTS[layout][name]
    packer = PACKERS[storage.packer.format(dtype="f16")]
    found = packer.unpack(packer.pack(tensor), grid, COLUMNS)
    np.testing.assert_array_equal(found.codes, tensor.codes)
    if name == "int8-dynamic" and layout == "bitsandbytes":
        np.testing.assert_array_max_ulp(found.scales, tensor.scales, 2)
    else:
        np.testing.assert_array_equal(found.scales, tensor.scales)
        np.testing.assert_array_equal(dequantize(found), dequantize(tensor))
    assert (found.zeros is None) == (tensor.zeros is None)


@pytest.mark.parametrize(("layout", "name"), CELLS)
def test_bytes_of_rows_are_those_that_the_parts_take(layout: str, name: str) -> None:
    grid = grid_of(layout, name)
    storage = LAYOUTS[layout][name]
    sizes = PACKERS[storage.packer.format(dtype="f16")].row_bytes(grid, COLUMNS)
    for part in storage.parts(ROWS, COLUMNS, grid, "f16"):
        if part.component in sizes:
            nbytes = np.dtype(NUMPY[part.dtype]).itemsize * int(np.prod(part.shape))
            assert nbytes == sizes[part.component] * -(-ROWS // part.rows_each), part


@pytest.mark.parametrize(("layout", "name"), CELLS)
def test_scales_are_rounded_before_codes_are_chosen(layout: str, name: str) -> None:
    """A code is the nearest to the weight with the scale that is stored."""
    grid = grid_of(layout, name)
    if grid.kind == "codebook":
        pytest.skip("codes of nf4 go by the exact magnitude, as bitsandbytes chooses them")
    rows = awkward_rows()
    tensor = solve(rows, grid)
    assert tensor.scales is not None
    assert tensor.codes is not None
    np.testing.assert_array_equal(floats.rounded(tensor.scales, grid.scale_dtype), tensor.scales)
    error = np.abs(dequantize(tensor) - rows)
    for step in (-1, 1):
        codes = np.clip(tensor.codes.astype(int) + step, 0, 2 ** int(grid.bits) - 1)
        moved = dataclasses.replace(tensor, codes=codes.astype(np.uint8))
        other = np.abs(dequantize(moved) - rows)
        if grid.kind == "per_channel":
            other[codes == 0] = np.inf  # -128 is not used there
        slack = 1e-5 * np.abs(tensor.scales).repeat(COLUMNS // tensor.scales.shape[1], axis=1)
        assert (error <= other + slack).all()


def test_scales_that_were_not_rounded_are_not_stored() -> None:
    tensor = solve(awkward_rows(), GRIDS["int4-g32-sym"])
    tensor = dataclasses.replace(tensor, grid=grid_of("gptq", "int4-g32-sym"))
    with pytest.raises(ValueError, match="does not heed"):
        PACKERS["gptq"].pack(tensor)


def test_weights_beyond_the_scales_are_refused() -> None:
    rows = awkward_rows() * np.float32(1e6)
    with pytest.raises(TensorError, match="does not fit f16"):
        solve(rows, grid_of("gptq", "int4-g32-sym"))


def layer(name: str, *parts: str) -> dict[str, npt.NDArray[np.uint8]]:
    """Parts of a layer of gptqmodel as components: lines of bytes."""
    file = read_safetensors(LAYERS)
    components = {}
    for component, part in zip(("data", "zeros", "scales"), parts, strict=True):
        raw = file.raw(f"{name}.{part}")
        components[component] = raw.read().reshape(raw.shape[0], -1)
    return components


@pytest.mark.parametrize(
    ("packer", "name", "zeros"), [("gptq_v2", "gptq4", "qzeros_v2"), ("awq", "awq4", "qzeros")]
)
def test_a_layer_of_gptqmodel_comes_out_as_gptqmodel_packed_it(
    packer: str, name: str, zeros: str
) -> None:
    components = layer(name, "qweight", zeros, "scales")
    grid = dataclasses.replace(GRIDS["int4-g32"], scale_dtype="f16")
    tensor = PACKERS[packer].unpack(components, grid, 64)
    expected = read_safetensors(LAYERS).ref(f"{name}.expected").load()
    np.testing.assert_array_equal(floats.rounded(dequantize(tensor), "f16"), expected)
    packed = PACKERS[packer].pack(tensor)
    for component, content in components.items():
        np.testing.assert_array_equal(packed[component], content)


def test_zeros_of_version_1_are_those_of_gptqmodel() -> None:
    grid = dataclasses.replace(GRIDS["int4-g32"], scale_dtype="f16")
    tensor = PACKERS["gptq_v2"].unpack(layer("gptq4", "qweight", "qzeros_v2", "scales"), grid, 64)
    with pytest.raises(UnsupportedTarget, match=r"zero of 0.*gptq_v2"):  # the row of one sign
        PACKERS["gptq"].pack(tensor)
    assert tensor.codes is not None
    assert tensor.scales is not None
    assert tensor.zeros is not None
    cut = dataclasses.replace(
        tensor, codes=tensor.codes[8:], scales=tensor.scales[8:], zeros=tensor.zeros[8:]
    )
    theirs = layer("gptq4", "qweight", "qzeros_v1", "scales")["zeros"][:, 4:]
    np.testing.assert_array_equal(PACKERS["gptq"].pack(cut)["zeros"], theirs)


def symmetric_twin(tensor: QTensor) -> QTensor:
    """The same values on the grid that has zeros, all of them in the middle."""
    assert tensor.scales is not None
    zeros = np.full(tensor.scales.shape, 8, np.uint8)
    grid = dataclasses.replace(tensor.grid, name=tensor.grid.name[:-4], symmetric=False)
    return dataclasses.replace(tensor, grid=grid, zeros=zeros)


@pytest.mark.parametrize("packer", ["gptq", "gptq_v2", "awq"])
def test_symmetric_grids_store_the_zero_in_the_middle(packer: str) -> None:
    tensor = solve(awkward_rows(), grid_of("gptq", "int4-g128-sym"))
    packed, twin = PACKERS[packer].pack(tensor), PACKERS[packer].pack(symmetric_twin(tensor))
    for component, content in packed.items():
        np.testing.assert_array_equal(content, twin[component])


@pytest.mark.parametrize(
    ("layout", "name"), [cell for cell in CELLS if cell[0] == "compressed-tensors"]
)
def test_compressed_tensors_decompresses_to_the_values(layout: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    grid = grid_of(layout, name)
    tensor = solve(awkward_rows(), grid)
    config = QuantizationConfig.model_validate(LAYOUTS[layout][name].config(grid, "f16", []))
    state = {
        suffix.removeprefix("."): torch.from_numpy(values.copy())
        for suffix, values in stored(layout, tensor).items()
    }
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    scheme = config.config_groups["group_0"]
    weight = compressor.decompress(state, scheme)["weight"]
    assert weight.dtype == torch.float16
    expected = floats.rounded(dequantize(tensor), "f16")
    np.testing.assert_array_equal(weight.float().numpy(), expected)
    assert set(compressor.compression_param_names(scheme)) == set(state)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_bitsandbytes_reads_the_values_of_4_bit_blocks(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    rows = floats.rounded(awkward_rows(), dtype)
    tensor = solve(rows, GRIDS[name])
    storage = LAYOUTS["bitsandbytes"][name]
    packed = PACKERS[storage.packer.format(dtype=dtype)].pack(tensor)
    state = {}
    for part in storage.parts(ROWS, COLUMNS, tensor.grid, dtype):
        content = part.content or np.ascontiguousarray(packed[part.component]).tobytes()
        values = np.frombuffer(content, NUMPY[part.dtype]).reshape(part.shape)
        state[part.suffix] = torch.from_numpy(values.copy())
    weight = state.pop(".weight")
    read = functional.QuantState.from_dict(
        {suffix.removeprefix(".weight."): value for suffix, value in state.items()}, "cpu"
    )
    assert read.dtype == {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    found = functional.dequantize_4bit(weight, read).float().numpy()
    np.testing.assert_array_equal(found, floats.rounded(dequantize(tensor), dtype))
    # And the same as bitsandbytes itself would have stored.
    theirs, own = functional.quantize_4bit(
        torch.from_numpy(rows), quant_type="nf4", compress_statistics=name == "nf4-dq"
    )
    np.testing.assert_array_equal(weight.numpy(), theirs.numpy())
    if name == "nf4":
        np.testing.assert_array_equal(read.absmax.numpy(), own.absmax.numpy())
    else:
        compare_doubled(read, own)
    ours = json.loads(state_text(read.as_dict(packed=True)))
    said = json.loads(state_text(own.as_dict(packed=True)))
    for text in (ours, said):
        text.pop("nested_offset", None)
    assert ours == said | {"dtype": ours["dtype"]}


def state_text(parts: Mapping[str, Any]) -> bytes:
    return bytes(parts["quant_state.bitsandbytes__nf4"].numpy())


def compare_doubled(read: Any, own: Any) -> None:
    """Scales rounded twice, apart from what bitsandbytes' kernel for the CPU does otherwise.

    It takes the neighbour of a level where a value lies half way (``test_quantized_bases``), and
    the mean hangs on the order of its sum.
    """
    assert abs(read.offset - own.offset) <= np.spacing(np.float32(own.offset))
    np.testing.assert_allclose(
        read.state2.absmax.numpy(), own.state2.absmax.numpy(), rtol=0, atol=4e-6
    )
    apart = np.abs(read.absmax.numpy().astype(int) - own.absmax.numpy().astype(int))
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= 0.02 * apart.size


def test_bitsandbytes_reads_the_values_of_8_bit_rows() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    tensor = solve(awkward_rows(), grid_of("bitsandbytes", "int8-dynamic"))
    module = stored("bitsandbytes", tensor)
    found = functional.int8_vectorwise_dequant(
        torch.from_numpy(module[".weight"].copy()), torch.from_numpy(module[".SCB"].copy())
    )
    # It multiplies codes by 127 scales, then by 1/127: two roundings more.
    np.testing.assert_array_max_ulp(found.numpy(), dequantize(tensor), 3)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_gptqmodel_computes_the_values(layout: str) -> None:
    """Where it is installed: it wants a newer torch than the other tests, and a compiler."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    name = "int4-g64-sym" if layout == "gptq" else "int4-g64"
    tensor = solve(awkward_rows(), grid_of(layout, name))
    module = {
        suffix[1:]: torch.from_numpy(v.copy()) for suffix, v in stored(layout, tensor).items()
    }
    expected = floats.rounded(dequantize(tensor), "f16")
    np.testing.assert_array_equal(gptqmodel_values(layout, module).T, expected)


def gptqmodel_values(layout: str, module: dict[str, Any]) -> npt.NDArray[np.float32]:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    if layout == "awq":
        values = dequantize_gemm(
            module["qweight"], module["qzeros"], module["scales"], bits=4, group_size=64
        )
        return values.float().numpy()
    linear = TorchLinear(
        bits=4,
        group_size=64,
        sym=layout == "gptq",
        desc_act=False,
        in_features=COLUMNS,
        out_features=ROWS,
    )
    for part, value in module.items():
        getattr(linear, part).copy_(value)
    if layout == "gptq":
        convert_gptq_v1_to_v2_format_module(linear, bits=4, pack_dtype=torch.int32)
    return linear.dequantize_weight().float().numpy()
