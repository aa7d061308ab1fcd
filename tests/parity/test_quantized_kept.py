"""Quantized folders converted: the artifact stands for the values of the source, bit by bit.

Readers of the source round the product of a step and its scale to the dtype of the scales, readers
of GGUF and ONNX do not: values are compared after that rounding, and are exact before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models

import edgellm
from edgellm.export.layout import OutputTensor
from edgellm.export.packing import PACKERS
from edgellm.manifest import read_manifest
from edgellm.plan import Plan, make_plan
from edgellm.quant import floats
from edgellm.quant.dequantize import dequantize
from edgellm.recipe import Recipe
from edgellm.source import ModelSource, open_source

TinyModel = Callable[[str], Path]
Folder = Callable[[str, str], Path]

KEPT = [
    # layout and grid of the source, container and grid that it is converted to without --quant
    ("gptq", "int4-g128-sym", "onnx", "int4-g128-sym"),
    ("gptq", "int4-g128-sym", "gguf", "q4_0"),
    ("gptq_v2", "int4-g64", "onnx", "int4-g64"),
    ("gptq_v2", "int4-g64", "gguf", "q5_0"),
    ("awq", "int4-g128", "onnx", "int4-g128"),
    ("awq", "int4-g128", "gguf", "q5_0"),
    ("compressed-tensors", "int4-g32", "onnx", "int4-g32"),
    ("compressed-tensors", "int4-g64-sym", "gguf", "q4_0"),
    ("compressed-tensors", "int8", "onnx", "int8"),
    ("compressed-tensors", "int8-dynamic", "gguf", "q8_0"),
    ("bitsandbytes", "nf4", "onnx", "nf4"),
    ("bitsandbytes", "nf4-dq", "onnx", "nf4"),
    ("gptq", "int4-g128-sym", "hf", "int4-g128-sym"),
]

ASKED = [
    # the same with --quant
    ("gptq", "int4-g128-sym", "onnx", "rtn:int4-g32-sym"),
    ("gptq", "int4-g128-sym", "gguf", "q8_0"),
    ("gptq", "int4-g128-sym", "gguf", "q4_1"),
    ("awq", "int4-g128", "gguf", "q8_0"),
    ("awq", "int4-g128", "onnx", "int8"),
    ("compressed-tensors", "int8-dynamic", "onnx", "int8-dynamic"),
    ("bitsandbytes", "int8-dynamic", "onnx", "int8-dynamic"),
]

AGAIN = [
    ("gptq", "int4-g128-sym", "gguf", "q4_k_m", "q4_k is not made of integers with one scale"),
    ("awq", "int4-g128", "gguf", "q4_0", "they have zeros, and q4_0 has no room for them"),
    ("awq", "int4-g128", "onnx", "int4-g64-sym", "they have zeros"),
    ("bitsandbytes", "nf4", "gguf", "iq4_nl", "iq4_nl does not have the levels of nf4"),
    ("bitsandbytes", "int8-dynamic", "gguf", "q8_0", "scales are not f16 numbers"),
    ("gptq", "int4-g128-sym", "gguf", "awq:q4_0", "awq scales weights before they are rounded"),
]


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The llama whose rows every group divides, as a Hugging Face folder in a layout."""
    made: dict[tuple[str, str], Path] = {}

    def convert(layout: str, grid: str) -> Path:
        if (layout, grid) not in made:
            out = tmp_path_factory.mktemp("stored") / f"{layout}-{grid}"
            edgellm.convert(
                tiny_model("llama-256"), out, format="hf", layout=layout, quant=f"rtn:{grid}",
                threads=2, check=False,
            )  # fmt: skip
            (out / "manifest.json").unlink()  # as a folder that somebody else made
            made[layout, grid] = out
        return made[layout, grid]

    return convert


def plan_of(source: Path, container: str, quant: str | None) -> Plan:
    return make_plan(Recipe(source=str(source), format=container, quant=quant), threads=2)


def converted(source: Path, out: Path, container: str, quant: str | None = None) -> Plan:
    """The plan, once it was carried out."""
    edgellm.convert(source, out, format=container, quant=quant, threads=2, check=False)
    return plan_of(source, container, quant)


def read_back(out: Path, tensor: OutputTensor) -> npt.NDArray[np.float32]:
    """What a reader of the container makes of the bytes of ``tensor``."""
    components = {}
    for array in tensor.arrays:
        content = np.fromfile(out / array.file, np.uint8, array.nbytes, offset=array.offset)
        whole = array.rows_each > 1 or array.lines > 1
        components[array.component] = content if whole else content.reshape(tensor.rows, -1)
    unpack = PACKERS[tensor.packer].unpack
    return dequantize(unpack(components, tensor.grid, tensor.columns))


def check_values(out: Path, plan: Plan, dtype: str) -> int:
    """Compare every tensor whose codes were kept with the values of the source; their number."""
    kept = [tensor for tensor in plan.layout.tensors if tensor.keeps_codes]
    for tensor in kept:
        wanted = np.concatenate([part.load() for part in tensor.parts])
        found = read_back(out, tensor)
        if dtype == "int8":  # LLM.int8() multiplies in another order
            np.testing.assert_array_max_ulp(found, wanted, 2)
        else:
            np.testing.assert_array_equal(floats.rounded(found, dtype), wanted, tensor.name)
    return sum(len(tensor.parts) for tensor in kept)


@pytest.mark.parametrize(("layout", "grid", "container", "to"), KEPT)
def test_codes_are_kept_without_being_asked_for(
    layout: str, grid: str, container: str, to: str, folder: Folder, tmp_path: Path
) -> None:
    plan = converted(folder(layout, grid), tmp_path / "out", container)
    assert plan.recipe.grid == to
    assert any("codes of" in reason and "as they are" in reason for reason in plan.reasons)
    assert check_values(tmp_path / "out", plan, "f16") == 14
    assert f"the codes of 14 stored weights are kept as they are, as {to}" in plan.notes
    assert plan.notes[1:] == read_manifest(tmp_path / "out").artifact.notes[1 : len(plan.notes)]
    assert plan.calibration is None


@pytest.mark.parametrize(("layout", "grid", "container", "to"), ASKED)
def test_codes_are_kept_on_any_grid_that_holds_them(
    layout: str, grid: str, container: str, to: str, folder: Folder, tmp_path: Path
) -> None:
    plan = converted(folder(layout, grid), tmp_path / "out", container, to)
    dtype = "int8" if layout == "bitsandbytes" else "f16"
    assert check_values(tmp_path / "out", plan, dtype) == 14


@pytest.mark.parametrize(("layout", "grid", "container", "to", "why"), AGAIN)
def test_what_cannot_be_kept_is_dequantized_first_and_said(
    layout: str, grid: str, container: str, to: str, why: str, folder: Folder
) -> None:
    plan = plan_of(folder(layout, grid), container, to)
    assert not any(tensor.keeps_codes for tensor in plan.layout.tensors)
    said = [note for note in plan.notes if "dequantized and rounded again" in note]
    assert sum(int(note.split()[0]) for note in said) == 14
    assert any(why in note for note in said)


def test_llamacpp_finds_the_rows_of_queries_where_it_looks(folder: Folder, tmp_path: Path) -> None:
    """Its rows of q and k come in pairs: they are read back by our source, through libgguf."""
    source = folder("gptq", "int4-g128-sym")
    converted(source, tmp_path / "out", "gguf")
    found = open_source(str(tmp_path / "out" / "model.gguf"))
    wanted: ModelSource = open_source(str(source), quantized=True)
    for role, ref in wanted.tensors.items():
        if ref.dtype.startswith("gptq"):
            assert found.tensors[role].dtype == "q4_0"
            values = floats.rounded(found.tensors[role].load(), "f16")
            np.testing.assert_array_equal(values, ref.load(), role)


def test_a_permuted_order_of_groups_is_dequantized(folder: Folder, tmp_path: Path) -> None:
    source = tiny_models.copy_of(folder("gptq", "int4-g128-sym"), tmp_path / "permuted")
    header = json.loads(_header(source / "model.safetensors"))
    start = 8 + len(_header(source / "model.safetensors"))
    name = "model.layers.0.mlp.gate_proj.g_idx"
    low, high = (start + offset for offset in header[name]["data_offsets"])
    content = bytearray((source / "model.safetensors").read_bytes())
    order = np.frombuffer(bytes(content[low:high]), "<i4")
    content[low:high] = order[np.random.default_rng(0).permutation(len(order))].tobytes()
    (source / "model.safetensors").write_bytes(content)
    plan = plan_of(source, "gguf", None)
    assert plan.recipe.grid == "q4_0"
    again = [tensor.name for tensor in plan.layout.tensors if not tensor.keeps_codes]
    assert [name for name in again if "blk" in name and "norm" not in name] == [
        "blk.0.ffn_gate.weight"
    ]
    assert any(
        note.startswith("1 stored weight is dequantized") and "permuted (g_idx)" in note
        for note in plan.notes
    )


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
