"""Granite 3 MoE: Granite with a mixture in every layer, stacked in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures import gguf_experts
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Experts, Router
from edgellm.architectures.experts import (
    Spelling,
    read_counts,
    skip_training,
    with_experts,
    with_mixtures,
)
from edgellm.architectures.families import granite, llama
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow, Value

SPELLING = Spelling(
    experts="block_sparse_moe.experts",
    router="block_sparse_moe.router.layer",
    gate_up=("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    down=("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    also=("block_sparse_moe.router",),
    shared="shared_mlp",
    stacked=True,
)


def read(config: Config) -> Decoder:
    decoder = granite.read(config)
    skip_training(config)
    count, used = read_counts(config, "num_local_experts", "num_experts")
    # Of the chosen logits, a softmax: the same as weights of all that are made to sum to one.
    experts = Experts(count, used, decoder.ffn_size, Router(normalized=True))
    return replace(decoder, family="granitemoe", layers=with_experts(decoder.layers, experts))


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Llama's with mixtures."""
    return with_mixtures(llama.tensors(decoder), decoder, SPELLING)


def gguf_keys(decoder: Decoder) -> dict[str, Value]:
    experts = gguf_experts.mixture_of(decoder)
    keys = granite.gguf_keys(decoder) | gguf_experts.expert_keys(decoder)
    if experts.shared_width:
        keys["expert_shared_feed_forward_length"] = experts.shared_width
    return keys


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """A file that names a shared expert is of the family with such."""
    count, used = gguf_experts.counts(facts)
    config = granite.from_gguf(facts)
    del config["mlp_bias"]
    shared = facts.keys.integer("expert_shared_feed_forward_length", 0, minimum=0)
    if shared:
        config |= {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return config | {"num_local_experts": count, "num_experts_per_tok": used}


GRAPH = GgufGraph(
    granite.GGUF_FEATURES | gguf_experts.NORMALIZED,
    "silu",
    always=gguf_experts.NORMALIZED,
    any_yarn=True,
    differences=gguf_experts.differences,
)

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "granitemoe",
        GRAPH,
        interleaved_rope=True,
        rope_factors=("rope_freqs.weight",),
        keys=gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
