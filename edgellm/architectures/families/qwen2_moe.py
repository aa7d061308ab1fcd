"""Qwen 2 MoE: Qwen 2 with mixtures, and in each a shared expert behind a gate."""

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
    sparse_layers,
    with_experts,
    with_mixtures,
)
from edgellm.architectures.families import llama, qwen2
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow, Value
from edgellm.architectures.gguf_metadata import built_like_llama

SPELLING = Spelling()


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config)
    windows = _read_windows(config, shape.layers)
    decoder = llama.read_decoder(
        config,
        shape,
        "qwen2_moe",
        windows=windows,
        qkv_bias=config.flag("qkv_bias", True),
    )
    experts = replace(
        read_experts(config),
        shared_width=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    sparse = sparse_layers(config, shape.layers)
    return replace(decoder, layers=with_experts(decoder.layers, experts, sparse))


def read_experts(config: Config) -> Experts:
    """The mixture as Qwen's configs state it, without what is shared."""
    skip_training(config)
    count, used = read_counts(config, "num_experts", "num_local_experts")
    router = Router(normalized=config.flag("norm_topk_prob", False))
    return Experts(count, used, config.integer("moe_intermediate_size"), router)


def _read_windows(config: Config, layers: int) -> tuple[int | None, ...]:
    """As transformers computes them here, which is not as in Qwen 2: of the lower layers, each
    other one has a window."""
    switched_on = config.flag("use_sliding_window", False)
    if config.has("layer_types") or not switched_on or not config.has("sliding_window"):
        return qwen2.read_windows(config, layers)
    window = config.integer("sliding_window")
    last = config.integer("max_window_layers", minimum=0)
    return tuple(window if index % 2 == 0 and index < last else None for index in range(layers))


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with mixtures."""
    return with_mixtures(llama.tensors(decoder), decoder, SPELLING)


def gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return gguf_experts.expert_keys(decoder) | gguf_experts.widths(decoder)


def mixture_from_gguf(facts: GgufFacts, normalized: bool) -> dict[str, Any]:
    """The config's keys of a file whose graph has experts in every layer."""
    count, used = gguf_experts.counts(facts)
    config = built_like_llama(facts)
    return config | {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": facts.keys.integer(
            "expert_feed_forward_length", config["intermediate_size"] // used
        ),
        "norm_topk_prob": normalized,
    }


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    config = mixture_from_gguf(facts, normalized=False)
    shared = facts.keys.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    return config | {"shared_expert_intermediate_size": shared}


SHARED = frozenset({Feature.SHARED_EXPERTS, Feature.SHARED_EXPERT_GATE})

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "qwen2moe",
        GgufGraph(
            (qwen2.GGUF_FEATURES | gguf_experts.PLAIN | SHARED) - {Feature.TIED_HEAD},
            "silu",
            always=gguf_experts.PLAIN | SHARED,
            square_attention=True,
            differences=gguf_experts.differences,
        ),
        keys=gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
