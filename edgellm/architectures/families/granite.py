"""Granite 3: Llama with multipliers of embeddings, residual branches, attention and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, Value
from edgellm.architectures.gguf_metadata import attention_biases, built_like_llama


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, kv_heads_required=False)
    bias = config.flag("attention_bias", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "granite",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
    return replace(
        decoder,
        embedding_scale=config.number("embedding_multiplier", 1.0, above=0),
        residual_scale=config.number("residual_multiplier", 1.0, above=0),
        attention_scale=config.number("attention_multiplier", 1.0, above=0),
        logit_scale=1 / config.number("logits_scaling", 1.0, above=0),
    )


def gguf_keys(decoder: Decoder) -> dict[str, Value]:
    """The keys of its multipliers."""
    return {
        "embedding_scale": decoder.embedding_scale,
        "residual_scale": decoder.residual_scale,
        "attention.scale": decoder.softmax_scale,
        "logit_scale": 1 / decoder.logit_scale,
    }


def from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """A missing scale of attention means the usual one; rope is switched off by "finetuned"."""
    keys, config = facts.keys, built_like_llama(facts)
    keys.neutral("rope.scaling.finetuned", True)
    return config | {
        "attention_bias": attention_biases(facts, "granite"),
        "mlp_bias": "blk.0.ffn_up.bias" in facts.names,
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "attention_multiplier": keys.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "logits_scaling": keys.number("logit_scale", above=0),
    }


GGUF_FEATURES = llama.GGUF_LLAMA | {
    Feature.EMBEDDING_SCALE,
    Feature.RESIDUAL_SCALE,
    Feature.ATTENTION_SCALE,
    Feature.LOGIT_SCALE,
}

FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "granite",
        GgufGraph(GGUF_FEATURES, "silu", any_yarn=True),
        interleaved_rope=True,
        rope_factors=("rope_freqs.weight",),
        keys=gguf_keys,
        config=from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
