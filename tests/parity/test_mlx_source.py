"""MLX folders as sources: those of mlx-lm's own quantizer, and ours, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

import edgellm
from edgellm.errors import SourceError, UnsupportedModel
from edgellm.manifest import read_manifest
from edgellm.source import open_source

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def theirs(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``theirs(model, group, bits)``: a tiny model as mlx-lm itself converts it."""
    from mlx_lm.convert import convert

    made: dict[tuple[str, int, int], Path] = {}

    def make(name: str, group: int, bits: int) -> Path:
        key = (name, group, bits)
        if key not in made:
            # A config as mlx-lm understands it, which passes over transformers 5's rope.
            start = tmp_path_factory.mktemp("start") / name
            edgellm.convert(tiny_model(name), start, format="mlx", quant="f32", check=False)
            made[key] = tmp_path_factory.mktemp("mlx") / f"{name}-{bits}"
            convert(str(start), str(made[key]), quantize=True, q_group_size=group, q_bits=bits)
        return made[key]

    return make


def values_of(folder: Path) -> dict[str, np.ndarray]:
    """What MLX dequantizes in float32, by module."""
    arrays = mx.load(str(folder / "model.safetensors"))
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    found = {}
    for name in arrays:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            own = settings.get(module, settings)
            words, *rest = (arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
            wide = (each.astype(mx.float32) for each in rest)
            found[module] = np.array(
                mx.dequantize(words, *wide, group_size=own["group_size"], bits=own["bits"])
            )
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("group", "bits"), [(32, 2), (32, 3), (64, 4), (32, 5), (32, 6), (64, 8)])
def test_values_are_those_that_mlx_dequantizes(
    name: str, group: int, bits: int, theirs: Callable[..., Path]
) -> None:
    folder = theirs(name, group, bits)
    source = open_source(str(folder), quantized=True)
    wanted = values_of(folder)
    by_name = {
        row.source.replace("transformer.", "model.").removesuffix(".weight"): source.tensors[
            row.role
        ]
        for row in source.family.tensors(source.decoder)
        if row.role in source.tensors
    }
    assert wanted.keys() <= by_name.keys()
    for module, values in wanted.items():
        ref = by_name[module]
        assert ref.dtype == f"mlx-{bits}bit"
        np.testing.assert_allclose(ref.load(), values, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(ref.load_rows(3, 5), ref.load()[3:5])


def test_codes_go_into_q4_1_as_they_are(theirs: Callable[..., Path], tmp_path: Path) -> None:
    """A longer group repeats its scale and minimum."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = theirs("llama", 64, 4)
    half = tmp_path / "half"
    # mlx-lm left float32 scales, which q4_1 has no room for; f16 ones are the usual case.
    _halved(folder, half)
    out = tmp_path / "out"
    edgellm.convert(half, out, format="gguf", threads=1)
    artifact = read_manifest(out).artifact
    assert artifact.recipe["quant"].endswith("q4_1")
    found = open_source(str(out / artifact.main_file), quantized=True)
    for module, values in values_of(half).items():
        role = {row.source: row.role for row in found.family.tensors(found.decoder)}
        ref = found.tensors[role[f"{module}.weight"]]
        np.testing.assert_allclose(ref.load(), values, rtol=0, atol=1e-7)


def test_a_bf16_folder_of_mlx_lm_keeps_its_codes(
    theirs: Callable[..., Path], tmp_path: Path
) -> None:
    """As most of those on the Hub are; an embedding of 4 bits is kept where that is asked."""
    folder, out = tmp_path / "bf16", tmp_path / "out"
    _halved(theirs("llama", 32, 4), folder, mx.bfloat16)
    tables = {"embed": "int4-g32-min", "head": "int4-g32-min"}
    edgellm.convert(folder, out, format="mlx", threads=1, check=False, **tables)
    before, after = (mx.load(str(each / "model.safetensors")) for each in (folder, out))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert mx.array_equal(array, after[key]), key


def _halved(folder: Path, out: Path, dtype: Any = mx.float16) -> None:
    arrays = mx.load(str(folder / "model.safetensors"))
    tiny_models.copy_of(folder, out)
    halves = {
        name: each if each.dtype == mx.uint32 else each.astype(dtype)
        for name, each in arrays.items()
    }
    mx.save_safetensors(str(out / "model.safetensors"), halves, metadata={"format": "mlx"})


@pytest.mark.parametrize("quant", ["f32", "rtn:int4-g32-min", "rtn:int8"])
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "gemma3", "gpt2", "qwen2"])
def test_what_we_wrote_is_read_back(
    name: str, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source, out = tiny_model(name), tmp_path / "out"
    edgellm.convert(source, out, format="mlx", quant=quant, threads=1)
    found = open_source(str(out), quantized=True)
    assert found.decoder == open_source(str(source)).decoder
    if quant == "f32":
        return
    # Without a grid asked for, what it is stored in is kept.
    edgellm.convert(out, tmp_path / "again", format="mlx", threads=1, check=False)
    before, after = (mx.load(str(each / "model.safetensors")) for each in (out, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert mx.array_equal(array, after[key]), key


def test_factors_of_a_gguf_file_come_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    gguf = edgellm.convert(tiny_model("llama"), tmp_path / "gguf", format="gguf", quant="f32")
    out = tmp_path / "out"
    edgellm.convert(gguf.main, out, format="mlx", quant="f32", threads=1)
    ids = tiny_models.some_token_ids(40)
    wanted = tiny_models.reference_logits(tiny_model("llama"), ids)
    model, _ = mlx_lm.load(str(out))
    np.testing.assert_allclose(np.array(model(mx.array([ids])))[0], wanted, rtol=0, atol=1e-3)
    ropes = [open_source(str(each)).decoder.layers[0].rope for each in (gguf.main, out)]
    assert ropes[0] == ropes[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "mxfp4", "group_size": 32, "bits": 4}, "mxfp4"),
        ({"group_size": 32, "bits": 7}, "7 bits"),
    ],
)
def test_modes_that_are_not_read_are_refused(
    settings: dict[str, object], said: str, theirs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_models.copy_of(theirs("llama", 64, 4), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=said):
        open_source(str(folder), quantized=True)


def test_a_group_that_does_not_fit_the_words_is_damage(
    theirs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_models.copy_of(theirs("llama", 64, 4), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["group_size"] = config["quantization_config"]["group_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="belong"):
        open_source(str(folder), quantized=True)
