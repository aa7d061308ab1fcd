"""Merged folders load in transformers and hold what PEFT's merge_and_unload leaves in memory."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

peft = pytest.importorskip("peft", reason="peft is not installed")

import peft_adapters  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import edgellm  # noqa: E402
from edgellm.errors import AdapterError, UnsupportedModel  # noqa: E402
from edgellm.profiling.artifacts import artifact_facts  # noqa: E402
from edgellm.source.safetensors_file import read_safetensors  # noqa: E402

TinyModel = Callable[[str], Path]

F32_BOUND = 1e-6
"""Relative to the largest value of a tensor: the order of the sums in one product of rank r."""

ALL_LINEAR = peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")


def merged_state(folder: Path) -> dict[str, np.ndarray]:
    return peft_adapters.state_of(tiny_models.load(folder))


def assert_close(
    got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bound: float = F32_BOUND
) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        error = np.abs(got[name] - values).max() / max(np.abs(values).max(), 1e-30)
        assert error <= bound, f"{name}: {error}"


def stored_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a folder as it lies there."""
    return {
        name: (entry.dtype, file.file.read(entry.offset, entry.nbytes).tobytes())
        for path in sorted(folder.glob("*.safetensors"))
        for file in (read_safetensors(path),)
        for name, entry in file.tensors.items()
    }


def resaved(base: Path, folder: Path, *, dtype: torch.dtype, shard: str = "5GB") -> Path:
    """``base`` in another dtype, in shards of at most ``shard``, its other files beside it."""
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize(
    "name", ["llama", "llama-biased", "gpt2", "gpt_neox", "qwen2", "qwen3", "gemma3"]
)
def test_the_folder_holds_what_peft_merges(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model(name)
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    edgellm.merge(base, tmp_path / "out", [adapter.folder])
    assert_close(merged_state(tmp_path / "out"), adapter.merged)
    changed = [n for n, v in adapter.merged.items() if (v != adapter.base[n]).any()]
    assert len(changed) > 8  # the adapter did something to begin with


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OTHER_KINDS: dict[str, peft.PeftConfig] = {
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=ATTENTION),
    "loha": peft.LoHaConfig(r=4, alpha=8, target_modules=ATTENTION),
    "lokr": peft.LoKrConfig(r=4, alpha=8, target_modules=ATTENTION),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules="down_proj"),
    "vera": peft.VeraConfig(r=8, target_modules=ATTENTION, save_projection=True),
    "oft": peft.OFTConfig(oft_block_size=16, target_modules=ATTENTION),
    "boft": peft.BOFTConfig(boft_block_size=8, target_modules=ATTENTION),
    "c3a": peft.C3AConfig(block_size=32, target_modules=["q_proj"]),
    "hira": peft.HiraConfig(r=4, target_modules=ATTENTION),
    "hra": peft.HRAConfig(r=4, target_modules=ATTENTION),
    "miss": peft.MissConfig(r=8, target_modules=ATTENTION),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_folder_holds_what_peft_merges_of_every_kind(
    kind: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A bf16 is half a step off, 2**-8 of a value at the most; PEFT merges here in float32."""
    base = resaved(tiny_model("llama"), tmp_path / "base", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice for some of the kinds
        adapter = peft_adapters.make_adapter(base, OTHER_KINDS[kind], tmp_path / "adapter")
    edgellm.merge(base, tmp_path / "out", [adapter.folder])
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    assert_close(merged_state(tmp_path / "out"), adapter.merged, bound)


def test_rounding_to_bf16_happens_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT adds two bf16 values; we round the exact sum, so half a step (2**-9) at the most."""
    base = resaved(tiny_model("llama"), tmp_path / "base", dtype=torch.bfloat16)
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    edgellm.merge(base, tmp_path / "out", [adapter.folder])
    got = merged_state(tmp_path / "out")
    for name, exact in adapter.merged.items():  # of the float32 model
        rounded = torch.from_numpy(exact).bfloat16().float().numpy()
        step = np.maximum(np.abs(rounded) * 2.0**-8, 2.0**-133)
        # The float32 sums differ in their last bit, which may tip a tie: one step of bf16.
        assert (np.abs(got[name] - rounded) <= step).all(), name
        assert np.mean(got[name] != rounded) < 1e-3, name


def test_shards_order_and_unchanged_bytes_are_the_bases(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = resaved(tiny_model("llama"), tmp_path / "base", dtype=torch.float16, shard="200KB")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter = peft_adapters.make_adapter(base, config, tmp_path / "adapter")
    artifact = edgellm.merge(base, tmp_path / "out", [adapter.folder])
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(path.name for path in artifact.path.glob("*.safetensors")) == shards
    for shard in shards:
        ours, theirs = read_safetensors(artifact.path / shard), read_safetensors(base / shard)
        assert list(ours.tensors.values()) == list(theirs.tensors.values())
    before, after = stored_bytes(base), stored_bytes(artifact.path)
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {
        f"model.layers.{layer}.{module}.weight"
        for layer in range(3)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    index = "model.safetensors.index.json"
    assert (
        json.loads((artifact.path / index).read_text())["weight_map"]
        == json.loads((base / index).read_text())["weight_map"]
    )
    assert (artifact.path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert_close(merged_state(artifact.path), adapter.merged, 2.0**-10)


def test_the_bytes_do_not_depend_on_the_threads(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    found = [
        edgellm.merge(base, tmp_path / f"out-{threads}", [adapter.folder], threads=threads)
        for threads in (1, 2, 3)
    ]
    digests = {artifact.manifest.sha256 for artifact in found if artifact.manifest}
    assert len(digests) == 1
    assert len({(artifact.path / "model.safetensors").read_bytes() for artifact in found}) == 1


def test_two_adapters_add_up_as_cat_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    first = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "first", seed=1)
    second = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "second", seed=2)
    out = edgellm.merge(base, tmp_path / "out", [f"{first.folder}=0.7", f"{second.folder}=-0.5"])
    wanted = {
        name: value + 0.7 * (first.merged[name] - value) - 0.5 * (second.merged[name] - value)
        for name, value in first.base.items()
    }
    assert_close(merged_state(out.path), wanted, 2e-6)


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_a_tied_table_trained_on_one_side_becomes_two(
    side: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """PEFT merges into both sides; what was trained has one, as its own forward pass shows."""
    base = tiny_model("qwen3")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[side])
    model = peft_adapters.trained(base, config)
    ids = torch.arange(3, 40)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(ids).logits.numpy()
    out = edgellm.merge(base, tmp_path / "out", [tmp_path / "adapter"])
    merged = tiny_models.load(out.path)
    assert not merged.config.tie_word_embeddings
    with torch.no_grad():
        got = merged(ids).logits.numpy()
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_added_tokens_bring_rows_and_the_adapters_tokenizer(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<tool>", "</tool>", "<think>"])
    rows = 524  # padded, as many do it

    def grow(model: Any) -> None:
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)

    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    adapter = peft_adapters.make_adapter(base, config, tmp_path / "adapter", prepare=grow)
    tokenizer.save_pretrained(adapter.folder)
    out = edgellm.merge(base, tmp_path / "out", [adapter.folder])
    got = merged_state(out.path)
    assert got["model.embed_tokens.weight"].shape[0] == rows
    assert_close(got, adapter.merged)
    read = transformers.AutoTokenizer.from_pretrained(out.path)
    assert read("<tool>a<think>").input_ids == tokenizer("<tool>a<think>").input_ids
    assert json.loads((out.path / "config.json").read_text())["vocab_size"] == rows


SMALL_MOE: dict[str, Any] = {
    "vocab_size": 517,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MOES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 4},
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]},
    ),
    # Gate, up and down fit one another here: how they are nested tells them apart.
    "mixtral-square": (
        "Mixtral",
        {"intermediate_size": 8, "num_local_experts": 3},
        {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
        {
            "target_parameters": ["experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
            "use_rslora": True,
        },
    ),
    # Stored as stacks, inputs first; square, so that no shape says so.
    "gpt-oss": (
        "GptOss",
        {"intermediate_size": 16, "num_local_experts": 4},
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def moe(name: str, tokenizer: Path, folder: Path) -> Path:
    kind, sizes, _ = MOES[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**SMALL_MOE, **sizes)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(
        folder, max_shard_size="40KB"
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


@pytest.mark.parametrize("name", MOES)
def test_stacked_experts_whatever_the_family(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = moe(name, tiny_model("llama"), tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], **MOES[name][2])
    adapter = peft_adapters.make_adapter(base, config, tmp_path / "adapter")
    out = edgellm.merge(base, tmp_path / "out", [adapter.folder])
    assert_close(merged_state(out.path), adapter.merged)
    assert len(list(out.path.glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))


def test_experts_that_were_linear_layers_when_trained(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Adapters of transformers 4 name each expert; PEFT stacks them when it loads."""
    base = moe("mixtral", tiny_model("llama"), tmp_path / "base")
    draw = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for layer in range(2):
        for expert in range(4):
            for part, (out, into) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
                module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                a = torch.randn(2, into, generator=draw) * 0.1
                b = torch.randn(out, 2, generator=draw) * 0.1
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
                deltas[f"{module}.weight"] = 4.0 * (b @ a).numpy()
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    peft.LoraConfig(r=2, lora_alpha=8, target_modules=["w1", "w2", "w3"]).save_pretrained(folder)
    out = edgellm.merge(base, tmp_path / "out", [folder])
    before, after = stored_bytes(base), stored_bytes(out.path)
    for name, (_, content) in before.items():
        got = np.frombuffer(after[name][1], np.float32)
        wanted = np.frombuffer(content, np.float32) + deltas.get(name, np.float32(0)).reshape(-1)
        assert np.abs(got - wanted).max() <= 1e-6, name
    assert len(deltas) == 24


def test_dtype_rounds_every_float(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    out = edgellm.merge(base, tmp_path / "out", [adapter.folder], dtype="bf16")
    assert {dtype for dtype, _ in stored_bytes(out.path).values()} == {"BF16"}
    assert_close(merged_state(out.path), adapter.merged, 2.0**-8)
    model = transformers.AutoModelForCausalLM.from_pretrained(out.path)
    assert model.dtype == torch.bfloat16


def test_an_overflow_in_f16_names_the_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["o_proj"])
    adapter = peft_adapters.make_adapter(base, config, tmp_path / "adapter", noise=1.0)
    with pytest.raises(AdapterError, match=r"layers\.\d+\.self_attn\.o_proj\.weight .* F16"):
        edgellm.merge(base, tmp_path / "out", [f"{adapter.folder}=90000"], dtype="f16")
    assert not (tmp_path / "out").exists()


def test_a_merged_folder_carries_its_history_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    once = edgellm.merge(base, tmp_path / "once", [adapter.folder])
    edgellm.verify(once)
    twice = edgellm.merge(once.path, tmp_path / "twice", [adapter.folder])
    assert twice.manifest is not None
    made = twice.manifest.artifact
    assert [entry.name for entry in made.merged_before] == ["adapter"]
    assert any("WARNING" in note and "twice" in note for note in made.notes)
    assert once.manifest is not None
    from edgellm.source import open_source

    assert once.manifest.artifact.base.sha256 == open_source(str(base)).digest()
    assert made.base.sha256 == open_source(str(once.path)).digest()


def test_a_merge_into_scaled_channels_is_warned_of(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Into a folder of floats that was made of a rounded file, for a rounded one is refused."""
    base = tiny_model("llama")
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    for quant, count in (("awq:q8_0", 1), ("rtn:q8_0", 0)):
        rounded = edgellm.convert(base, tmp_path / quant, format="gguf", quant=quant, check=False)
        floats = tmp_path / f"{quant} in floats"
        edgellm.convert(rounded.main, floats, format="hf", quant="f32", check=False)
        made = edgellm.merge(floats, tmp_path / f"{quant} merged", [adapter.folder]).manifest
        assert made is not None
        notes = [note for note in made.artifact.notes if "were scaled by awq" in note]
        assert len(notes) == count
        assert made.artifact.scaled_before == ("awq",) * count


def test_a_faint_adapter_vanishes_in_bf16_and_is_told(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = resaved(tiny_model("llama"), tmp_path / "base", dtype=torch.bfloat16)
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter", noise=0.02)
    out = edgellm.merge(base, tmp_path / "out", [f"{adapter.folder}=0.05"])
    assert out.manifest is not None
    share = out.manifest.measured["vanished"]["share"]
    got = merged_state(out.path)
    moved = kept = 0
    for name, value in adapter.merged.items():
        moves = value != adapter.base[name]
        moved += int(moves.sum())
        kept += int((moves & (got[name] == adapter.base[name])).sum())
    assert kept / moved == pytest.approx(share, abs=0.01)
    assert share > 0.5
    assert any("after rounding" in note for note in out.manifest.artifact.notes)


def test_a_quantized_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    adapter = peft_adapters.make_adapter(tiny_model("llama"), ALL_LINEAR, tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match=r"gptq.*edgellm convert"):
        edgellm.merge(base, tmp_path / "out", [adapter.folder])


def test_a_rounded_base_is_the_one_that_convert_merges_into(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """``convert`` is held against bitsandbytes elsewhere; names and roles must agree with it."""
    base = tiny_model("llama")
    adapter = peft_adapters.make_adapter(base, ALL_LINEAR, tmp_path / "adapter")
    options: dict[str, Any] = {"adapters": [adapter.folder], "merge_base": "nf4"}
    choices: dict[str, Any] = {"format": "gguf", "quant": "f32", "check": False}
    merged = edgellm.merge(base, tmp_path / "merged", **options)
    found = [
        edgellm.convert(merged.path, tmp_path / "through", **choices),
        edgellm.convert(base, tmp_path / "direct", **options, **choices),
        edgellm.convert(base, tmp_path / "full", adapters=[adapter.folder], **choices),
    ]
    through, direct, full = (
        {tensor.name: tensor.sha256 for tensor in made.manifest.artifact.tensors}
        for made in found
        if made.manifest
    )
    assert through == direct
    assert sum(direct[name] != full[name] for name in full) == 21


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "deepseek_v2", "lfm2", "llama"])
def test_the_manifest_says_what_a_converted_ones_does(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model(name)
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "out_proj"])
    adapter = peft_adapters.make_adapter(base, config, tmp_path / "adapter")
    merged = edgellm.merge(base, tmp_path / "out", [adapter.folder])
    made = edgellm.convert(base, tmp_path / "made", format="hf", quant="f32", check=False)
    assert merged.manifest is not None
    assert made.manifest is not None
    found, wanted = merged.manifest.artifact.model, made.manifest.artifact.model
    assert found.experts == wanted.experts
    assert found.attention_layer_count == wanted.attention_layer_count
    inspected, other = edgellm.inspect(merged.path), edgellm.inspect(made.path)
    assert inspected.active_weights == other.active_weights
    assert (other.active_weights is None) == (name not in ("qwen3_moe", "granitemoe"))
    assert msgspec.UNSET not in inspected.metadata.values()
    assert ("experts" in inspected.metadata) == (found.experts is not msgspec.UNSET)
    # MLA's head_dim in a config is the width of what is turned.
    latent = name == "deepseek_v2"
    assert found.head_dim == (0 if latent else wanted.head_dim)
    kept = artifact_facts(made).kv_values
    assert artifact_facts(merged).kv_values == (None if latent else kept)
