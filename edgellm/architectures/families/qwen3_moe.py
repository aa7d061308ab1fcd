"""Qwen 3 MoE: Qwen 3 with mixtures in place of most or all feed-forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgellm.architectures import gguf_experts
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.experts import sparse_layers, with_experts
from edgellm.architectures.families import llama, qwen2, qwen2_moe
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout
from edgellm.architectures.gguf_metadata import attention_biases


def read(config: Config) -> Decoder:
    """A window, where it is switched on, is every layer's."""
    shape = llama.read_shape(config)
    bias = config.flag("attention_bias", False)
    window = None
    if config.flag("use_sliding_window", False) and config.has("sliding_window"):
        window = config.integer("sliding_window")
    config.skip("sliding_window", "max_window_layers")
    decoder = llama.read_decoder(
        config,
        shape,
        "qwen3_moe",
        windows=(window,) * shape.layers,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    experts, sparse = qwen2_moe.read_experts(config), sparse_layers(config, shape.layers)
    return replace(decoder, layers=with_experts(decoder.layers, experts, sparse))


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    config = qwen2_moe.mixture_from_gguf(facts, normalized=True)
    return config | {"attention_bias": attention_biases(facts, "qwen3moe")}


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=read,
    tensors=qwen2_moe.tensors,
    gguf=GgufLayout(
        "qwen3moe",
        GgufGraph(
            qwen2.GGUF_FEATURES | {Feature.QK_NORM} | gguf_experts.NORMALIZED,
            "silu",
            always=gguf_experts.NORMALIZED,
            differences=gguf_experts.differences,
        ),
        keys=qwen2_moe.gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
