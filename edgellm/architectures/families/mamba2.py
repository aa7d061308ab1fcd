"""Mamba 2: state-space layers whose heads share a decay, with a norm before their output."""

from __future__ import annotations

import math
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.families import mamba
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, Value

NO_LIMIT = ((0.0, math.inf), [0.0, math.inf], [0.0, {"__float__": "Infinity"}])
"""Bounds of steps that bound nothing, as transformers and others write them."""


def read(config: Config) -> Decoder:
    hidden, heads = config.integer("hidden_size"), config.integer("num_heads")
    inner = int(config.number("expand", 2.0, above=0) * hidden)
    if inner % heads:
        raise config.refusal("num_heads", heads, f"a divisor of the {inner} values inside")
    config.neutral("head_dim", inner // heads)
    groups = config.integer("n_groups", 1)
    if heads % groups:
        raise config.refusal("n_groups", groups, f"a divisor of the {heads} heads")
    config.neutral("time_step_limit", *NO_LIMIT)
    config.skip("time_step_rank", "norm_before_gate")  # which its class does not read
    return mamba.read_decoder(config, "mamba2", tied=False, heads=heads, groups=groups)


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return mamba.gguf_keys(decoder) | {"ssm.group_count": mamba.settings_of(decoder).groups}


def _gguf_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    settings = mamba.settings_of(decoder)
    by_group = (settings.groups, settings.inner // settings.groups)
    return {**dict.fromkeys(("ssm_a", "ssm_d"), (settings.heads, 1)), "ssm_norm.weight": by_group}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    shared, heads = mamba.from_gguf(facts), facts.keys.integer("ssm.time_step_rank")
    return shared | {
        "num_heads": heads,
        "head_dim": int(shared["expand"] * shared["hidden_size"]) // heads,
        "n_groups": facts.keys.integer("ssm.group_count"),
    }


FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    read=read,
    tensors=mamba.tensors,
    gguf=GgufLayout(
        "mamba2",
        GgufGraph(mamba.GGUF_FEATURES, "silu", differences=mamba.differences),
        shapes=_gguf_shapes,
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="backbone.",
)
