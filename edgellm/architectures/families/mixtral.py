"""Mixtral: Mistral with a mixture of experts in every layer, whose router weights sum to one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures import gguf_experts
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Experts, Router
from edgellm.architectures.experts import (
    Spelling,
    read_counts,
    skip_training,
    with_experts,
    with_mixtures,
)
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import built_like_llama

SPELLING = Spelling(
    experts="block_sparse_moe.experts",
    parts=("w1", "w3", "w2"),
    router="block_sparse_moe.gate",
    also=("mlp.gate",),
)


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config)
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    config.skip("sliding_window")
    skip_training(config)
    decoder = llama.read_decoder(config, shape, "mixtral", windows=(window,) * shape.layers)
    count, used = read_counts(config, "num_local_experts", "num_experts")
    experts = Experts(count, used, shape.ffn_size, Router(normalized=True))
    return replace(decoder, layers=with_experts(decoder.layers, experts))


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with mixtures."""
    return with_mixtures(llama.tensors(decoder), decoder, SPELLING)


def from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """Of a file of Llama's architecture that has experts."""
    count, used = gguf_experts.counts(facts)
    return built_like_llama(facts) | {
        "model_type": "mixtral",
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "sliding_window": None,
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "llama",
        GgufGraph(
            llama.GGUF_LLAMA | gguf_experts.NORMALIZED,
            "silu",
            always=gguf_experts.NORMALIZED,
            any_yarn=True,
            differences=gguf_experts.differences,
        ),
        interleaved_rope=True,
        rope_factors=("rope_freqs.weight",),
        keys=gguf_experts.expert_keys,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
