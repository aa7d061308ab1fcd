"""Phi 1 and 2: attention and a plain feed-forward side by side behind one layer norm.

Half of each head is turned, every product has a bias, and so has the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Norm
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import built_like_llama

NAMES = {
    ".self_attn.o_proj.": ".self_attn.dense.",
    ".mlp.up_proj.": ".mlp.fc1.",
    ".mlp.down_proj.": ".mlp.fc2.",
    "model.norm.": "model.final_layernorm.",
}
"""Llama's names, and Phi's."""


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, kv_heads_required=False)
    config.neutral("qk_layernorm", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "phi",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        turned=0.5,
        norm=Norm("layer", config.number("layer_norm_eps", above=0)),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    return replace(decoder, gated_mlp=False, parallel=True, shared_norm=True, head_bias=True)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's without a gate and the second norm, in Phi's words."""
    for row in llama.with_norm_biases(decoder):
        if ".ffn_gate." in row.role or ".ffn_norm." in row.role:
            continue
        source = row.source
        for theirs, ours in NAMES.items():
            source = source.replace(theirs, ours)
        yield replace(row, source=source)
    yield TensorRow("lm_head.bias", "output.bias", (decoder.vocab_size,), "bias")


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return built_like_llama(facts, partial_rope=True) | {"hidden_act": "gelu_new"}


FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "phi2",
        GgufGraph(
            frozenset(
                {
                    Feature.ROPE,
                    Feature.ROPE_PARTIAL,
                    Feature.ROPE_LINEAR,
                    Feature.ROPE_YARN,
                    Feature.LAYER_NORM,
                    Feature.PARALLEL_BLOCK,
                    Feature.SHARED_NORM,
                    Feature.PLAIN_MLP,
                    Feature.QKV_BIAS,
                    Feature.OUTPUT_BIAS,
                    Feature.MLP_BIAS,
                    Feature.HEAD_BIAS,
                }
            ),
            "gelu_tanh",
            square_attention=True,
        ),
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
