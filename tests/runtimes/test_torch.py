"""What the torch runtime alone does: every layout of a Hugging Face folder, folders of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models

import edgellm
from edgellm.answers import open_answers
from edgellm.artifact import open_artifact
from edgellm.errors import (
    GenerationError,
    RuntimeMissing,
    SourceError,
    UnsupportedModel,
    UnsupportedTarget,
)
from edgellm.evaluation_text import Passage
from edgellm.hardware import Fact, Gpu, Hardware, detect
from edgellm.runtimes import pytorch, runtime_named
from edgellm.runtimes.session import RunOptions

pytest.importorskip("transformers", reason="transformers is not installed")

TinyModel = Callable[[str], Path]

HERE = dataclasses.replace(detect(), apple_silicon=Fact(False, "test"), gpus=Fact((), "test"))
MAC = dataclasses.replace(HERE, apple_silicon=Fact(True, "test"))
CUDA = dataclasses.replace(HERE, gpus=Fact((Gpu("RTX", "NVIDIA"),), "test"))
IDS = tiny_models.some_token_ids(40)

LAYOUTS = [
    ("gptq", "int4-g32-sym"),
    ("gptq_v2", "int4-g64"),
    ("awq", "int4-g128"),
    ("compressed-tensors", "int8"),
    ("bitsandbytes", "nf4-dq"),
    ("bitsandbytes", "int8-dynamic"),
]


@pytest.mark.parametrize(
    ("packages", "hardware", "devices", "said"),
    [
        ({"torch": "2.13.0+cpu", "transformers": "5.23.0"}, CUDA, ("cpu",), "on torch 2.13.0"),
        ({"torch": "2.13.0", "transformers": "5.23.0"}, CUDA, ("cuda", "cpu"), "on torch 2.13.0"),
        ({"torch": "2.13.0", "transformers": "5.23.0"}, MAC, ("metal", "cpu"), "on torch"),
        ({"torch": "2.13.0"}, HERE, (), "not installed: pip install"),
        ({"torch": "2.13.0", "transformers": "4.57.1"}, HERE, (), "older than 5.0.0"),
    ],
)
def test_packages_decide_what_it_can_do(
    packages: dict[str, str],
    hardware: Hardware,
    devices: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pytorch, "installed_version", lambda package: packages.get(package, ""))
    found = pytorch.TorchRuntime().capabilities(hardware)
    assert (found.available, found.devices) == (bool(devices), devices)
    assert said in found.reason


@pytest.mark.parametrize(("layout", "grid"), LAYOUTS)
def test_quantized_folders_compute_with_the_values_of_their_codes(
    layout: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Against the float network of onnxruntime, which reads the folder as well."""
    out = tmp_path / "out"
    edgellm.convert(
        tiny_model("llama-256"), out, format="hf", layout=layout, quant=f"rtn:{grid}", check=False
    )
    wanted = next(iter(open_answers(str(out), runtime="float").logits([Passage(tuple(IDS), 0)])))
    with edgellm.open(out, threads=1) as chat:
        assert (chat.session.runtime, chat.session.device) == ("torch", "cpu")
        found = chat.session.prefill(IDS, all_logits=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3-pattern"])
def test_folders_of_others_run_unverified(name: str, tiny_model: TinyModel) -> None:
    with edgellm.open(tiny_model(name), threads=1) as chat:
        assert any("unverified" in note for note in chat.notes)
        found = chat.session.prefill(IDS, all_logits=True)
    wanted = tiny_models.reference_logits(tiny_model(name), IDS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_a_quantized_gpt2_has_its_conv1d_the_right_way_round(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    edgellm.convert(
        tiny_model("gpt2"), out, format="hf", quant="rtn:int4-g32-sym", layout="gptq", check=False
    )
    (out / "manifest.json").unlink()
    wanted = next(iter(open_answers(str(out), runtime="float").logits([Passage(tuple(IDS), 0)])))
    with edgellm.open(out, threads=1) as chat:
        found = chat.session.prefill(IDS, all_logits=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


def test_a_folder_is_evaluated_by_torch_where_that_is_asked_for(tiny_model: TinyModel) -> None:
    passage = Passage(tuple(IDS), 0)
    named, unnamed = (
        next(iter(open_answers(str(tiny_model("llama")), runtime=runtime).logits([passage])))
        for runtime in ("torch", None)
    )
    np.testing.assert_allclose(named, unnamed, rtol=0, atol=1e-3)


def test_without_torch_the_next_steps_are_named(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "installed_version", lambda package: "")
    with pytest.raises(RuntimeMissing, match=r"edgellm\[torch\].*edgellm convert"):
        edgellm.open(tiny_model("llama"))


def test_a_cache_in_another_type_is_refused(tiny_model: TinyModel) -> None:
    artifact = open_artifact(tiny_model("llama"))
    with pytest.raises(UnsupportedTarget, match="f32 here, or in int8 or int4, not in f16"):
        runtime_named("torch").open(artifact, RunOptions(device="cpu", kv_dtype="f16"))


def test_a_damaged_file_is_said_in_words(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.copy_of(tiny_model("llama"), tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(SourceError, match=r"cut short|claims a header|damaged"):
        runtime_named("torch").open(open_artifact(folder), RunOptions(device="cpu"))


def test_weights_that_would_be_drawn_at_random_are_named(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny_models.copy_of(tiny_model("llama"), tmp_path / "copy")
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 weights.*layers.1.mlp.up_proj"):
        runtime_named("torch").open(open_artifact(folder), RunOptions(device="cpu"))


def test_the_cache_grows_by_doubling_and_not_by_token(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.runtimes import kv_buffers

    monkeypatch.setattr(kv_buffers, "FIRST_TOKENS", 8)
    session = runtime_named("torch").open(
        open_artifact(tiny_model("llama")), RunOptions(device="cpu", context_tokens=64)
    )
    sizes = []
    for token in IDS:
        session.decode(token)
        sizes.append(session.kv_bytes())
    per_token = sizes[0] // 8
    assert [size // per_token for size in sizes] == [8] * 8 + [16] * 8 + [32] * 16 + [64] * 8
    session.close()


def test_a_cache_is_refused_before_it_takes_more_than_there_is(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.runtimes import kv_buffers, torch_cache

    monkeypatch.setattr(kv_buffers, "FIRST_TOKENS", 16)
    session = runtime_named("torch").open(
        open_artifact(tiny_model("llama")), RunOptions(device="cpu", context_tokens=64)
    )
    session.prefill(IDS[:16])
    token_bytes = session.kv_bytes() // 16
    monkeypatch.setattr(torch_cache, "free_memory_bytes", lambda: 16 * token_bytes)
    with pytest.raises(GenerationError, match=r"would take .* choose a smaller --context"):
        session.decode(5)
    assert (len(session.tokens), session.kv_bytes()) == (16, 16 * token_bytes)
    monkeypatch.setattr(torch_cache, "free_memory_bytes", lambda: 31 * token_bytes)
    session.decode(5)
    assert session.kv_bytes() == 17 * token_bytes, "no more than must be, where twice does not fit"
    session.close()


def test_states_other_than_keys_and_values_are_refused(tmp_path: Path) -> None:
    import transformers

    from edgellm.runtimes.torch_cache import growing_cache

    config = transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(UnsupportedModel, match="lfm2 keeps more than keys and values"):
        growing_cache(config, 64, "f32")


@pytest.mark.parametrize(("kv_dtype", "levels"), [("int8", 254), ("int4", 15)])
@pytest.mark.parametrize("width", [64, 40])
def test_rounded_keys_are_the_nearest_of_their_groups(
    kv_dtype: str, levels: int, width: int
) -> None:
    """By the definition: even steps over the values of a group, which a half spaces."""
    import torch

    from edgellm.runtimes.torch_cache import ROUNDED

    layer = ROUNDED[kv_dtype](96)
    states = torch.randn((1, 3, 50, width), generator=torch.Generator().manual_seed(2))
    states[0, 1, 7] = 0.25  # all the same
    found, _ = layer.update(states[:, :, :20], states[:, :, :20])
    found, values = layer.update(states[:, :, 20:], states[:, :, 20:])
    torch.testing.assert_close(found, values, rtol=0, atol=0)
    groups = states.unflatten(-1, (-1, 32 if width == 64 else width))
    if kv_dtype == "int8":
        span = 2 * groups.abs().amax(-1, keepdim=True)
    else:
        span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    step = span / levels
    off = (found.unflatten(-1, groups.shape[-2:]) - groups).abs()
    # Half a step, and what halves round the scale and the minimum by.
    assert (off <= 0.5 * step + 2e-3 * groups.abs().amax(-1, keepdim=True)).all()
    assert (off.mean() > 0.2 * step.mean()).item(), "rounded at all"
    assert layer.keys is None, "no copy in floats stays"
    assert layer.values is None
    assert layer.buffers[0].dtype == (torch.int8 if kv_dtype == "int8" else torch.uint8)


def test_rounded_caches_are_smaller_and_cost_little(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = edgellm.convert(
        tiny_model("llama-256"), tmp_path / "out", format="hf", quant="f32", check=False
    )
    nbytes, logits = {}, {}
    for kv_dtype in ("f32", "int8", "int4"):
        options = RunOptions(kv_dtype=kv_dtype, threads=1)  # type: ignore[arg-type]
        session = runtime_named("torch").open(made, options)
        logits[kv_dtype] = session.prefill(IDS, all_logits=True).copy()
        nbytes[kv_dtype] = session.kv_bytes()
        session.close()
    assert nbytes["int8"] / nbytes["f32"] == (1 + 2 / 32) / 4
    assert nbytes["int4"] / nbytes["f32"] == (1 / 2 + 4 / 32) / 4
    off = {kind: np.abs(logits[kind] - logits["f32"]).mean() for kind in ("int8", "int4")}
    assert 0 < off["int8"] < off["int4"] / 8
    assert off["int4"] < 1.0
