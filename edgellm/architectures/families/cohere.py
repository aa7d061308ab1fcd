"""Command R: attention and a gated feed-forward side by side behind one layer norm without bias.

Rotary positions turn pairs that lie side by side, logits are scaled, and the head is the embedding.
"""

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
from edgellm.architectures.row_order import PairedRope

LAYERS_WITH_QK_NORM = 64
"""From so many on, llama.cpp expects norms on queries and keys, as Command R+ has."""


def read(config: Config) -> Decoder:
    """Norms on queries and keys, which Command R+ has for each head apart, are refused."""
    shape = llama.read_shape(config, kv_heads_required=False)
    config.neutral("use_qk_norm", False)
    bias = config.flag("attention_bias", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "cohere",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        norm=Norm("layer", config.number("layer_norm_eps", above=0), bias=False),
        tied=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    scale = config.number("logit_scale", above=0)
    return replace(decoder, parallel=True, shared_norm=True, logit_scale=scale)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with one norm a layer."""
    for row in llama.tensors(decoder):
        if ".ffn_norm." in row.role:
            continue
        heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}.get(row.role.split(".")[-2])
        paired = heads and PairedRope(heads, decoder.head_dim, decoder.head_dim)
        yield replace(row, order=paired) if paired else row


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return {"logit_scale": decoder.logit_scale}


def _differences(decoder: Decoder) -> Iterator[str]:
    if len(decoder.layers) >= LAYERS_WITH_QK_NORM:
        yield f"{len(decoder.layers)} layers without norms on queries and keys"


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return built_like_llama(facts) | {
        "logit_scale": facts.keys.number("logit_scale", 0.0) or 1.0,
        "attention_bias": False,
    }


FAMILY = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "command-r",
        GgufGraph(
            (llama.GGUF_FEATURES - {Feature.RMS_NORM})
            | {
                Feature.ROPE_YARN,
                Feature.LAYER_NORM,
                Feature.UNBIASED_LAYER_NORM,
                Feature.PARALLEL_BLOCK,
                Feature.SHARED_NORM,
                Feature.LOGIT_SCALE,
            },
            "silu",
            always=frozenset({Feature.TIED_HEAD}),
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
