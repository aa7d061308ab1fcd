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
    """Command R+ norms queries and keys, with weights of its own for each head."""
    shape = llama.read_shape(config, kv_heads_required=False)
    normed = config.flag("use_qk_norm", False)
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
        qk_norm=normed,
    )
    scale = config.number("logit_scale", above=0)
    return replace(
        decoder, parallel=True, shared_norm=True, logit_scale=scale, qk_norm_by_head=normed
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with one norm a layer, beside those of heads."""
    head_dim = decoder.head_dim
    heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}
    for row in llama.tensors(decoder):
        if ".ffn_norm." in row.role:
            continue
        part = row.role.split(".")[-2]
        if part in heads:
            yield replace(row, order=PairedRope(heads[part], head_dim, head_dim))
        elif part.removesuffix("_norm") in heads:
            shape = heads[part.removesuffix("_norm")], head_dim
            yield replace(row, shape=shape, order=PairedRope(1, head_dim, head_dim, columns=True))
        else:
            yield row


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return {"logit_scale": decoder.logit_scale}


def _differences(decoder: Decoder) -> Iterator[str]:
    layers, normed = len(decoder.layers), decoder.qk_norm
    if (layers >= LAYERS_WITH_QK_NORM) != normed:
        yield f"{layers} layers {'with' if normed else 'without'} norms on queries and keys"


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return built_like_llama(facts) | {
        "logit_scale": facts.keys.number("logit_scale", 0.0) or 1.0,
        "attention_bias": False,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in facts.names,
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
                Feature.QK_NORM,
                Feature.QK_NORM_BY_HEAD,
            },
            "silu",
            always=frozenset({Feature.TIED_HEAD}),
            square_attention=True,
            differences=_differences,
        ),
        as_checkpoint=True,
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
