"""onnxruntime's own operators read back, bit by bit, the values that were rounded and packed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnxruntime
from onnx import TensorProto, helper

from edgellm.export import onnx_operators
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.packing import PACKERS
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS, Grid, QTensor
from edgellm.quant.rtn import solve
from edgellm.tensors import constant

Build = Callable[[GraphBuilder, str, object, str], str]

ROWS, COLUMNS = 37, 256

NBITS = [grid for grid in GRIDS.values() if grid.kind == "affine" and not grid.minima]


def awkward_rows(columns: int = COLUMNS) -> np.ndarray:
    """Rows with zeros, constants, outliers and one sign only among ordinary ones."""
    rows = np.random.default_rng(5).standard_normal((ROWS, columns)).astype(np.float32)
    rows[3] = 0
    rows[4] = 1.5
    rows[5] = -np.abs(rows[5])
    rows[6] = np.abs(rows[6]) + 2
    rows[7, ::50] *= 100
    rows[8] *= 1e-12
    return rows


def evaluate(
    tensor: QTensor, rows: np.ndarray, packer: str, value: np.ndarray, add: Build
) -> np.ndarray:
    """What ``add`` computes from ``value`` and the packed tensor."""
    graph = GraphBuilder("test")
    stored = graph.store("w", [constant("w", rows)], tensor.grid, packer)
    packed = PACKERS[packer].pack(tensor)
    element = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph.input("x", element, value.shape)
    add(graph, "x", stored, "y")
    graph.output("y", TensorProto.FLOAT, [None, None])
    model = helper.make_model(graph.graph(), opset_imports=graph.opsets(), ir_version=10)
    for array in stored.arrays:
        content = packed[array.component]
        assert content.dtype == np.uint8
        assert content.shape == (ROWS, array.row_bytes)
        for initializer in model.graph.initializer:
            place = {entry.key: entry.value for entry in initializer.external_data}
            if place.get("offset") == str(array.offset):
                initializer.ClearField("external_data")
                initializer.data_location = TensorProto.DEFAULT
                initializer.raw_data = content.tobytes()
    for node in model.graph.node:  # products of floats by the very values, not of int8
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (result,) = session.run(None, {"x": value})
    return np.asarray(result)


def multiplied(tensor: QTensor, rows: np.ndarray, grid: Grid) -> np.ndarray:
    """The identity times the packed weight, turned back to ``[rows, columns]``."""
    operators = onnx_operators.operators_of(grid)

    def add(graph: GraphBuilder, x: str, stored: object, name: str) -> str:
        return operators.matmul(graph, x, stored, name, None)  # type: ignore[arg-type]

    identity = np.eye(rows.shape[1], dtype=np.float32)
    return evaluate(tensor, rows, operators.packer, identity, add).T


@pytest.mark.parametrize("grid", NBITS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("columns", [128, 384])
def test_matmulnbits_reads_the_values(grid: Grid, columns: int) -> None:
    """384: an odd number of blocks of 128, so that the last byte of 4-bit zeros is half empty."""
    rows = awkward_rows(columns)
    tensor = solve(rows, grid)
    np.testing.assert_array_equal(multiplied(tensor, rows, grid), dequantize(tensor))


@pytest.mark.parametrize("grid", NBITS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("columns", [128, 384])
def test_gatherblockquantized_reads_the_values(grid: Grid, columns: int) -> None:
    rows = awkward_rows(columns)
    tensor = solve(rows, grid)
    gather = onnx_operators.operators_of(grid).gather
    ids = np.arange(ROWS, dtype=np.int64)
    got = evaluate(tensor, rows, "nbits", ids, gather)  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, dequantize(tensor))


def test_matmulbnb4_reads_the_values() -> None:
    rows = awkward_rows()
    tensor = solve(rows, GRIDS["nf4"])
    np.testing.assert_array_equal(multiplied(tensor, rows, GRIDS["nf4"]), dequantize(tensor))


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_floats_are_read_as_they_are(name: str) -> None:
    rows = awkward_rows()
    tensor = solve(rows, GRIDS[name])
    wanted = rows.astype({"f32": np.float32, "f16": np.float16}[name]).astype(np.float32)
    np.testing.assert_array_equal(multiplied(tensor, rows, GRIDS[name]), wanted)
    gather = onnx_operators.operators_of(GRIDS[name]).gather
    ids = np.arange(ROWS, dtype=np.int64)
    got = evaluate(tensor, rows, "float", ids, gather)  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, wanted)


def test_dynamicquantizematmul_reads_the_codes() -> None:
    """Activations are rounded too: 0 and 1 are among the values of their 8-bit grid (1/255 apart).

    The product 255 * (1/255) may miss 1 by an ulp, and so the values.
    """
    rows = awkward_rows()
    grid = GRIDS["int8-dynamic"]
    tensor = solve(rows, grid)
    np.testing.assert_allclose(multiplied(tensor, rows, grid), dequantize(tensor), rtol=3e-7)


@pytest.mark.parametrize("columns", [64, 192])
def test_one_byte_layout_serves_both_a_product_and_a_look_up(columns: int) -> None:
    """Codes, scales and zeros of a tied embedding are the same bytes: names differ, offsets not."""
    graph = GraphBuilder("test")
    stored = graph.store("w", [constant("w", awkward_rows(columns))], GRIDS["int4-g32"], "nbits")
    operators = onnx_operators.operators_of(GRIDS["int4-g32"])
    assert operators.gather is not None
    operators.gather(graph, "ids", stored, "rows")
    operators.matmul(graph, "x", stored, "logits", None)
    places: dict[str, set[str]] = {}
    for initializer in graph.graph().initializer:
        place = {entry.key: entry.value for entry in initializer.external_data}
        places.setdefault(place["offset"], set()).add(initializer.name)
    assert sorted(map(len, places.values())) == [1, 1, 2]


def test_the_test_sees_a_wrong_order_of_nibbles() -> None:
    rows = awkward_rows()
    tensor = solve(rows, GRIDS["int4-g32"])
    swapped = QTensor(
        tensor.grid,
        tensor.columns,
        codes=tensor.codes.reshape(-1, 2)[:, ::-1].reshape(rows.shape),  # type: ignore[union-attr]
        scales=tensor.scales,
        zeros=tensor.zeros,
    )
    assert (multiplied(swapped, rows, GRIDS["int4-g32"]) != dequantize(tensor)).any()


@pytest.mark.parametrize("name", [*(grid.name for grid in NBITS), "int8-dynamic", "nf4"])
def test_what_was_packed_is_unpacked_bit_by_bit(name: str) -> None:
    grid = GRIDS[name]
    tensor = solve(awkward_rows(), grid)
    packer = PACKERS[onnx_operators.operators_of(grid).packer]
    again = packer.unpack(packer.pack(tensor), grid, COLUMNS)
    assert np.array_equal(again.codes, tensor.codes)
    assert np.array_equal(dequantize(again), dequantize(tensor))
