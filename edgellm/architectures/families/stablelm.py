"""StableLM: Llama with layer norms, a part of each head turned, and for 12B a parallel block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Norm
from edgellm.architectures.families import llama
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    Value,
)
from edgellm.architectures.gguf_metadata import built_like_llama


def read(config: Config) -> Decoder:
    """StableLM 2 12B norms queries and keys, with weights of its own for each head."""
    shape = llama.read_shape(config)
    normed = config.flag("qk_layernorm", False)
    parallel = config.flag("use_parallel_residual", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "stablelm",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        turned=0.25,
        norm=Norm("layer", config.number("layer_norm_eps", above=0)),
        qkv_bias=config.flag("use_qkv_bias", False),
        qk_norm=normed,
    )
    return replace(decoder, parallel=parallel, shared_norm=parallel, qk_norm_by_head=normed)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with biases of norms; a parallel block has one norm, and heads have no biases."""
    heads = {"attn_q_norm": decoder.heads, "attn_k_norm": decoder.kv_heads}
    for row in llama.with_norm_biases(decoder):
        part = row.role.split(".")[-2]
        if part not in heads:
            if not (decoder.shared_norm and part == "ffn_norm"):
                yield row
        elif row.kind == "norm":
            stem = row.source.removesuffix("_norm.weight") + "_layernorm.norms"
            pieces = tuple(f"{stem}.{head}.weight" for head in range(heads[part]))
            shape = heads[part], decoder.head_dim
            yield replace(row, source=f"{stem}.weight", shape=shape, pieces=pieces)


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return {"use_parallel_residual": decoder.parallel}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    config = built_like_llama(facts, partial_rope=True)
    parallel = "blk.0.ffn_norm.weight" not in facts.names
    facts.keys.neutral("use_parallel_residual", True, False)  # llama.cpp goes by the norm
    return config | {
        "use_parallel_residual": parallel,
        "use_qkv_bias": "blk.0.attn_q.bias" in facts.names,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in facts.names,
    }


FAMILY = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "stablelm",
        GgufGraph(
            (llama.GGUF_FEATURES - {Feature.RMS_NORM, Feature.TIED_HEAD})
            | {
                Feature.LAYER_NORM,
                Feature.ROPE_PARTIAL,
                Feature.ROPE_YARN,
                Feature.QKV_BIAS,
                Feature.PARALLEL_BLOCK,
                Feature.SHARED_NORM,
                Feature.QK_NORM,
                Feature.QK_NORM_BY_HEAD,
            },
            "silu",
            square_attention=True,
        ),
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
