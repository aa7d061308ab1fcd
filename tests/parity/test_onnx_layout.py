"""What is written, on which grid and where; what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import onnx_files

from edgellm.errors import SourceError, UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.layout import Layout
from edgellm.export.onnx_graph import PAGE_BYTES, SMALL_BYTES, VECTOR_BYTES
from edgellm.export.to_onnx import CONTAINER, lay_out
from edgellm.recipe import Recipe
from edgellm.source import open_source

TinyModel = Callable[[str], Path]


def laid_out(folder: Path, quant: str, **fields: Any) -> Layout:
    return lay_out(open_source(str(folder)), Recipe(source="", quant=quant, **fields))


def grids(layout: Layout) -> dict[str, str]:
    return {tensor.name: tensor.grid.name for tensor in layout.tensors if tensor.rows > 1}


def model_of(layout: Layout) -> onnx.ModelProto:
    return onnx.load_model_from_string(layout.files["model.onnx"])


def test_every_grid_is_laid_out(tiny_model: TinyModel) -> None:
    for name in CONTAINER.grids:
        layout = laid_out(tiny_model("llama-256"), name)
        assert grids(layout)["blk.0.attn_output.weight"] == name
    assert CONTAINER.default_grid in CONTAINER.grids


def test_the_model_is_valid_and_of_the_stated_versions(tiny_model: TinyModel) -> None:
    model = model_of(laid_out(tiny_model("gpt2"), "int4-g32"))
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions == {"": 21, "com.microsoft": 1}
    assert model.ir_version == 10
    names = [given.name for given in model.graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "logits_from"]
    assert names[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    outputs = {value.name for value in model.graph.output}
    assert {"logits", "present.0.key", "present.2.value"} <= outputs
    levels = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert set(levels) == {4}


def test_arrays_lie_apart_and_aligned_in_a_file_of_the_stated_size(tiny_model: TinyModel) -> None:
    layout = laid_out(tiny_model("llama-256"), "int4-g64")
    end = 0
    for array in sorted(
        (array for tensor in layout.tensors for array in tensor.arrays), key=lambda a: a.offset
    ):
        assert array.offset >= end
        assert array.offset % (PAGE_BYTES if array.nbytes >= SMALL_BYTES else VECTOR_BYTES) == 0
        end = array.offset + array.nbytes
    assert layout.data_files == {"model.onnx.data": end}


def test_every_byte_that_the_graph_names_is_written(tiny_model: TinyModel) -> None:
    layout = laid_out(tiny_model("qwen2"), "int4-g32")
    written = {(str(array.offset), str(array.nbytes)) for t in layout.tensors for array in t.arrays}
    named = set()
    for initializer in model_of(layout).graph.initializer:
        place = {entry.key: entry.value for entry in initializer.external_data}
        if place:
            named.add((place["offset"], place["length"]))
    assert named == written


def test_defaults_and_choices_of_embedding_and_head(tiny_model: TinyModel) -> None:
    tied, untied = tiny_model("qwen2"), tiny_model("llama")
    assert grids(laid_out(tied, "int4-g32"))["token_embd.weight"] == "int8"
    assert "output.weight" not in grids(laid_out(tied, "int4-g32"))
    both = grids(laid_out(untied, "int4-g32", head="int4-g32"))
    assert (both["token_embd.weight"], both["output.weight"]) == ("int8", "int4-g32")
    # One named grid is meant for both where they are one tensor.
    for choice in ({"head": "int4-g32-sym"}, {"embed": "int4-g32-sym"}):
        chosen = grids(laid_out(tied, "int4-g32", **choice))
        assert chosen["token_embd.weight"] == "int4-g32-sym"
        assert "output.weight" not in chosen
    apart = grids(laid_out(tied, "int4-g32", embed="int4-g32", head="int8"))
    assert (apart["token_embd.weight"], apart["output.weight"]) == ("int4-g32", "int8")
    assert grids(laid_out(tied, "f16"))["token_embd.weight"] == "f16"
    assert grids(laid_out(tied, "int8-dynamic"))["token_embd.weight"] == "int8"


def test_a_tied_head_on_a_grid_that_cannot_be_looked_up(tiny_model: TinyModel) -> None:
    chosen = grids(laid_out(tiny_model("qwen2"), "int4-g32", head="int8-dynamic"))
    assert (chosen["token_embd.weight"], chosen["output.weight"]) == ("int8", "int8-dynamic")
    with pytest.raises(UnsupportedTarget, match=r"cannot look rows up from nf4; choose .*int8"):
        laid_out(tiny_model("qwen2"), "nf4", embed="nf4")


def test_a_group_that_leaves_part_of_a_row_is_refused_with_those_that_do_not(
    tiny_model: TinyModel,
) -> None:
    """Rows of 96 and 160; those of 192 fit."""
    message = (
        r"int4-g64 has groups of 64 values, which do not divide the rows of 12 tensors: "
        r"blk.0.attn_qkv.weight \(96\), .*\. Choose int4-g32, int4-g32-sym, int8"
    )
    with pytest.raises(UnsupportedTarget, match=message):
        laid_out(tiny_model("llama"), "int4-g64")


@pytest.mark.parametrize(
    ("quant", "error", "message"),
    [
        ("int4-g33", UnknownGrid, "no grid of that name for ONNX; did you mean int4-g32"),
        ("q4_k_m", UnsupportedTarget, "ggml.s own.*--format gguf"),
        ("q4_k", UnsupportedTarget, "ggml's own.*--format gguf"),
        ("q4_0", UnsupportedTarget, "int4-g32-sym"),
        ("q4_1", UnsupportedTarget, "integer zeros.*int4-g32"),
        ("bf16", UnsupportedTarget, "use f16 or f32"),
    ],
)
def test_grids_that_onnx_lacks_are_refused(
    quant: str, error: type[Exception], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(error, match=message):
        laid_out(tiny_model("llama"), quant)


def test_the_context_may_be_capped(tiny_model: TinyModel) -> None:
    layout = laid_out(tiny_model("llama"), "f32", context=40)
    assert layout.context_length == 40
    assert any("capped at 40" in note for note in layout.notes)
    (rope,) = (tensor for tensor in layout.tensors if tensor.name.endswith(".cos"))
    assert rope.rows == 40
    config = json.loads(layout.files["genai_config.json"])
    assert config["model"]["context_length"] == config["search"]["max_length"] == 40


def test_the_context_may_not_be_stretched(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="choose at most 256"):
        laid_out(tiny_model("llama"), "f32", context=257)


def test_sampling_defaults_that_are_no_numbers_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(SourceError, match="temperature is 'hot'"):
        laid_out(folder, "f32")


def test_slow_or_inexact_grids_say_so(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama-256")
    assert any("slower" in note for note in laid_out(folder, "nf4").notes)
    assert any("f32" in note for note in laid_out(folder, "f16").notes)
    assert laid_out(folder, "int4-g32").notes == ()


def test_the_folder_holds_what_other_programs_look_for(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    onnx_files.write_onnx(tiny_model("llama"), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    wanted = {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"}
    assert wanted <= names
