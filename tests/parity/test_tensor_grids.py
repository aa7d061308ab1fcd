"""Tensors on grids of their own: the bytes are the reference's, the graph computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from edgellm.artifact import open_artifact
from edgellm.conversion import convert
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.evaluation import session_logits
from edgellm.forward import window_logits
from edgellm.plan import make_plan
from edgellm.recipe import make_recipe
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import RunOptions
from edgellm.source import open_source

TinyModel = Callable[[str], Path]

WINDOW = (3, 17, 200, 45, 9, 311, 77, 12)


def test_a_gguf_tensor_has_the_bytes_of_the_type_that_was_named(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    named = {"blk.1.attn_v.weight": "q8_0", "blk.*.ffn_down.weight": "q5_1"}
    fields = {"source": str(source), "format": "gguf", "quant": "rtn:q4_0", "tensor_grids": named}
    convert(make_recipe(fields), tmp_path / "out", check=False)
    weights = open_source(str(source)).tensors
    types = gguf.GGMLQuantizationType
    for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors:
        if not tensor.name.startswith("blk.") or "norm" in tensor.name:
            continue
        kind = types.Q5_1 if "ffn_down" in tensor.name else types.Q4_0
        kind = types.Q8_0 if tensor.name == "blk.1.attn_v.weight" else kind
        assert tensor.tensor_type == kind, tensor.name
        if kind != types.Q4_0:
            expected = gguf.quantize(weights[tensor.name].load(0, weights[tensor.name].rows), kind)
            assert np.array_equal(tensor.data, expected), tensor.name


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_onnx_graph_whose_weights_are_all_named_floats_computes_the_source(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model(name)
    fields = {"source": str(source), "format": "onnx", "quant": "rtn:int4-g32"}
    convert(make_recipe({**fields, "tensor_grids": {"*": "f32"}}), tmp_path / "floats", check=False)
    session = runtime_named("onnxruntime").open(open_artifact(tmp_path / "floats"), RunOptions())
    [found] = session_logits(session, [WINDOW])
    [expected] = window_logits(open_source(str(source)), [WINDOW])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_parts_of_an_onnx_product_must_agree(tiny_model: TinyModel) -> None:
    fields = {"source": str(tiny_model("llama")), "format": "onnx", "quant": "rtn:int4-g32"}
    with pytest.raises(UnsupportedTarget, match="as one product"):
        make_plan(make_recipe({**fields, "tensor_grids": {"blk.0.attn_v.weight": "int8"}}))
    plan = make_plan(make_recipe({**fields, "tensor_grids": {"blk.0.attn_[qkv].weight": "int8"}}))
    grids = {tensor.name: tensor.grid.name for tensor in plan.layout.tensors}
    assert grids["blk.0.attn_qkv.weight"] == "int8"
    assert grids["blk.1.attn_qkv.weight"] == "int4-g32"


@pytest.mark.parametrize(
    ("container", "table", "message"),
    [
        ("gguf", {"blk.0.ffn_down.weight": "q6_k"}, "do not divide"),
        ("gguf", {"blk.0.ffn_down.weight": "int8"}, "GGUF has these codes with f16 scales alone"),
        ("gguf", {"blk.0.ffn_up.bias": "q8_0"}, "matches no weight"),
        ("gguf", {"blk.0.attn_norm.weight": "q8_0"}, "matches no weight"),
        ("onnx", {"blk.0.ffn_down.weight": "q6_k"}, "ONNX cannot hold it"),
        ("onnx", {"blk.0.ffn_down.weight": "int4-g64"}, "do not divide"),
        ("onnx", {"token_embd.weight": "nf4"}, "cannot look rows up"),
        ("hf", {"blk.0.ffn_down.weight": "int8"}, "one grid"),
    ],
)
def test_what_cannot_be_held_is_refused(
    container: str, table: dict[str, str], message: str, tiny_model: TinyModel
) -> None:
    quant = {"gguf": "rtn:q4_0", "onnx": "rtn:int4-g32", "hf": "rtn:int4-g32"}[container]
    fields = {"source": str(tiny_model("llama")), "format": container, "quant": quant}
    with pytest.raises((UnsupportedTarget, UsageError), match=message):
        make_plan(make_recipe({**fields, "tensor_grids": table}))


def test_a_table_has_one_grid_whoever_names_it(tiny_model: TinyModel) -> None:
    fields = {"source": str(tiny_model("llama")), "format": "gguf", "quant": "rtn:q4_0"}
    both = {**fields, "embed": "q8_0", "tensor_grids": {"token_embd.weight": "q5_1"}}
    with pytest.raises(UsageError, match="cannot be both q8_0"):
        make_plan(make_recipe(both))
