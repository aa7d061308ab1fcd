"""LFM2: short convolutions in most layers, attention with normed queries and keys in the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm, ShortConvolution
from edgellm.architectures.families import llama
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    Kind,
    TensorRow,
    Value,
    weight_and_bias,
)
from edgellm.architectures.gguf_metadata import rope_config
from edgellm.architectures.rope import read_rope
from edgellm.errors import UnsupportedModel

ATTENTION, CONVOLUTION = "full_attention", "conv"
"""Kinds of layers as ``layer_types`` names them."""

DEFAULT_THETA = 1e6

FFN_SIZES = ("block_ff_dim", "intermediate_size")
"""The key of the feed-forward's width, of which the first that is there counts."""

AS_ALWAYS = {"block_use_swiglu": True, "use_pos_enc": True}
"""Keys of published configs that its class does not read, and what it computes."""

OF_TRAINING = (
    "block_mlp_init_scale",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_use_xavier_init",
)


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, ffn_size=config.spelled(*FFN_SIZES))
    config.skip(*FFN_SIZES, *OF_TRAINING)
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        config.neutral(key, shape.hidden_size)
    config.neutral("num_heads", shape.heads)
    for key, value in AS_ALWAYS.items():
        config.neutral(key, value)
    epsilon = config.number("norm_eps", above=0)
    config.neutral("block_norm_eps", epsilon)
    rope, context = read_rope(config, shape.head_dim, shape.context_length, DEFAULT_THETA)
    convolution = ShortConvolution(
        config.integer("conv_L_cache", 3, minimum=2), config.flag("conv_bias", False)
    )
    attends = _attends(config, shape.layers)
    config.skip("tie_embedding", "tie_word_embeddings")
    return Decoder(
        family="lfm2",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        ffn_size=_adjusted(config, shape.ffn_size),
        context_length=context,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        layers=tuple(
            Layer(rope=rope) if attention else Layer(convolution=convolution)
            for attention in attends
        ),
        norm=Norm("rms", epsilon),
        activation="silu",
        qk_norm=True,
        tied_head=config.flag(config.spelled("tie_embedding", "tie_word_embeddings"), True),
    )


def _attends(config: Config, layers: int) -> tuple[bool, ...]:
    """Which layers have attention: those that are listed; all where nothing is."""
    config.skip("layer_types", "full_attn_idxs")
    if config.has("layer_types"):
        types = config.texts("layer_types")
        if len(types) != layers or not {ATTENTION, CONVOLUTION}.issuperset(types):
            raise config.refusal(
                "layer_types", types, f"{ATTENTION} or {CONVOLUTION} for each of {layers} layers"
            )
        attends = tuple(kind == ATTENTION for kind in types)
    elif config.has("full_attn_idxs"):
        listed = config.integers("full_attn_idxs")
        attends = tuple(index in listed for index in range(layers))
    else:
        attends = (True,) * layers
    if not any(attends):
        raise UnsupportedModel(
            f"{config.where}: no layer has attention, and runtimes count a text's tokens by its "
            "keys and values: a model with at least one such layer is converted"
        )
    return attends


def _adjusted(config: Config, stated: int) -> int:
    """The feed-forward's width: two thirds of what is stated, unless a flag says otherwise.

    Times a factor and rounded up, as ``Lfm2MLP`` does.
    """
    multiple = config.integer("block_multiple_of", 256)
    none = config.states("block_ffn_dim_multiplier") and not config.has("block_ffn_dim_multiplier")
    factor = config.number("block_ffn_dim_multiplier", 1.0, above=0)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return stated
    width = int(2 * stated / 3)
    return width if none else -(-int(factor * width) // multiple) * multiple


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Every tensor, in the order of the computation."""
    hidden, ffn, head_dim = decoder.hidden_size, decoder.ffn_size, decoder.head_dim
    query, key = decoder.query_size, decoder.kv_size

    def weight(source: str, role: str, *shape: int) -> Iterator[TensorRow]:
        kind: Kind = "norm" if len(shape) == 1 else "linear"
        return weight_and_bias(source, role, shape, kind, biased=False)

    yield TensorRow(
        "model.embed_tokens.weight", "token_embd.weight", (decoder.vocab_size, hidden), "embedding"
    )
    for index, layer in enumerate(decoder.layers):
        source, role = f"model.layers.{index}", f"blk.{index}"
        yield from weight(f"{source}.operator_norm", f"{role}.attn_norm", hidden)
        if layer.convolution is None:
            attention = f"{source}.self_attn"
            yield from weight(f"{attention}.q_proj", f"{role}.attn_q", query, hidden)
            yield from weight(f"{attention}.k_proj", f"{role}.attn_k", key, hidden)
            yield from weight(f"{attention}.v_proj", f"{role}.attn_v", key, hidden)
            yield from weight(f"{attention}.q_layernorm", f"{role}.attn_q_norm", head_dim)
            yield from weight(f"{attention}.k_layernorm", f"{role}.attn_k_norm", head_dim)
            yield from weight(f"{attention}.out_proj", f"{role}.attn_output", hidden, query)
        else:
            yield from _convolution(f"{source}.conv", role, hidden, layer.convolution)
        mlp = f"{source}.feed_forward"
        yield from weight(f"{source}.ffn_norm", f"{role}.ffn_norm", hidden)
        yield from weight(f"{mlp}.w1", f"{role}.ffn_gate", ffn, hidden)
        yield from weight(f"{mlp}.w3", f"{role}.ffn_up", ffn, hidden)
        yield from weight(f"{mlp}.w2", f"{role}.ffn_down", hidden, ffn)
    yield from weight("model.embedding_norm", "output_norm", hidden)
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (decoder.vocab_size, hidden), "head")


def _convolution(
    source: str, role: str, hidden: int, settings: ShortConvolution
) -> Iterator[TensorRow]:
    role, biased = f"{role}.shortconv", settings.biased
    yield from weight_and_bias(
        f"{source}.in_proj", f"{role}.in_proj", (3 * hidden, hidden), "linear", biased
    )
    yield from weight_and_bias(
        f"{source}.conv", f"{role}.conv", (hidden, 1, settings.width), "convolution", biased
    )
    yield from weight_and_bias(
        f"{source}.out_proj", f"{role}.out_proj", (hidden, hidden), "linear", biased
    )


def _gguf_names(decoder: Decoder) -> dict[str, str]:
    return {"output_norm": "token_embd_norm"}


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    widths = {layer.convolution.width for layer in decoder.layers if layer.convolution}
    return {"shortconv.l_cache": max(widths, default=2)}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """A layer without heads of keys is one with a convolution."""
    keys = facts.keys
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    layers = keys.integer("block_count", maximum=MOST_LAYERS)
    context = keys.integer("context_length")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        keys.neutral(key, hidden // heads)
    keys.neutral("attention.sliding_window", 0)
    by_layer = "attention.head_count_kv"
    if keys.lists(by_layer):
        counts = keys.numbers(by_layer)
    else:
        counts = (float(keys.integer(by_layer, heads)),) * layers
    shared = set(counts) - {0.0}
    if len(counts) != layers or len(shared) != 1:
        raise keys.refusal(by_layer, counts, f"one number, or 0, for each of the {layers} layers")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": int(shared.pop()),
        "intermediate_size": keys.integer("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "max_position_embeddings": context,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_config(keys, context, None),
        "layer_types": [ATTENTION if count else CONVOLUTION for count in counts],
        "conv_L_cache": keys.integer("shortconv.l_cache", minimum=2),
    }


FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "lfm2",
        GgufGraph(
            llama.GGUF_FEATURES | {Feature.ROPE_YARN, Feature.QK_NORM, Feature.SHORT_CONVOLUTION},
            "silu",
            square_attention=True,
        ),
        names=_gguf_names,
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="model.",
)
