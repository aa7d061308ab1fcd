"""OLMoE: OLMo's shape with RMS norms, norms over all queries and keys, and many small experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures import gguf_experts
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Experts, Feature, Router
from edgellm.architectures.experts import (
    Spelling,
    read_counts,
    skip_training,
    with_experts,
    with_mixtures,
)
from edgellm.architectures.families import llama, qwen2
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import built_like_llama


def read(config: Config) -> Decoder:
    """Clipped queries, keys and values, which no published model has, are refused."""
    shape = llama.read_shape(config, kv_heads_required=False)
    bias = config.flag("attention_bias", False)
    config.neutral("clip_qkv")
    skip_training(config)
    decoder = llama.read_decoder(
        config,
        shape,
        "olmoe",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    count, used = read_counts(config, "num_experts", "num_local_experts")
    router = Router(normalized=config.flag("norm_topk_prob", False))
    layers = with_experts(decoder.layers, Experts(count, used, shape.ffn_size, router))
    return replace(decoder, layers=layers, qk_norm_whole=True)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with mixtures, and norms as wide as all queries or keys."""
    widths = {"attn_q_norm": decoder.query_size, "attn_k_norm": decoder.kv_size}
    for row in with_mixtures(llama.tensors(decoder), decoder, Spelling()):
        part = row.role.split(".")[-2]
        yield replace(row, shape=(widths[part],)) if part in widths else row


def _differences(decoder: Decoder) -> Iterator[str]:
    yield from gguf_experts.differences(decoder)
    if decoder.kv_heads != decoder.heads:
        yield "key heads that query heads share, with norms over all of them"


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    count, used = gguf_experts.counts(facts)
    return built_like_llama(facts) | {
        "num_experts": count,
        "num_experts_per_tok": used,
        "norm_topk_prob": False,
        "attention_bias": False,
    }


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "olmoe",
        GgufGraph(
            (qwen2.GGUF_FEATURES - {Feature.TIED_HEAD, Feature.QKV_BIAS})
            | {Feature.QK_NORM, Feature.QK_NORM_WHOLE}
            | gguf_experts.PLAIN,
            "silu",
            always=gguf_experts.PLAIN,
            square_attention=True,
            differences=_differences,
        ),
        keys=gguf_experts.expert_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
