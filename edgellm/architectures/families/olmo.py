"""OLMo 1: Llama whose layer norms have no weights, with queries, keys and values clipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Norm
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

EPSILON = 1e-5
"""Of its norms, in the code of transformers and of no key."""


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, kv_heads_required=False)
    bias = config.flag("attention_bias", False)
    clip = config.number("clip_qkv", above=0) if config.has("clip_qkv") else None
    config.skip("clip_qkv")
    decoder = llama.read_decoder(
        config,
        shape,
        "olmo",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        norm=Norm("layer", EPSILON, weight=False, bias=False),
        qkv_bias=bias,
        output_bias=bias,
    )
    return replace(decoder, qkv_clip=clip)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's without norms."""
    return (row for row in llama.tensors(decoder) if row.kind != "norm")


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return {} if decoder.qkv_clip is None else {"attention.clamp_kqv": decoder.qkv_clip}


def _differences(decoder: Decoder) -> Iterator[str]:
    if decoder.qkv_clip is not None and decoder.head_dim * decoder.heads != decoder.hidden_size:
        yield "clipped heads that are not as wide as the model"


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    keys, config = facts.keys, built_like_llama(facts)
    epsilon = config.pop("layer_norm_eps")
    if epsilon != EPSILON:
        raise keys.refusal("attention.layer_norm_epsilon", epsilon, f"{EPSILON:g}")
    return config | {"clip_qkv": keys.number("attention.clamp_kqv", 0.0) or None}


FAMILY = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "olmo",
        GgufGraph(
            (llama.GGUF_FEATURES - {Feature.RMS_NORM})
            | {Feature.LAYER_NORM, Feature.PLAIN_NORM, Feature.QKV_CLIP, Feature.ROPE_YARN},
            "silu",
            square_attention=True,
            differences=_differences,
        ),
        interleaved_rope=True,
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
