"""DeepSeek-V2: latent attention whose rotary positions turn pairs, and yarn that scales scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from edgellm.architectures import deepseek_experts
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.deepseek_experts import SPELLING, with_mixture
from edgellm.architectures.experts import with_mixtures
from edgellm.architectures.families import llama
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    Value,
)
from edgellm.architectures.gguf_metadata import built_like_llama, tidy
from edgellm.architectures.latent_rows import (
    WITHOUT_ADAPTERS,
    latent_tensors,
    read_latent,
    read_scaled_rope,
    read_shape,
    with_latent,
)
from edgellm.architectures.rope import yarn_attention_factor

LITE_LAYERS = (26, 27)
"""Numbers of layers that llama.cpp takes for a Lite model, whose queries are made at once."""
LITE_48 = (48, 128256)
"""Layers and vocabulary of another one."""

PER_MSCALE = 0.1
"""Of ``ln(factor)`` in yarn's factors, for an ``mscale_all_dim`` of one."""


def read(config: Config) -> Decoder:
    return with_mixture(config, read_dense(config, "deepseek_v2"), third=False)


def read_dense(config: Config, family: str) -> Decoder:
    """The network without its experts."""
    latent = read_latent(config, config.integer("num_attention_heads"))
    shape = read_shape(config, latent)
    rope, scale = read_scaled_rope(config, latent, shape.context_length, 10000.0)
    decoder = llama.read_decoder(
        config,
        shape,
        family,
        windows=(None,) * shape.layers,
        rope=rope,
        mlp_bias=config.flag("mlp_bias", False),
    )
    return with_latent(decoder, latent, scale)


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    return with_mixtures(latent_tensors(decoder, paired=True), decoder, SPELLING)


def gguf_keys(decoder: Decoder) -> dict[str, Value]:
    """What llama.cpp reads of latent attention that is absorbed: a cache of latents alone."""
    latent = decoder.latent
    assert latent is not None
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": latent.width,
        "attention.value_length": latent.rank,
        "attention.key_length_mla": decoder.head_dim,
        "attention.value_length_mla": latent.value_dim,
        "attention.q_lora_rank": latent.query_rank or 0,
        "attention.kv_lora_rank": latent.rank,
        **deepseek_experts.gguf_keys(decoder),
        **_yarn_keys(decoder),
    }


def _yarn_keys(decoder: Decoder) -> dict[str, Value]:
    """How llama.cpp comes to the factor of cos and sin and to that of the scores.

    With a multiplier L the first is ``rope.scaling.attn_factor`` alone, without one it is that
    times yarn's own, which is what the generic keys say. The root of the other is the first, times
    1 + L ln(factor) where there is one.
    """
    rope = decoder.layers[0].rope
    if rope is None or rope.scaling is None or rope.scaling.factor <= 1:
        return {}
    turned, grown = rope.scaling.attention_factor, _growth(decoder)
    if math.isclose(turned, grown, rel_tol=1e-6):
        return {}
    multiplier = (grown / turned - 1) / math.log(rope.scaling.factor)
    return {"rope.scaling.yarn_log_multiplier": multiplier, "rope.scaling.attn_factor": turned}


def _growth(decoder: Decoder) -> float:
    """The root of what scores are multiplied by beside 1/sqrt(head_dim)."""
    return math.sqrt(decoder.softmax_scale * decoder.head_dim**0.5)


def differences(decoder: Decoder) -> Iterator[str]:
    layers = len(decoder.layers)
    lite = layers in LITE_LAYERS or (layers, decoder.vocab_size) == LITE_48
    if lite and decoder.latent is not None and decoder.latent.query_rank is not None:
        yield f"queries out of a smaller vector in {layers} layers, which it takes for a Lite model"
    rope = decoder.layers[0].rope
    if decoder.attention_scale is not None and (rope is None or rope.scaling is None):
        yield "an attention scale without yarn"
    yield from deepseek_experts.differences(decoder)


def from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """Files with stacks state the widths of absorbed keys; older ones those of keys."""
    keys = facts.keys
    rank, rope_dim = keys.integer("attention.kv_lora_rank"), keys.integer("rope.dimension_count")
    key_dim, value_dim = (keys.integer(f"attention.{part}_length") for part in ("key", "value"))
    config = built_like_llama(facts, partial_rope=True, value_dim=value_dim)
    del config["head_dim"]
    if keys.has("attention.key_length_mla"):
        keys.neutral("attention.head_count_kv", 1)
        keys.neutral("attention.key_length", rank + rope_dim)
        keys.neutral("attention.value_length", rank)
        key_dim = keys.integer("attention.key_length_mla")
        value_dim = keys.integer("attention.value_length_mla")
    query_rank = keys.integer("attention.q_lora_rank", 0, minimum=0)
    return config | {
        "rope_parameters": _scaled(facts, config["rope_parameters"]),
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": query_rank or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        **deepseek_experts.from_gguf(facts, config["num_hidden_layers"]),
    }


def _scaled(facts: GgufFacts, rope: dict[str, Any]) -> dict[str, Any]:
    """``rope`` with what ``_yarn_keys`` says of scores."""
    keys, rope = facts.keys, {**rope}
    del rope["partial_rotary_factor"]
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if rope["rope_type"] == "linear":  # the graph takes any factor for yarn's
        raise keys.refusal("rope.scaling.type", "linear", "yarn or none")
    if rope["rope_type"] != "yarn" or rope["factor"] <= 1:
        return rope
    stated = keys.number("rope.scaling.attn_factor", 1.0)
    turned = stated if multiplier else stated * yarn_attention_factor(rope["factor"])
    grown = turned * (1 + multiplier * math.log(rope["factor"]))
    whole = (grown - 1) / (PER_MSCALE * math.log(rope["factor"]))
    return rope | {"attention_factor": tidy(turned), "mscale_all_dim": tidy(whole)}


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "deepseek2",
        GgufGraph(
            (llama.GGUF_FEATURES - {Feature.ROPE_LINEAR})
            | {Feature.ROPE_YARN, Feature.LATENT_ATTENTION, Feature.ATTENTION_SCALE}
            | deepseek_experts.FEATURES,
            "silu",
            without_adapters=(*WITHOUT_ADAPTERS, "output"),
            differences=differences,
        ),
        as_checkpoint=True,
        absorbed=True,
        keys=gguf_keys,
        config=from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
