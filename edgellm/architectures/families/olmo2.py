"""OLMo 2: Llama with norms behind attention and feed-forward instead of before, and over q and k.

The norms of queries and keys go over all heads together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import LAYER_TYPES, Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import built_like_llama, local_layers
from edgellm.architectures.rope import StatedRope

NORMS = ("attn_norm.weight", "ffn_norm.weight")
"""Ends of the roles of norms that Llama has and OLMo 2 has not."""


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, kv_heads_required=False)
    return reordered(config, shape, "olmo2", (None,) * shape.layers)


def reordered(
    config: Config,
    shape: llama.Shape,
    family: str,
    windows: tuple[int | None, ...],
    rope: StatedRope | None = None,
) -> Decoder:
    """Llama with its norms behind the parts."""
    bias = config.flag("attention_bias", False)
    decoder = llama.read_decoder(
        config,
        shape,
        family,
        windows=windows,
        default_theta=10000.0,
        rope=rope,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    return replace(decoder, qk_norm_whole=True, pre_norms=False, post_norms=True)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's, with the norms before the parts left out and those of q and k as wide as they."""
    widths = {"attn_q_norm": decoder.query_size, "attn_k_norm": decoder.kv_size}
    for row in llama.tensors(decoder):
        if row.role.endswith(NORMS):
            continue
        part = row.role.split(".")[-2]
        yield replace(row, shape=(widths[part],)) if part in widths else row


GGUF_FEATURES = llama.GGUF_FEATURES | {
    Feature.ROPE_YARN,
    Feature.QK_NORM,
    Feature.QK_NORM_WHOLE,
    Feature.NO_PRE_NORMS,
    Feature.POST_NORMS,
}


GGUF_PATTERN = 4
"""Every fourth layer is global in a graph with windows, unless a key says otherwise."""


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """A file that names a window is OLMo 3."""
    keys, config = facts.keys, built_like_llama(facts, windows=True)
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    if not window:
        return config
    rope, layers = config["rope_parameters"], config["num_hidden_layers"]
    theta = keys.number("rope.freq_base_swa", rope["rope_theta"], above=1)
    full, windowed = LAYER_TYPES
    return config | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": [
            LAYER_TYPES[is_local] for is_local in local_layers(keys, layers, GGUF_PATTERN)
        ],
        "rope_parameters": {
            full: rope,
            windowed: {"rope_type": "default", "rope_theta": theta},
        },
    }


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "olmo2",
        GgufGraph(GGUF_FEATURES - {Feature.TIED_HEAD}, "silu", square_attention=True),
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
