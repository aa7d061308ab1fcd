"""Descriptions held against transformers: logits, rope frequencies, saved configs, GGUF names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.architectures import FAMILIES, config_from_gguf, family_of, gguf_keys, rope_factors
from edgellm.architectures.config import HARMLESS_KEYS, NEUTRAL_VALUES, Config
from edgellm.architectures.decoder import Decoder, Layer, Rope, ShortConvolution
from edgellm.architectures.experts import stack_of
from edgellm.architectures.family import TensorRow
from edgellm.architectures.gguf_rows import name_in_file
from edgellm.architectures.rope import inverse_frequencies, read_rope
from edgellm.architectures.row_order import sorts_columns

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed")
safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

import reference_decoder  # noqa: E402
import tiny_models  # noqa: E402

# Longer than the windows and the trained contexts of the tiny models.
TOKEN_IDS = tiny_models.some_token_ids(80)

# transformers computes in float32; its logits, of up to 30 and a spread of 3, came within 7e-5.
TOLERANCE = 3e-4

TinyModel = Callable[[str], Path]
Tensors = dict[str, np.ndarray]


def ordered(values: np.ndarray, row: TensorRow, *, back: bool = False) -> np.ndarray:
    """``values`` as the network takes them, or, ``back``, as the checkpoint has them."""
    if row.order is None:
        return values
    places = np.argsort(row.order.places()) if back else row.order.places()
    return values[:, places] if sorts_columns(row.order) else values[places]


def read(folder: Path) -> tuple[Decoder, Tensors]:
    """The description of a folder and its tensors by role; each stored tensor is used once."""
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    decoder = family.describe(Config(config))
    stored = safetensors.load_file(folder / "model.safetensors")
    tensors = {}
    used = set()
    for row in family.tensors(decoder):
        name, values = row.source, stored.get(row.source)
        if row.pieces:
            values = np.stack([stored[piece] for piece in row.pieces])
            used.update(row.pieces)
        elif values is None:
            part = next(each for each in row.elsewhere if each.name in stored)
            name, last = part.name, part.first + row.shape[0]
            values = stored[name].reshape(-1, row.shape[1])[part.first : last]
        used.update(() if row.pieces else (name,))
        values = values.T if row.transposed else values
        tensors[row.role] = ordered(values, row)
        assert tensors[row.role].shape == row.shape, row
    assert used == stored.keys(), "tensors without a row"
    return decoder, tensors


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_the_description_computes_transformers_logits(name: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(name)
    decoder, tensors = read(folder)
    got = reference_decoder.logits(decoder, tensors, TOKEN_IDS)
    np.testing.assert_allclose(
        got, tiny_models.reference_logits(folder, TOKEN_IDS), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    "name", ["gpt_neox", "falcon-grouped", "bloom", "gptj", "deepseek_v2", "cohere-normed"]
)
def test_rows_left_in_the_checkpoints_order_would_show(name: str, tiny_model: TinyModel) -> None:
    decoder, tensors = read(tiny_model(name))
    right = reference_decoder.logits(decoder, tensors, TOKEN_IDS)
    unordered = {
        row.role: ordered(tensors[row.role], row, back=True)
        for row in family_of({"model_type": decoder.family}).tensors(decoder)
        if row.order is not None
    }
    assert unordered
    wrong = reference_decoder.logits(decoder, tensors | unordered, TOKEN_IDS)
    assert np.abs(right - wrong).max() > 3 * TOLERANCE


def _all_layers(decoder: Decoder, **change: Any) -> Decoder:
    return replace(decoder, layers=tuple(replace(layer, **change) for layer in decoder.layers))


def _with_scaling(decoder: Decoder, **change: Any) -> Decoder:
    def changed(layer: Layer) -> Layer:
        rope = layer.rope
        if rope is None or rope.scaling is None:
            return layer
        return replace(layer, rope=replace(rope, scaling=replace(rope.scaling, **change)))

    return replace(decoder, layers=tuple(changed(layer) for layer in decoder.layers))


def _with_mixture(decoder: Decoder, **change: Any) -> Decoder:
    return replace(
        decoder,
        layers=tuple(
            replace(each, experts=replace(each.experts, **change)) for each in decoder.layers
        ),
    )


def _with_router(decoder: Decoder, **change: Any) -> Decoder:
    router = replace(decoder.layers[0].experts.router, **change)
    return _with_mixture(decoder, router=router)


def _unscaled(decoder: Decoder) -> Decoder:
    return replace(
        decoder,
        layers=tuple(
            replace(layer, rope=replace(layer.rope, scaling=None) if layer.rope else None)
            for layer in decoder.layers
        ),
    )


def _convolved(decoder: Decoder, width: int) -> Decoder:
    def changed(layer: Layer) -> Layer:
        return replace(layer, convolution=ShortConvolution(width)) if layer.convolution else layer

    return replace(decoder, layers=tuple(changed(layer) for layer in decoder.layers))


MISREADINGS: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "llama3 scaling lost": ("llama", _unscaled),
    "linear scaling lost": ("llama-linear", _unscaled),
    "yarn's attention factor lost": (
        "llama-yarn",
        lambda decoder: _with_scaling(decoder, attention_factor=1.0),
    ),
    "yarn truncated": ("llama-yarn-odd", lambda decoder: _with_scaling(decoder, truncate=True)),
    "yarn's beta_fast lost": (
        "llama-yarn-odd",
        lambda decoder: _with_scaling(decoder, beta_fast=32.0),
    ),
    "window lost": ("mistral", lambda decoder: _all_layers(decoder, window=None)),
    "window one short": ("mistral", lambda decoder: _all_layers(decoder, window=7)),
    "window in every layer": ("qwen2-window", lambda decoder: _all_layers(decoder, window=6)),
    "global rope everywhere": (
        "gemma3",
        lambda decoder: _all_layers(decoder, rope=decoder.layers[1].rope),
    ),
    "local layers swapped": (
        "gemma3",
        lambda decoder: replace(decoder, layers=decoder.layers[::-1]),
    ),
    "norm offset lost": (
        "gemma3",
        lambda decoder: replace(decoder, norm=replace(decoder.norm, offset=False)),
    ),
    "embedding scale lost": ("gemma3", lambda decoder: replace(decoder, embedding_scale=1.0)),
    "attention scale lost": (
        "gemma3-scale",
        lambda decoder: replace(decoder, attention_scale=None),
    ),
    "post norms lost": ("gemma3", lambda decoder: replace(decoder, post_norms=False)),
    "q and k norms lost": ("qwen3", lambda decoder: replace(decoder, qk_norm=False)),
    "positions lost": ("gpt2", lambda decoder: replace(decoder, learned_positions=None)),
    "another gelu": ("gpt2-untied", lambda decoder: replace(decoder, activation="gelu_tanh")),
    "theta": ("llama-biased", lambda decoder: _all_layers(decoder, rope=Rope(1e5, 32))),
    "ALiBi lost": ("bloom", lambda decoder: replace(decoder, alibi=())),
    "slopes in one series": (
        "mpt",
        lambda decoder: replace(decoder, alibi=tuple(2 ** (-8 * n / 6) for n in range(1, 7))),
    ),
    "embedding's norm lost": ("bloom", lambda decoder: replace(decoder, embedding_norm=False)),
    "clip lost": ("mpt", lambda decoder: replace(decoder, qkv_clip=None)),
    "unused positions used": ("opt", lambda decoder: replace(decoder, skipped_positions=0)),
    "blocks one after the other": (
        "falcon-grouped",
        lambda decoder: replace(decoder, parallel=False),
    ),
    "a norm of its own for each": (
        "gpt_neox",
        lambda decoder: replace(decoder, shared_norm=True),
    ),
    "rope over the whole head": (
        "gptj-eighth",
        lambda decoder: _all_layers(decoder, rope=Rope(1e4, 32)),
    ),
    "router weights not normalized": (
        "mixtral",
        lambda decoder: _with_router(decoder, normalized=False),
    ),
    "router weights normalized": (
        "olmoe",
        lambda decoder: _with_router(decoder, normalized=True),
    ),
    "one expert fewer": ("qwen3_moe", lambda decoder: _with_mixture(decoder, used=2)),
    "shared expert lost": ("qwen2_moe", lambda decoder: _with_mixture(decoder, shared_width=0)),
    "shared expert's gate lost": (
        "qwen2_moe",
        lambda decoder: _with_mixture(decoder, shared_gate=False),
    ),
    "convolution a token short": ("lfm2", lambda decoder: _convolved(decoder, 2)),
    "head tied": ("qwen3", lambda decoder: replace(decoder, tied_head=True)),
    "scores of yarn lost": (
        "deepseek_v2-lite",
        lambda decoder: replace(decoder, attention_scale=None),
    ),
    "norms of heads alike": (
        "stablelm-normed",
        lambda decoder: replace(decoder, qk_norm=False),
    ),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_a_misread_config_would_show(misreading: str, tiny_model: TinyModel) -> None:
    """The logits test above can see each of these mistakes."""
    name, misread = MISREADINGS[misreading]
    decoder, tensors = read(tiny_model(name))
    right = reference_decoder.logits(decoder, tensors, TOKEN_IDS)
    wrong = reference_decoder.logits(misread(decoder), tensors, TOKEN_IDS)
    assert np.abs(right - wrong).max() > 3 * TOLERANCE


# --- rope

ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 6.0,
        "original_max_position_embeddings": 2048,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 40.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 20, "beta_slow": 3},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("scaling", ROPES, ids=lambda scaling: str(list(scaling.values())))
def test_frequencies_equal_transformers(
    scaling: dict[str, Any], head_dim: int, theta: float
) -> None:
    parameters = scaling | {"rope_theta": theta}
    real = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters=dict(parameters),
    )
    make = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    wanted, wanted_factor = make(real, "cpu", seq_len=40000)
    rope, _ = read_rope(Config({"rope_parameters": parameters}, context=40000), head_dim, 16384)
    got, factor = inverse_frequencies(rope)
    np.testing.assert_allclose(got, wanted.double().numpy(), rtol=3e-6)
    assert factor == pytest.approx(wanted_factor, rel=1e-12)


# --- configs that transformers saves


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_that_transformers_saves_is_known(name: str, tmp_path: Path) -> None:
    """Each config class, as it is and with what training code and old versions add."""
    needed = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}
    usual = transformers.AutoConfig.for_model(name, **needed)
    windowed = name != "llama" and hasattr(usual, "sliding_window")
    window = {"sliding_window": 64} if windowed else {}
    real = transformers.AutoConfig.for_model(name, **needed, **window)
    real.architectures = [family_of({"model_type": name}).architecture]
    real.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    family_of(saved).describe(Config(saved))
    everything = real.to_dict() | {"torch_dtype": "bfloat16"}
    family_of(everything).describe(Config(everything))


def test_every_key_that_generation_adds_to_a_config_is_harmless() -> None:
    known = HARMLESS_KEYS | set(NEUTRAL_VALUES)
    assert set(transformers.GenerationConfig._get_default_generation_params()) <= known
    assert set(transformers.PreTrainedConfig().to_dict()) <= known


def test_the_classes_exist_and_have_the_families_prefix() -> None:
    for name in FAMILIES:
        family = family_of({"model_type": name})
        real = getattr(transformers, family.architecture)
        assert real.config_class.model_type == name
        assert family.base_prefix == f"{real.base_model_prefix}."


# --- GGUF

NOT_IN_GGUF = {
    "falcon-alibi",
    "gptj",
    "gptj-eighth",
    "lfm2-biased",
    "mamba-biased",
    "minicpm3-plain",
    "opt",
    "opt-bare",
}
"""Models that llama.cpp has no graph and GGUF no names for."""

IN_GGUF = [name for name in tiny_models.MODELS if name not in NOT_IN_GGUF]


@pytest.mark.parametrize("name", [name for name in IN_GGUF if not name.endswith("moe-dense")])
def test_roles_are_the_names_of_gguf(name: str, tiny_model: TinyModel) -> None:
    config = json.loads((tiny_model(name) / "config.json").read_text())
    family = family_of(config)
    decoder = family.describe(Config(config))
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.gguf.arch)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    mapping = gguf.get_tensor_name_map(arch, len(decoder.layers))
    for row in family.tensors(decoder):
        name = stack_of(row.role) or name_in_file(row.role, decoder, family.gguf)
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, ""
        block = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{block}.", "blk.{bid}.") in known
        if not row.apart:  # llama.cpp's converter takes these apart by code
            continue
        # Some names are known there as models saved without their head have them alone, and
        # those of experts once they are stacked.
        source = re.sub(r"experts\.\d+\.", "experts.", row.source)
        source = source.replace(".norms.", ".") if row.pieces else source
        # As it renames them before it looks.
        source = source.replace("_correction_bias", "_correction.bias")
        source = source.replace(".dt_bias", ".dt_proj.bias")
        sources = (source, source.removeprefix(family.base_prefix))
        assert name in [
            mapping.get_name(source, (f".{suffix}",) if suffix else ()) for source in sources
        ]


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_keys_have_gguf_names_and_mean_the_same_model(
    name: str, tiny_model: TinyModel
) -> None:
    decoder, tensors = read(tiny_model(name))
    family = family_of({"model_type": decoder.family})
    keys = gguf_keys(decoder, family.gguf_layout)
    names = {
        value.replace("{arch}", family.gguf.arch)
        for group in (
            gguf.Keys.LLM,
            gguf.Keys.Attention,
            gguf.Keys.Rope,
            gguf.Keys.ShortConv,
            gguf.Keys.SSM,
        )
        for key, value in vars(group).items()
        if isinstance(value, str) and not key.startswith("_")
    }
    assert set(keys) <= names
    if name in BEYOND_LLAMA_CPP:
        return
    factors = rope_factors(decoder, family.gguf_layout)
    stored = [stack_of(role) or name_in_file(role, decoder, family.gguf) for role in tensors]
    config = config_from_gguf({"general.architecture": family.gguf.arch, **keys}, stored, factors)
    again = family_of(config).describe(Config(config))
    np.testing.assert_allclose(
        reference_decoder.logits(again, tensors, TOKEN_IDS),
        reference_decoder.logits(decoder, tensors, TOKEN_IDS),
        rtol=0,
        atol=5e-5,  # keys are float32, and two of them make the scores of DeepSeek's yarn
    )


# What llama.cpp's graphs cannot compute: windows, another attention scale, the exact gelu.
BEYOND_LLAMA_CPP = {
    "mistral",
    "qwen2-window",
    "starcoder2-window",
    "gemma3-scale",
    "gpt2-untied",
    "gpt_neox-sequential",
    "mpt-scale",
    "falcon-grouped",
    "falcon-grouped-one-norm",
    "deepseek_v2-groups",
    "qwen2_moe-dense",
    "qwen3_moe-dense",
}
