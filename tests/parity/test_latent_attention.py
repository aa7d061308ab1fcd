"""Latent attention (MLA): what is cached, what GGUF stores apart, and what solvers make of it.

Logits and statistics are compared with transformers' and llama.cpp's where those of all families
are (``test_onnx_logits``, ``test_gguf_logits``, ``test_calibration_pass``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import onnx_files
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

import edgellm
from edgellm.architectures.gguf_latent import apart, made_whole
from edgellm.conversion import convert
from edgellm.errors import AdapterError, TensorError, UnsupportedTarget
from edgellm.export import to_gguf
from edgellm.export.packing import PACKERS
from edgellm.plan import make_plan
from edgellm.profiling.artifacts import artifact_facts
from edgellm.quant.imatrix_file import read_imatrix, write_imatrix
from edgellm.quant.rtn import solve
from edgellm.recipe import Recipe
from edgellm.runtimes.ort import OnnxRuntime
from edgellm.runtimes.session import RunOptions
from edgellm.source import ModelSource, open_source
from edgellm.tensors import stacked_rows

TinyModel = Callable[[str], Path]

STORED_APART = ("deepseek_v2", "deepseek_v2-lite")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("minicpm3", 32 + 16),
        ("minicpm3-plain", 48),
        ("deepseek_v2", 96 + 8),
        ("deepseek_v3", 96 + 8),
    ],
)
def test_a_token_takes_a_latent_and_its_turned_values(
    name: str, values: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Expanded, its keys and values would be 672 and 216 values a layer."""
    artifact = edgellm.convert(
        tiny_model(name), tmp_path / "out", format="onnx", quant="f32", check=False
    )
    assert artifact.manifest is not None
    facts = artifact.manifest.artifact.model
    assert (facts.kv_head_count, facts.head_dim) == (1, values)
    session = OnnxRuntime().open(artifact, RunOptions(context_tokens=128))
    ids = tiny_models.some_token_ids(100)
    found = [session.prefill(ids[:70], all_logits=True), session.prefill(ids[70:90]).copy()]
    found += [session.decode(token)[np.newaxis].copy() for token in ids[90:]]
    caches = session.save().data
    taken = session.kv_bytes()
    session.close()
    # One memory for both keys and values of each layer.
    assert [each.shape for each in caches] == [(1, 1, 100, values)] * 3
    assert taken == 4 * 3 * 128 * values
    wanted = tiny_models.reference_logits(tiny_model(name), ids)
    wanted = np.concatenate([wanted[:70], wanted[89:]])
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=2e-4)


# --- GGUF


@pytest.mark.parametrize("name", STORED_APART)
def test_stacks_and_the_whole_are_the_same_in_slabs_of_any_size(
    name: str, tiny_model: TinyModel
) -> None:
    source = open_source(str(tiny_model(name)))
    decoder, role = source.decoder, "blk.1.attn_kv_b.weight"
    latent, whole = decoder.latent, source.tensors[role]
    assert latent is not None
    keys, values = apart(whole, decoder)
    by_head = whole.load().reshape(decoder.heads, latent.head_rows, latent.rank)
    wanted = by_head[:, : latent.plain_dim].swapaxes(1, 2).reshape(keys.shape)
    np.testing.assert_array_equal(keys.load(), wanted)
    np.testing.assert_array_equal(
        values.load(), by_head[:, latent.plain_dim :].reshape(values.shape)
    )
    slabs = [keys.load(start, min(start + 37, keys.rows)) for start in range(0, keys.rows, 37)]
    np.testing.assert_array_equal(np.concatenate(slabs), keys.load())
    again = made_whole(keys, values, decoder.heads, latent)
    slabs = [again.load(start, min(start + 41, again.rows)) for start in range(0, again.rows, 41)]
    np.testing.assert_array_equal(np.concatenate(slabs), whole.load())


@pytest.mark.parametrize("mixture", ["q4_k_m", "q3_k_l", "q4_0", "q2_k", "iq4_xs", "q5_k_s"])
@pytest.mark.parametrize("name", ["minicpm3", "deepseek_v2", "deepseek_v3"])
def test_types_are_those_that_llamacpp_chooses(
    name: str, mixture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from llamacpp_quantizer import types_of_llamacpp

    gguf_files.write_gguf(tiny_model(name), tmp_path / "model.gguf")
    theirs = types_of_llamacpp(tmp_path / "model.gguf", mixture)
    layout = to_gguf.lay_out(
        open_source(str(tiny_model(name))), Recipe(source="", format="gguf", quant=mixture)
    )
    ours = {tensor.name: tensor.grid.name for tensor in layout.tensors}
    assert theirs == {name: grid for name, grid in ours.items() if grid != "f32"}


def as_before_april_2025(source: ModelSource) -> ModelSource:
    """``source`` as llama.cpp's converter wrote it before stacks: the cache is expanded there."""
    decoder, layout = source.decoder, source.family.gguf_layout
    latent = decoder.latent
    assert latent is not None
    absorbed_alone = ("key_length_mla", "value_length_mla")
    expanded = {
        "attention.head_count_kv": decoder.heads,
        "attention.key_length": decoder.head_dim,
        "attention.value_length": latent.value_dim,
    }

    def keys(decoder: Any) -> dict[str, Any]:
        found = layout.keys(decoder) | expanded
        return {key: value for key, value in found.items() if not key.endswith(absorbed_alone)}

    older = replace(layout, absorbed=False, keys=keys)
    return replace(source, family=replace(source.family, gguf=older))


def test_files_of_before_stacks_are_read_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    """And are such files: llama.cpp answers from one as transformers does."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import llamacpp_logits

    folder, path = tiny_model("deepseek_v2-lite"), tmp_path / "model.gguf"
    source = open_source(str(folder))
    layout = to_gguf.lay_out(
        as_before_april_2025(source), Recipe(source="", format="gguf", quant="f32")
    )
    content = bytearray(layout.data_files[to_gguf.FILE])
    head = layout.files[to_gguf.FILE]
    content[: len(head)] = head
    for tensor in layout.tensors:
        (array,) = tensor.arrays
        packed = PACKERS[tensor.packer].pack(
            solve(stacked_rows(tensor.parts, 0, tensor.rows), tensor.grid)
        )["data"]
        content[array.offset : array.offset + array.nbytes] = packed.tobytes()
    path.write_bytes(content)
    ids = tiny_models.some_token_ids(40)
    np.testing.assert_allclose(
        llamacpp_logits.logits(path, ids),
        tiny_models.reference_logits(folder, ids),
        rtol=0,
        atol=3e-4,
    )
    again = open_source(str(path), quantized=True)
    assert again.decoder.latent == source.decoder.latent
    for role, ref in source.tensors.items():
        np.testing.assert_array_equal(again.tensors[role].load(), ref.load(), err_msg=role)


def test_importance_that_is_only_of_other_inputs_is_not_asked_for(tiny_model: TinyModel) -> None:
    """Inputs of ``attn_k_b`` differ by head: types that need importance have none there."""
    source = open_source(str(tiny_model("deepseek_v2")))
    wide = "blk.0.attn_k_b.weight"
    recipe = Recipe(
        source="", format="gguf", quant="imatrix:q4_k_m", tensor_grids={wide: "iq3_xxs"}
    )
    with pytest.raises(UnsupportedTarget, match="iq3_xxs has blocks of 256"):
        to_gguf.lay_out(source, recipe)
    recipe = Recipe(source="", format="gguf", quant="imatrix:q4_k_m", tensor_grids={wide: "q8_0"})
    grids = {each.role: each.grid.name for each in to_gguf.lay_out(source, recipe).tensors}
    assert grids[wide] == "q8_0"


def test_importance_of_values_is_what_llamacpp_asks_for(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Its quantizer rounds ``attn_v_b`` otherwise by it, and we read of it what we wrote."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import gguf
    from llamacpp_quantizer import quantize_with_llamacpp

    folder, file, name = tiny_model("deepseek_v2"), tmp_path / "given.gguf", "blk.1.attn_v_b.weight"
    recipe = Recipe(
        source=str(folder), format="gguf", quant="imatrix:q4_0", calibration_tokens=1024
    )
    convert(recipe, tmp_path / "out", check=False, save_imatrix=file)
    saved = read_imatrix(file)
    assert not any("attn_kv_b" in role for role in saved.importance)
    gguf_files.write_gguf(folder, tmp_path / "model.gguf")
    made = []
    for importance in (None, {name: saved.importance[name]}):
        path = tmp_path / f"made-{len(made)}.gguf"
        assert quantize_with_llamacpp(tmp_path / "model.gguf", path, "q4_0", importance=importance)
        (tensor,) = (each for each in gguf.GGUFReader(path).tensors if each.name == name)
        made.append(np.array(tensor.data))
    assert np.any(made[0] != made[1])

    decoder = open_source(str(folder)).decoder
    again = Recipe(source=str(folder), format="gguf", quant="imatrix:q4_0", imatrix=str(file))
    calibration = make_plan(again).calibration
    assert calibration is not None
    assert calibration.given is not None
    assert calibration.notes == ()
    by_head = saved.importance[name].reshape(decoder.heads, -1)
    found = calibration.given.statistics["blk.1.attn_kv_b.weight"].mean_squares
    np.testing.assert_allclose(found, by_head[0], rtol=1e-6)

    importance = saved.importance | {"blk.1.attn_k_b.weight": np.ones(8, np.float32)}
    factors = np.arange(decoder.heads, dtype=np.float32)[:, np.newaxis]
    importance[name] = (by_head * factors).reshape(-1)
    write_imatrix(file, importance, tokens=saved.tokens[name], chunk_tokens=64)
    calibration = make_plan(again).calibration
    assert calibration is not None
    assert calibration.given is not None
    assert "blk.1.attn_k_b.weight, whose inputs differ by head" in calibration.notes[0]
    found = calibration.given.statistics["blk.1.attn_kv_b.weight"].mean_squares
    np.testing.assert_allclose(found, by_head[0] * (decoder.heads - 1) / 2, rtol=1e-5)
    importance[name] = importance[name][:-1]
    write_imatrix(file, importance, tokens=9, chunk_tokens=9)
    with pytest.raises(TensorError, match=r"blk\.1\.attn_v_b.*another model"):
        make_plan(again)


def test_adapters_that_llamacpp_would_pass_over_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from peft import LoraConfig
    from peft_adapters import make_adapter

    from edgellm.export.gguf_adapter import factors
    from edgellm.lora.reading.open import open_adapter

    base = tiny_model("minicpm3")
    for module, refused in (("kv_b_proj", True), ("q_a_proj", True), ("o_proj", False)):
        config = LoraConfig(r=4, target_modules=[module])
        made = make_adapter(base, config, tmp_path / module)
        adapter = open_adapter(str(made.folder))
        if refused:
            with pytest.raises(AdapterError, match=r"which llama\.cpp adds no product to"):
                factors(open_source(str(base)), adapter)
        else:
            assert len(factors(open_source(str(base)), adapter)) == 3


# --- rounding


@pytest.mark.parametrize(
    ("name", "format", "grid"),
    [
        ("minicpm3", "gguf", "q4_0"),
        ("deepseek_v2", "gguf", "q4_0"),
        ("deepseek_v2-lite", "onnx", "int4-g32"),
        ("deepseek_v3", "gguf", "q4_0"),
    ],
)
def test_solvers_and_couplings_lose_less_than_plain_rounding(
    name: str, format: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    divergence = {}
    for solver in ("rtn", "gptq", "awq+gptq"):
        artifact = edgellm.convert(
            tiny_model(name),
            tmp_path / solver,
            format=format,
            quant=f"{solver}:{grid}",
            check_tokens=256,
            threads=1,
            **({} if solver == "rtn" else {"calibration_tokens": 2048}),
        )
        assert artifact.manifest is not None
        divergence[solver] = artifact.manifest.measured["quality"]["kld_mean"]
    assert divergence["gptq"] < divergence["rtn"]
    assert divergence["awq+gptq"] < divergence["rtn"]


@pytest.mark.parametrize("name", ["minicpm3", "deepseek_v2-lite"])
def test_layers_behind_rounded_ones_are_read_back_from_stacks(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Calibrating on what rounded layers give, which are read from the file that is written."""
    artifact = edgellm.convert(
        tiny_model(name),
        tmp_path / "out",
        format="gguf",
        quant="gptq:q4_0",
        calibration_tokens=1024,
        calibrate_on="quantized",
        check=False,
        threads=1,
    )
    errors = artifact.manifest.measured["calibration"]["output_error_by_tensor"]  # type: ignore[union-attr]
    stacked = "blk.1.attn_v_b.weight" if "deepseek" in name else "blk.1.attn_kv_b.weight"
    assert 0 < errors[stacked] < 0.2
    assert "blk.1.attn_k_b.weight" not in errors


def test_what_is_multiplied_by_head_stays_in_floats_in_onnx(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    layout = onnx_files.write_onnx(tiny_model("minicpm3"), tmp_path, "int4-g32")
    grids = {tensor.role: tensor.grid.name for tensor in layout.tensors}
    assert grids["blk.0.attn_kv_b.weight"] == "f16"
    assert any("attn_kv_b stays in f16" in note for note in layout.notes)
    layout = onnx_files.write_onnx(tiny_model("minicpm3"), tmp_path / "f32", "f32")
    grids = {tensor.role: tensor.grid.name for tensor in layout.tensors}
    assert grids["blk.0.attn_kv_b.weight"] == "f32"


# --- rows in another order, and rows in tensors of their own


@pytest.mark.parametrize("name", ["deepseek_v2", "cohere", "gpt_neox", "bloom", "stablelm-normed"])
def test_a_rounded_folder_is_run_in_the_order_of_its_checkpoint(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """By torch, which is given the values that codes stand for: 0.6 to 5 nats where it is not, and
    found up to 0.14 where it is."""
    pytest.importorskip("torch", reason="torch is not installed")
    artifact = edgellm.convert(
        tiny_model(name), tmp_path / "out", format="hf", quant="rtn:int8", check_tokens=256
    )
    assert artifact.manifest is not None
    quality = artifact.manifest.measured["quality"]
    assert quality["runtime"] == "torch"
    assert quality["kld_mean"] < 0.2


@pytest.mark.parametrize("name", ["cohere-normed", "stablelm-normed", "deepseek_v2-lite"])
def test_a_folder_of_floats_is_the_model_it_was(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    edgellm.convert(folder, tmp_path / "out", format="hf", quant="f32", check=False)
    ids = tiny_models.some_token_ids(40)
    np.testing.assert_array_equal(
        tiny_models.reference_logits(tmp_path / "out", ids),
        tiny_models.reference_logits(folder, ids),
    )


@pytest.mark.parametrize(
    ("name", "format", "kept"),
    [
        ("minicpm3", "onnx", 32 + 16),
        ("minicpm3", "gguf", 6 * (32 + 16 + 64)),  # which llama.cpp expands
        ("deepseek_v2", "gguf", 96 + 8),
    ],
)
def test_a_profile_knows_what_a_token_takes_in_each_container(
    name: str, format: str, kept: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    artifact = edgellm.convert(
        tiny_model(name), tmp_path / "out", format=format, quant="f32", check=False
    )
    assert artifact_facts(artifact).kv_values == 3 * kept


@pytest.mark.parametrize("name", ["minicpm3", "deepseek_v2", "deepseek_v3"])
def test_transformers_keeps_latents_too(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    import torch

    artifact = edgellm.convert(
        tiny_model(name), tmp_path / "out", format="hf", quant="f32", check=False
    )
    ids = torch.tensor([tiny_models.some_token_ids(5)])
    with torch.no_grad():
        cache = tiny_models.load(artifact.path)(ids, use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert artifact_facts(artifact).kv_values == kept / 5


@pytest.mark.parametrize("name", ["minicpm3", "deepseek_v2", "deepseek_v2-lite"])
def test_adapters_merge_as_peft_does(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    import peft_adapters
    import torch
    from peft import LoraConfig

    queries = ["q_proj"] if name.endswith("lite") else ["q_a_proj", "q_b_proj"]
    modules = [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    live = peft_adapters.trained(tiny_model(name), config)
    live.save_pretrained(tmp_path / "adapter")
    artifact = edgellm.convert(
        tiny_model(name),
        tmp_path / "out",
        format="onnx",
        quant="f32",
        adapters=[str(tmp_path / "adapter")],
        check=False,
    )
    ids = tiny_models.some_token_ids(40)
    with torch.no_grad():
        wanted = live(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(onnx_files.logits(artifact.path, ids), wanted, rtol=0, atol=2e-4)
    plain = tiny_models.reference_logits(tiny_model(name), ids)
    assert np.abs(plain - wanted).max() > 0.1


def test_layers_that_guess_further_tokens_are_left_out(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As they stand in DeepSeek-V3's own checkpoints, behind the last layer."""
    folder = tiny_models.copy_of(tiny_model("deepseek_v3"), tmp_path / "guessing")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    last = config["num_hidden_layers"]
    tensors |= {
        name.replace(f"layers.{last - 1}.", f"layers.{last}."): values + 1
        for name, values in tensors.items()
        if f"layers.{last - 1}." in name
    }
    tensors[f"model.layers.{last}.eh_proj.weight"] = np.ones((192, 384), np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TensorError, match=rf"no place .*layers\.{last}\."):
        open_source(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    source = open_source(str(folder))
    assert any("guess further tokens" in note for note in source.notes)
    plain = open_source(str(tiny_model("deepseek_v3")))
    assert source.tensors.keys() == plain.tensors.keys()
    assert source.config["num_nextn_predict_layers"] == 0
