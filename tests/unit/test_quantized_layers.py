"""GPTQ and AWQ weights against gptqmodel's own; what is damaged or in another layout is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.errors import SourceError, UnsupportedModel
from edgellm.source import open_source
from edgellm.source.quantized import READERS, UNREAD, awq, dequantized, gptq
from edgellm.source.safetensors_file import RawTensor, read_safetensors

LAYERS = Path(__file__).with_name("gptqmodel_layers.safetensors")
GPTQ_LAYERS = [f"gptq{bits}{order}" for bits in (2, 3, 4, 8) for order in ("", "_act_order")]

Tensors = dict[str, npt.NDArray[Any]]
WriteModel = Callable[..., Path]


def layer(name: str, **renamed: str) -> dict[str, RawTensor]:
    """The parts of layer ``name`` as those of a module ``m``; ``renamed`` says part = stored as."""
    file = read_safetensors(LAYERS)
    parts = [key.removeprefix(f"{name}.") for key in file.tensors if key.startswith(f"{name}.")]
    raw = {f"m.{part}": file.raw(f"{name}.{part}") for part in parts if "_v" not in part}
    del raw["m.expected"]
    return raw | {f"m.{part}": file.raw(f"{name}.{stored}") for part, stored in renamed.items()}


def expected(name: str) -> npt.NDArray[np.float32]:
    return read_safetensors(LAYERS).ref(f"{name}.expected").load()


@pytest.mark.parametrize(("layout", "version"), [("gptq", "v1"), ("gptq_v2", "v2")])
@pytest.mark.parametrize("name", GPTQ_LAYERS)
def test_a_gptq_weight_has_the_values_that_gptqmodel_computes(
    name: str, layout: str, version: str
) -> None:
    raw = layer(name, qzeros=f"qzeros_{version}")
    weight = gptq.read(raw, {"checkpoint_format": layout, "bits": 7}, "here")["m.weight"]
    assert (weight.shape, weight.dtype) == ((32, 64), f"gptq-{name[4]}bit")
    np.testing.assert_array_equal(weight.load(), expected(name))
    slabs = [weight.load(start, min(start + 5, 32)) for start in range(0, 32, 5)]
    np.testing.assert_array_equal(np.concatenate(slabs), expected(name))


def test_the_versions_of_the_format_are_not_taken_for_each_other() -> None:
    weight = gptq.read(layer("gptq4", qzeros="qzeros_v2"), {"bits": 4}, "here")["m.weight"]
    assert not np.array_equal(weight.load(), expected("gptq4"))


def test_a_gptq_weight_without_g_idx_has_its_groups_in_order() -> None:
    raw = layer("gptq3", qzeros="qzeros_v1")
    del raw["m.g_idx"]
    weight = gptq.read(raw, {"bits": 3}, "here")["m.weight"]
    np.testing.assert_array_equal(weight.load(), expected("gptq3"))


def test_an_awq_weight_has_the_values_that_gptqmodel_computes() -> None:
    weight = awq.read(layer("awq4"), {"version": "gemm", "bits": 4}, "here")["m.weight"]
    assert (weight.shape, weight.dtype) == ((32, 64), "awq-4bit")
    np.testing.assert_array_equal(weight.load(), expected("awq4"))
    slabs = [weight.load(start, min(start + 5, 32)) for start in range(0, 32, 5)]
    np.testing.assert_array_equal(np.concatenate(slabs), expected("awq4"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"is_marlin_format": True}, "layout 'marlin'"),
        ({"checkpoint_format": "bitblas"}, "layout 'bitblas'"),
    ],
)
def test_gptq_in_a_layout_for_one_kernel_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        gptq.read(layer("gptq4", qzeros="qzeros_v1"), settings, "here")


@pytest.mark.parametrize(
    "settings", [{"version": "gemv"}, {"version": "marlin"}, {"bits": 3}, {"version": "exllama"}]
)
def test_awq_in_another_layout_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="edgellm reads 'gemm' with 4"):
        awq.read(layer("awq4"), settings, "here")


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    raw = layer("gptq4", qzeros="qzeros_v1")
    del raw[f"m.{part}"]
    with pytest.raises(SourceError, match=f"m.{part} is missing"):
        gptq.read(raw, {"bits": 4}, "here")
    raw = layer("awq4")
    del raw[f"m.{part}"]
    with pytest.raises(SourceError, match=f"m.{part} is missing"):
        awq.read(raw, {}, "here")


def test_parts_of_different_models_are_refused() -> None:
    raw = layer("gptq4", qzeros="qzeros_v1")
    raw["m.qweight"] = layer("gptq8", qzeros="qzeros_v1")["m.qweight"]
    with pytest.raises(SourceError, match=r"do not fit together.*qweight \[16, 32\]"):
        gptq.read(raw, {"bits": 4}, "here")
    raw = layer("awq4") | {"m.qweight": layer("gptq4", qzeros="qzeros_v1")["m.qweight"]}
    with pytest.raises(SourceError, match="do not fit together"):
        awq.read(raw, {}, "here")


def test_a_group_that_does_not_exist_is_named(
    tmp_path: Path, to_safetensors: Callable[[Tensors], bytes]
) -> None:
    path = tmp_path / "order.safetensors"
    path.write_bytes(to_safetensors({"g_idx": np.full(64, 2, np.int32)}))
    raw = layer("gptq4", qzeros="qzeros_v1") | {"m.g_idx": read_safetensors(path).raw("g_idx")}
    weight = gptq.read(raw, {"bits": 4}, "here")["m.weight"]
    with pytest.raises(SourceError, match="g_idx names groups 2 to 2 and there are 2"):
        weight.load()


def test_tensors_that_are_not_quantized_stay_as_they_are() -> None:
    raw = layer("gptq4", qzeros="qzeros_v1")
    raw["norm.weight"] = read_safetensors(LAYERS).raw("gptq4.expected")
    found = gptq.read(raw, {"bits": 4}, "here")
    assert list(found) == ["m.weight", "norm.weight"]
    np.testing.assert_array_equal(found["norm.weight"].load(), expected("gptq4"))


@pytest.mark.parametrize("method", [*UNREAD, "something_new"])
def test_a_method_that_is_not_read_is_refused_by_name(method: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"\({re.escape(method)}\).*bf16, f16 or f32"):
        dequantized({}, {"quant_method": method}, "here")


def test_methods_are_named_as_transformers_names_them() -> None:
    assert not set(READERS) & set(UNREAD)
    with pytest.raises(UnsupportedModel, match="an unnamed method"):
        dequantized({}, {"bits": 4}, "here")
    assert dequantized({}, {"load_in_4bit": True}, "here") == {}


def test_a_config_that_is_quantized_over_weights_that_are_not_is_refused(
    tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(SourceError, match="says that the model is quantized and no tensor is"):
        open_source(str(path), quantized=True)


def test_a_quantized_folder_is_refused_unless_asked_for(
    tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors, quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModel, match=r"quantized already \(awq\).*quantized=True"):
        open_source(str(path))
