"""Gemma 2: Gemma with soft caps, norms after each part too, and windows in every second layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import LAYER_TYPES, WINDOWED, Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, Value
from edgellm.architectures.gguf_metadata import built_like_llama, local_layers, window_keys


def read(config: Config) -> Decoder:
    """Configs before ``layer_types`` have a window in the first, third, ... layer."""
    shape = llama.read_shape(config, head_dim_required=True)
    config.neutral("use_bidirectional_attention", False)
    types = tuple(LAYER_TYPES[index % 2 == 0] for index in range(shape.layers))
    if config.has("layer_types"):
        types = llama.read_layer_types(config, shape.layers)
    window = config.integer("sliding_window") if WINDOWED in types else None
    config.skip("sliding_window", "cache_implementation")
    bias = config.flag("attention_bias", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "gemma2",
        windows=tuple(window if kind == WINDOWED else None for kind in types),
        default_theta=10000.0,
        activation="hidden_activation",
        qkv_bias=bias,
        output_bias=bias,
        tied=True,
    )
    config.skip("hidden_act")  # transformers reads the other key alone
    scale = config.number("query_pre_attn_scalar", above=0)
    return replace(
        decoder,
        norm=replace(decoder.norm, offset=True),
        post_norms=True,
        embedding_scale=math.sqrt(shape.hidden_size),
        attention_scale=None if scale == shape.head_dim else scale**-0.5,
        attention_softcap=_cap(config, "attn_logit_softcapping"),
        logit_softcap=_cap(config, "final_logit_softcapping"),
    )


def _cap(config: Config, key: str) -> float | None:
    if not config.has(key):
        config.skip(key)
        return None
    return config.number(key, above=0)


GGUF_PATTERN = 2
"""Every second layer is global in llama.cpp's graph."""

LAYERS_OF_27B = 46
"""By which llama.cpp knows the 27B, and its attention scale."""


def _differences(decoder: Decoder) -> Iterator[str]:
    large = len(decoder.layers) == LAYERS_OF_27B
    width = decoder.hidden_size // decoder.heads if large else decoder.head_dim
    scale, fixed = decoder.softmax_scale, 1 / math.sqrt(width)
    if not math.isclose(scale, fixed, rel_tol=1e-6):
        yield f"an attention scale of {scale:g} (it has {fixed:g})"


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return window_keys(decoder, GGUF_PATTERN) | {
        "attn_logit_softcapping": decoder.attention_softcap or 0.0,
        "final_logit_softcapping": decoder.logit_softcap or 0.0,
    }


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    keys, config = facts.keys, built_like_llama(facts, windows=True)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    del config["hidden_act"]
    large = layers == LAYERS_OF_27B
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if large else config["head_dim"],
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "layer_types": [
            LAYER_TYPES[is_local] for is_local in local_layers(keys, layers, GGUF_PATTERN)
        ],
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "gemma2",
        GgufGraph(
            llama.GGUF_FEATURES
            | {
                Feature.NORM_OFFSET,
                Feature.POST_NORMS,
                Feature.EMBEDDING_SCALE,
                Feature.ATTENTION_SCALE,
                Feature.ATTENTION_SOFTCAP,
                Feature.LOGIT_SOFTCAP,
            },
            "gelu_tanh",
            always=frozenset({Feature.TIED_HEAD, Feature.ATTENTION_SOFTCAP, Feature.LOGIT_SOFTCAP}),
            differences=_differences,
        ),
        norm_plus_one=True,
        window=True,
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
