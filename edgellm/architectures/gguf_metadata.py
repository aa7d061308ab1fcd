"""Hyper-parameters in GGUF: as keys that llama.cpp reads, and back as a Hugging Face config.

What llama.cpp takes where a key is missing, and what it fixes in the code of an architecture
(``src/llama-model.cpp`` and ``src/models/`` there), is written next to the key concerned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Rope, RopeScaling
from edgellm.architectures.family import GgufFacts, GgufLayout, Value
from edgellm.architectures.rope import inverse_frequencies, yarn_attention_factor
from edgellm.architectures.rope_scaling import main_rope
from edgellm.errors import UnsupportedModel

DEFAULT_THETA: Final = 10000.0

# Keys under the architecture's name that say nothing about the maths of a forward pass.
HARMLESS_KEYS: Final = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})

# Keys that change the maths unless they hold one of these.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "pooling_type": (0,),
    "use_parallel_residual": (True, False),  # read for other architectures only
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def gguf_keys(decoder: Decoder, layout: GgufLayout) -> dict[str, Value]:
    """What llama.cpp reads about the network; int stands for uint32, float for float32.

    What ``rope_factors`` gives goes beside them as ``layout.rope_factors``. Whether llama.cpp's
    graph can express the rest is for the exporter to check.
    """
    keys: dict[str, Value] = {
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.context_length,
        "embedding_length": decoder.hidden_size,
        "block_count": len(decoder.layers),
        "feed_forward_length": decoder.ffn_size,
        "attention.head_count": decoder.heads,
        "attention.head_count_kv": kv_heads_by_layer(decoder),
    }
    if decoder.attending:
        keys["attention.key_length"] = keys["attention.value_length"] = decoder.head_dim
    if decoder.norm.kind == "rms":
        keys["attention.layer_norm_rms_epsilon"] = decoder.norm.epsilon
    else:
        keys["attention.layer_norm_epsilon"] = decoder.norm.epsilon
    rope = main_rope(decoder)
    if rope is not None:
        keys.update(_rope_keys(rope, factors=rope_factors(decoder, layout) is not None))
    keys.update(layout.keys(decoder))
    return {f"{layout.arch}.{key}": value for key, value in keys.items()}


def rope_factors(decoder: Decoder, layout: GgufLayout) -> tuple[float, ...] | None:
    """What llama.cpp's graph divides each frequency by, ``[dimensions / 2]``, or None.

    That is how GGUF holds llama3's scaling, and how it can hold a yarn with settings that
    llama.cpp has no key for. Not every graph looks at them.
    """
    rope = main_rope(decoder)
    if rope is None or rope.scaling is None or not layout.rope_factors:
        return None
    if rope.scaling.kind == "linear" or (rope.scaling.kind == "yarn" and has_keys(rope.scaling)):
        return None
    plain, _ = inverse_frequencies(replace(rope, scaling=None))
    scaled, _ = inverse_frequencies(rope)
    return tuple(float(factor) for factor in plain / scaled)


def kv_heads_by_layer(decoder: Decoder) -> int | list[int]:
    """Heads of keys and values; by layer, with 0 where there are none, unless all have them."""
    if len(decoder.attending) in (0, len(decoder.layers)):
        return decoder.kv_heads
    return [decoder.kv_heads if layer.attends else 0 for layer in decoder.layers]


def has_keys(scaling: RopeScaling) -> bool:
    """Whether GGUF has keys for all of it: of a yarn, llama.cpp fixes these three settings."""
    settings = (scaling.beta_fast, scaling.beta_slow, scaling.truncate)
    return scaling.kind != "yarn" or settings == (32.0, 1.0, True)


def every_but(pattern: int, layers: int) -> list[bool]:
    """Which layers have a window when each ``pattern``-th has none."""
    return [bool((index + 1) % pattern) for index in range(layers)]


def local_layers(keys: Config, layers: int, pattern: int) -> list[bool]:
    """Which layers have a window, by their key or, without it, by the graph's own ``pattern``."""
    key = "attention.sliding_window_pattern"
    if not keys.lists(key):
        return every_but(keys.integer(key, pattern), layers)
    local = keys.flags(key)
    if len(local) != layers:
        raise keys.refusal(key, local, f"one entry for each of the {layers} layers")
    return list(local)


def window_keys(decoder: Decoder, pattern: int) -> dict[str, Value]:
    """The keys of windows of a graph that has them; ``pattern`` is what it takes without a list."""
    window = next((layer.window for layer in decoder.layers if layer.window), None)
    if window is None:
        return {}
    local = [layer.window is not None for layer in decoder.layers]
    keys: dict[str, Value] = {"attention.sliding_window": window}
    if local != every_but(pattern, len(local)):
        keys["attention.sliding_window_pattern"] = local
    return keys


def _rope_keys(rope: Rope, *, factors: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "rope.dimension_count": rope.dimensions,
        "rope.freq_base": rope.theta,
    }
    scaling = rope.scaling
    if scaling is None:
        return keys
    attention = scaling.attention_factor
    if scaling.kind == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = scaling.factor
    elif scaling.kind == "yarn" and not factors:
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = scaling.factor
        keys["rope.scaling.original_context_length"] = scaling.original_context
        # llama.cpp multiplies the paper's factor in by itself.
        attention /= yarn_attention_factor(scaling.factor)
    if not math.isclose(attention, 1.0, rel_tol=1e-7):
        keys["rope.scaling.attn_factor"] = attention
    return keys


def facts_of(
    arch: str,
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    factors: Sequence[float] | None,
    ignore_config_keys: Collection[str],
) -> GgufFacts:
    """What a file of architecture ``arch`` says of its network."""
    prefix = f"{arch}."
    keys = Config(
        {
            key.removeprefix(prefix): tidy(value)
            for key, value in metadata.items()
            if key.startswith(prefix)
        },
        ignore={key.removeprefix(prefix) for key in ignore_config_keys},
        where=f"GGUF metadata, {prefix}*",
        harmless=HARMLESS_KEYS,
        neutral=NEUTRAL_VALUES,
    )
    return GgufFacts(keys, frozenset(tensor_names), factors)


def tidy(value: Any) -> Any:
    """A float32 that was widened, as the shortest decimal that means it (1e-05)."""
    if isinstance(value, float | np.floating):
        return float(str(np.float32(value)))
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def vocab_size(keys: Config, metadata: Mapping[str, Any]) -> int:
    """By its key, which not every architecture has, or by the tokenizer's list."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return keys.integer("vocab_size", *(() if tokens is None else (len(tokens),)))


def built_like_llama(
    facts: GgufFacts,
    *,
    windows: bool = False,
    partial_rope: bool = False,
    value_dim: int | None = None,
) -> dict[str, Any]:
    """The config's keys that families built like Llama share, their activation and rope among them.

    ``windows``: the architecture's graph has some, and its family reads the keys of them. Where it
    has none, a file that names a window means something that is not known. ``partial_rope``: heads
    may be turned in part. ``value_dim``: of a head, where it is not the key's.
    """
    keys = facts.keys
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(hidden // heads, 1))
    keys.neutral("attention.value_length", value_dim or head_dim)
    turned = keys.integer("rope.dimension_count", head_dim, maximum=head_dim)
    if turned != head_dim and not partial_rope:
        raise keys.refusal("rope.dimension_count", turned, f"the {head_dim} values of a head")
    if not windows:
        keys.neutral("attention.sliding_window", 0)
    context = keys.integer("context_length")
    rope = rope_config(keys, context, facts.factors)
    if partial_rope:
        rope["partial_rotary_factor"] = turned / head_dim
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": keys.integer("block_count", maximum=MOST_LAYERS),
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.integer("feed_forward_length"),
        "max_position_embeddings": context,
        **_epsilon(keys),
        "hidden_act": "silu",
        "rope_parameters": rope,
    }


@dataclass(frozen=True, slots=True)
class PlainSizes:
    """The sizes of a network whose heads have keys and values each and make its width together."""

    hidden: int
    heads: int
    layers: int
    context: int
    ffn: int
    epsilon: float


def plain_sizes(facts: GgufFacts) -> PlainSizes:
    """The sizes of a GPT-2, and of what was built like it before Llama.

    Raises ``UnsupportedModel`` where heads share keys, or are of another width.
    """
    keys = facts.keys
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    for key in ("attention.key_length", "attention.value_length"):
        keys.neutral(key, hidden // heads)
    keys.neutral("attention.head_count_kv", heads)
    return PlainSizes(
        hidden,
        heads,
        keys.integer("block_count", maximum=MOST_LAYERS),
        keys.integer("context_length"),
        keys.integer("feed_forward_length"),
        keys.number("attention.layer_norm_epsilon"),
    )


def _epsilon(keys: Config) -> dict[str, Any]:
    if keys.has("attention.layer_norm_rms_epsilon"):
        return {"rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")}
    return {"layer_norm_eps": keys.number("attention.layer_norm_epsilon")}


def attention_biases(facts: GgufFacts, arch: str) -> bool:
    """Whether all of q, k, v and the attention's output have biases, as their tensors tell.

    Raises ``UnsupportedModel`` where some have.
    """
    parts = ("attn_q", "attn_k", "attn_v", "attn_output")
    biased = {f"blk.0.{role}.bias" in facts.names for role in parts}
    if len(biased) > 1:
        raise UnsupportedModel(
            f"GGUF of the architecture {arch}: the file has some of the biases on q, k, v and the "
            f"attention's output and not the others; edgellm reads all or none"
        )
    return biased == {True}


def rope_config(keys: Config, context: int, factors: Sequence[float] | None) -> dict[str, Any]:
    """``rope_parameters`` of the layers without a window, as llama.cpp reads the keys.

    A missing type means linear, a missing factor 1; the attention factor counts for every type.
    """
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base", DEFAULT_THETA, above=1),
    }
    kind = keys.choice(
        "rope.scaling.type", {"none": "none", "linear": "linear", "yarn": "yarn"}, "linear"
    )
    older = keys.number("rope.scale_linear", 0.0)  # looked at where the newer name is missing
    factor = keys.number("rope.scaling.factor", older) or 1.0
    attention = keys.number("rope.scaling.attn_factor", 1.0, above=0)
    trained = keys.integer("rope.scaling.original_context_length", context)
    if kind == "yarn":
        if factors is not None:
            raise UnsupportedModel("GGUF with both yarn and rope_freqs.weight is not understood")
        # Two keys that llama.cpp reads for other architectures only, but its converter writes with
        # the values that the model was trained with.
        stated = keys.has("rope.scaling.yarn_attn_factor") or attention != 1.0
        given = keys.number("rope.scaling.yarn_attn_factor", yarn_attention_factor(factor))
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": trained,
            "attention_factor": tidy(given * attention) if stated else None,
            "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind == "none":
        factor = 1.0
    if factors is not None:
        return rope | {
            "rope_type": "factors",
            "factors": [float(value) * factor for value in factors],
            "attention_factor": attention,
        }
    if attention != 1.0:
        raise keys.refusal("rope.scaling.attn_factor", attention, "1 where the rope is not yarn")
    if factor != 1.0:
        return rope | {"rope_type": "linear", "factor": factor}
    return rope
