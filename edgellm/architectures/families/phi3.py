"""Phi 3 and 4: Llama with q, k and v in one tensor, gate and up in another, and longrope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import built_like_llama


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config)
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    config.skip("sliding_window", "layer_types")
    decoder = llama.read_decoder(
        config,
        shape,
        "phi3",
        windows=(window,) * shape.layers,
        default_theta=10000.0,
        turned=1.0,
    )
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.neutral(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):  # of Phi 4's first code
        config.neutral(key, 1)
    return replace(decoder, fused_qkv=True, fused_gate_up=True)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's, with the rows of q, k and v in one tensor and those of gate and up in another."""
    wide = decoder.query_size + 2 * decoder.kv_size
    for row in llama.tensors(decoder):
        if ".attn_q." in row.role:
            yield _renamed(row, "q_proj", "qkv_proj", "attn_q", "attn_qkv", wide)
        elif ".ffn_up." in row.role:
            yield _renamed(row, "up_proj", "gate_up_proj", "", "", 2 * decoder.ffn_size)
        elif not any(part in row.role for part in (".attn_k.", ".attn_v.", ".ffn_gate.")):
            yield row


def _renamed(
    row: TensorRow, old: str, new: str, old_role: str, new_role: str, rows: int
) -> TensorRow:
    source, role = row.source.replace(old, new), row.role.replace(old_role, new_role)
    return replace(row, source=source, role=role, shape=(rows, *row.shape[1:]))


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """llama.cpp computes no windows for Phi, whatever the file says of them."""
    facts.keys.skip("attention.sliding_window")
    return built_like_llama(facts, windows=True, partial_rope=True) | {"sliding_window": None}


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "phi3",
        GgufGraph(
            llama.GGUF_FEATURES | {Feature.ROPE_PARTIAL, Feature.ROPE_YARN, Feature.ROPE_FACTORS},
            "silu",
            square_attention=True,
        ),
        rope_factors=("rope_factors_long.weight", "rope_factors_short.weight"),
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
