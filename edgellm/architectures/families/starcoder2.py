"""StarCoder 2: layer norms with biases, a plain feed-forward, grouped heads and windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Norm
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import built_like_llama

NAMES = {".mlp.up_proj.": ".mlp.c_fc.", ".mlp.down_proj.": ".mlp.c_proj."}
"""Llama's names of products, and StarCoder's."""


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config)
    config.skip("residual_dropout", "embedding_dropout", "mlp_type", "norm_type")
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    config.skip("sliding_window", "layer_types")
    bias = config.flag("use_bias", True)
    decoder = llama.read_decoder(
        config,
        shape,
        "starcoder2",
        windows=(window,) * shape.layers,
        default_theta=10000.0,
        norm=Norm("layer", config.number("norm_epsilon", above=0)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied=True,
    )
    return replace(decoder, gated_mlp=False)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's without a gate, in StarCoder's words."""
    for row in llama.with_norm_biases(decoder):
        if ".ffn_gate." in row.role:
            continue
        source = row.source
        for theirs, ours in NAMES.items():
            source = source.replace(theirs, ours)
        yield replace(row, source=source)


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    config = built_like_llama(facts)
    epsilon = config.pop("layer_norm_eps")
    return config | {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": epsilon,
        "use_bias": True,
        "sliding_window": None,
    }


FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "starcoder2",
        GgufGraph(
            (llama.GGUF_FEATURES - {Feature.RMS_NORM, Feature.GATED_MLP})
            | {
                Feature.LAYER_NORM,
                Feature.PLAIN_MLP,
                Feature.ROPE_YARN,
                Feature.QKV_BIAS,
                Feature.OUTPUT_BIAS,
                Feature.MLP_BIAS,
            },
            "gelu_tanh",
            always=frozenset({Feature.OUTPUT_BIAS, Feature.MLP_BIAS}),
            square_attention=True,
        ),
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
