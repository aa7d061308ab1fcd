"""Gemma 3 (text): local layers with a window and a rope of their own between global ones.

Norm weights are stored less one, norms stand after attention and feed-forward too, queries and
keys are normed, and the embedding is scaled by sqrt(hidden). transformers rounds that scale to the
type of the weights (55.4256 becomes 55.5 in bfloat16); like llama.cpp, and like transformers in
float32, edgellm does not.
"""

from __future__ import annotations

import math

from edgellm.architectures import llama
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Layer, Norm
from edgellm.architectures.family import Family, GgufLayout
from edgellm.architectures.rope import StatedRope, rope_of_section


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, head_dim_required=True)
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        config.neutral(key)
    config.neutral("use_bidirectional_attention", False)
    types = _layer_types(config, shape.layers)
    window = config.integer("sliding_window") if llama.WINDOWED in types else None
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
            Layer(window, local[0]) if kind == llama.WINDOWED else Layer(None, overall[0])
            for kind in types
        ),
        norm=Norm("rms", config.number("rms_norm_eps", above=0), offset=True),
        activation=config.choice("hidden_activation", llama.ACTIVATIONS),
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
    full, windowed = llama.LAYER_TYPES
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
    for key in (llama.WINDOWED, llama.LAYER_TYPES[0]):
        section = parameters.section(key)
        section.neutral("truncate", True)  # transformers does not read it from a nested section
        ropes.append(rope_of_section(section, head_dim, context, None, context))
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
        config.neutral(key)
    return ropes[0], ropes[1]


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout("gemma3", norm_plus_one=True, window=True),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
