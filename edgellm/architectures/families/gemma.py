"""Gemma 1: Llama with scaled embeddings, norms stored less one, and a gate through GELU.

The embedding's scale is taken as in ``gemma3_text``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout
from edgellm.architectures.gguf_metadata import built_like_llama


def read(config: Config) -> Decoder:
    """Early configs name GELU and mean its tanh form, as transformers knows."""
    shape = llama.read_shape(config, head_dim_required=True)
    config.neutral("use_bidirectional_attention", False)
    bias = config.flag("attention_bias", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "gemma",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        qkv_bias=bias,
        output_bias=bias,
        tied=True,
    )
    config.skip("hidden_activation")  # transformers reads the other key alone
    return replace(
        decoder,
        norm=replace(decoder.norm, offset=True),
        activation="gelu_tanh" if decoder.activation == "gelu" else decoder.activation,
        embedding_scale=math.sqrt(shape.hidden_size),
    )


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return built_like_llama(facts) | {"hidden_act": "gelu_pytorch_tanh"}


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "gemma",
        GgufGraph(
            llama.GGUF_FEATURES | {Feature.NORM_OFFSET, Feature.EMBEDDING_SCALE},
            "gelu_tanh",
            always=frozenset({Feature.TIED_HEAD}),
        ),
        norm_plus_one=True,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
