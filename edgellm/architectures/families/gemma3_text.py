"""Gemma 3 (text): local layers with a window and a rope of their own between global ones.

Norm weights are stored less one, norms stand after attention and feed-forward too, queries and
keys are normed, and the embedding is scaled by sqrt(hidden). transformers rounds that scale to the
type of the weights (55.4256 becomes 55.5 in bfloat16); like llama.cpp, and like transformers in
float32, edgellm does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from edgellm.architectures.config import ACTIVATIONS, LAYER_TYPES, WINDOWED, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, Value
from edgellm.architectures.gguf_metadata import (
    DEFAULT_THETA,
    built_like_llama,
    local_layers,
    window_keys,
)
from edgellm.architectures.rope import StatedRope, rope_of_section


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, head_dim_required=True)
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        config.neutral(key)
    config.neutral("use_bidirectional_attention", False)
    types = _layer_types(config, shape.layers)
    window = config.integer("sliding_window") if WINDOWED in types else None
    config.skip("sliding_window")
    local, overall = _ropes(config, shape)
    bias = config.flag("attention_bias", False)
    scale = config.number("query_pre_attn_scalar", above=0)
    return Decoder(
        family="gemma3_text",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        ffn_size=shape.ffn_size,
        context_length=max(local[1], overall[1]),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        layers=tuple(
            Layer(window, local[0]) if kind == WINDOWED else Layer(None, overall[0])
            for kind in types
        ),
        norm=Norm("rms", config.number("rms_norm_eps", above=0), offset=True),
        activation=config.choice("hidden_activation", ACTIVATIONS),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        post_norms=True,
        embedding_scale=math.sqrt(shape.hidden_size),
        attention_scale=None if scale == shape.head_dim else scale**-0.5,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def _layer_types(config: Config, layers: int) -> tuple[str, ...]:
    """By ``layer_types``; older configs say that every n-th layer is global."""
    config.skip("_sliding_window_pattern")  # a copy that transformers writes and does not read
    if config.has("layer_types"):
        config.skip("sliding_window_pattern")
        return llama.read_layer_types(config, layers)
    every = config.integer("sliding_window_pattern")
    full, windowed = LAYER_TYPES
    return tuple(windowed if (index + 1) % every else full for index in range(layers))


def _ropes(config: Config, shape: llama.Shape) -> tuple[StatedRope, StatedRope]:
    """The ropes of local and of global layers, each with its context length.

    Older configs: ``rope_local_base_freq`` for the local ones, never scaled, and ``rope_theta``
    with ``rope_scaling`` for the global ones.
    """
    head_dim, context = shape.head_dim, shape.context_length
    if not config.has("rope_parameters"):
        plain = Config({"rope_theta": config.number("rope_local_base_freq", above=1)})
        local = rope_of_section(plain, head_dim, context, None, context)
        theta = config.number("rope_theta", above=1)
        if not config.has("rope_scaling"):
            config.skip("rope_scaling")
            return local, rope_of_section(Config({}), head_dim, context, theta, context)
        scaled = config.section("rope_scaling")
        return local, rope_of_section(scaled, head_dim, context, theta, context)
    ropes = []
    parameters = config.section("rope_parameters")
    for key in (WINDOWED, LAYER_TYPES[0]):
        section = parameters.section(key)
        section.neutral("truncate", True)  # transformers does not read it from a nested section
        ropes.append(rope_of_section(section, head_dim, context, None, context))
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
        config.neutral(key)
    return ropes[0], ropes[1]


GGUF_FEATURES = llama.GGUF_FEATURES | {
    Feature.ROPE_PER_LAYER,
    Feature.NORM_OFFSET,
    Feature.QK_NORM,
    Feature.POST_NORMS,
    Feature.EMBEDDING_SCALE,
    Feature.ATTENTION_SCALE,
}

GGUF_PATTERN = 6
"""Every sixth layer is global in llama.cpp's graph unless a key says otherwise."""

LAYERS_OF_27B = 62
"""By which llama.cpp knows the 27B, and its attention scale."""


def _differences(decoder: Decoder) -> Iterator[str]:
    width = (
        decoder.hidden_size // decoder.heads
        if len(decoder.layers) == LAYERS_OF_27B
        else decoder.head_dim
    )
    scale, fixed = decoder.softmax_scale, 1 / math.sqrt(width)
    if not math.isclose(scale, fixed, rel_tol=1e-6):
        yield f"an attention scale of {scale:g} (it has {fixed:g})"
    fixed = math.sqrt(decoder.hidden_size)
    if not math.isclose(decoder.embedding_scale, fixed, rel_tol=1e-6):
        yield f"an embedding scale of {decoder.embedding_scale:g} (it has {fixed:g})"
    local = [layer for layer in decoder.layers if layer.window is not None]
    if len(set(local)) > 1:
        yield "local layers that differ in window or rope"
    if any(layer.rope and layer.rope.scaling for layer in local):
        yield "rope scaling in local layers"


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    keys = window_keys(decoder, GGUF_PATTERN)
    local = [layer.rope for layer in decoder.layers if layer.window is not None]
    return keys | ({"rope.freq_base_swa": local[0].theta} if local and local[0] else {})


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """Windows and local rope by keys with defaults; the attention scale by the number of layers."""
    keys, config = facts.keys, built_like_llama(facts, windows=True)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    local = local_layers(keys, layers, GGUF_PATTERN) if window else [False] * layers
    theta = keys.number("rope.freq_base_swa", DEFAULT_THETA, above=1)
    full, windowed = LAYER_TYPES
    del config["hidden_act"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            config["hidden_size"] // heads if layers == LAYERS_OF_27B else config["head_dim"]
        ),
        "sliding_window": window or None,
        "layer_types": [windowed if is_local else full for is_local in local],
        "rope_parameters": {
            full: config["rope_parameters"],
            windowed: {"rope_type": "default", "rope_theta": theta},
        },
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
    }


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "gemma3",
        GgufGraph(GGUF_FEATURES, "gelu_tanh", differences=_differences),
        norm_plus_one=True,
        window=True,
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
