"""MiniCPM 3: latent attention, with multipliers of embeddings, residual branches and logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    Value,
)
from edgellm.architectures.gguf_metadata import built_like_llama
from edgellm.architectures.latent_rows import (
    WITHOUT_ADAPTERS,
    latent_tensors,
    read_latent,
    read_scaled_rope,
    read_shape,
    with_latent,
)

EMBEDDING_SCALE, RESIDUAL_DEPTH, BASE_WIDTH = 12.0, 1.4, 256
"""Of MiniCPM3-4B: what its config class takes where nothing is said, and llama.cpp always."""


def read(config: Config) -> Decoder:
    """Multipliers that are null do nothing, as in transformers."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    latent = read_latent(config, heads, value_dim=hidden // heads)
    shape = read_shape(config, latent)
    rope, scale = read_scaled_rope(config, latent, shape.context_length, 10000.0)
    decoder = llama.read_decoder(
        config,
        shape,
        "minicpm3",
        windows=(None,) * shape.layers,
        rope=rope,
        tied=True,
        mlp_bias=config.flag("mlp_bias", False),
    )
    depth = math.sqrt(shape.layers)
    return replace(
        with_latent(decoder, latent, scale),
        embedding_scale=config.number("scale_emb", EMBEDDING_SCALE, above=0),
        residual_scale=_given(config, "scale_depth", RESIDUAL_DEPTH, depth) / depth,
        logit_scale=_given(config, "dim_model_base", BASE_WIDTH, hidden) / hidden,
    )


def _given(config: Config, key: str, missing: float, null: float) -> float:
    return config.number(key, null if config.states(key) else missing, above=0)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    return latent_tensors(decoder, paired=False)


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    latent = decoder.latent
    assert latent is not None
    return {
        "attention.value_length": latent.value_dim,
        "attention.q_lora_rank": latent.query_rank or 0,
        "attention.kv_lora_rank": latent.rank,
    }


def _differences(decoder: Decoder) -> Iterator[str]:
    """llama.cpp has the multipliers of MiniCPM3-4B in its code, and compresses queries."""
    if decoder.latent is not None and decoder.latent.query_rank is None:
        yield "queries that are made at once (q_lora_rank null)"
    hidden, layers = decoder.hidden_size, len(decoder.layers)
    for what, value, fixed in (
        ("scale_emb", decoder.embedding_scale, EMBEDDING_SCALE),
        ("scale_depth", decoder.residual_scale * math.sqrt(layers), RESIDUAL_DEPTH),
        ("dim_model_base", decoder.logit_scale * hidden, BASE_WIDTH),
    ):
        if not math.isclose(value, fixed, rel_tol=1e-6):
            yield f"a {what} of {value:g} (it has {fixed:g})"


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    keys = facts.keys
    key_dim, rope_dim = keys.integer("attention.key_length"), keys.integer("rope.dimension_count")
    value_dim = keys.integer("attention.value_length")
    config = built_like_llama(facts, partial_rope=True, value_dim=value_dim)
    rope = {**config["rope_parameters"]}
    del config["head_dim"], rope["partial_rotary_factor"]
    return config | {
        "rope_parameters": rope,
        "q_lora_rank": keys.integer("attention.q_lora_rank"),
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "scale_emb": EMBEDDING_SCALE,
        "scale_depth": RESIDUAL_DEPTH,
        "dim_model_base": BASE_WIDTH,
    }


FAMILY = Family(
    model_type="minicpm3",
    architecture="MiniCPM3ForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "minicpm3",
        GgufGraph(
            llama.GGUF_FEATURES
            | {
                Feature.ROPE_YARN,
                Feature.ROPE_FACTORS,
                Feature.LATENT_ATTENTION,
                Feature.EMBEDDING_SCALE,
                Feature.RESIDUAL_SCALE,
                Feature.LOGIT_SCALE,
            },
            "silu",
            without_adapters=WITHOUT_ADAPTERS,
            differences=_differences,
        ),
        rope_factors=("rope_factors_long.weight", "rope_factors_short.weight"),
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
