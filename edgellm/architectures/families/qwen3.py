"""Qwen 3 (dense): Qwen 2 with norms on queries and keys, heads of a size of their own."""

from __future__ import annotations

from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama, qwen2
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout
from edgellm.architectures.gguf_metadata import attention_biases, built_like_llama


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, head_dim_required=True)
    bias = config.flag("attention_bias", False)
    return llama.read_decoder(
        config,
        shape,
        "qwen3",
        windows=qwen2.read_windows(config, shape.layers),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return built_like_llama(facts) | {"attention_bias": attention_biases(facts, "qwen3")}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "qwen3",
        GgufGraph(qwen2.GGUF_FEATURES | {Feature.QK_NORM}, "silu"),
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
