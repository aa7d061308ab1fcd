"""Llama, and the parts of it that the families built like it share.

Mistral, Qwen 2, Qwen 3 and Gemma 3 are Llama with changes: their files read those changes and take
the rest from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgellm.architectures.config import (
    ACTIVATIONS,
    LAYER_TYPES,
    MOST_LAYERS,
    REQUIRED,
    WINDOWED,
    Config,
)
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    Kind,
    TensorRow,
)
from edgellm.architectures.gguf_metadata import attention_biases, built_like_llama
from edgellm.architectures.rope import StatedRope, read_rope
from edgellm.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that every family built like Llama states under the same keys."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int


def read_shape(
    config: Config,
    *,
    kv_heads_required: bool = True,
    head_dim_required: bool = False,
    ffn_size: str = "intermediate_size",
) -> Shape:
    """The sizes; ``head_dim`` defaults to hidden over heads, as in transformers.

    ``ffn_size``: the key of that size.
    Raises ``UnsupportedModel`` for a missing key and for heads that do not divide.
    """
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", REQUIRED if kv_heads_required else heads)
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    if not head_dim_required and not config.has("head_dim") and hidden % heads:
        raise config.refusal(
            "num_attention_heads", heads, f"a divisor of hidden_size = {hidden}, or a head_dim"
        )
    head_dim = config.integer("head_dim", REQUIRED if head_dim_required else hidden // heads)
    if head_dim % 2:
        raise config.refusal("head_dim", head_dim, "an even number: rotary positions turn pairs")
    return Shape(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer(ffn_size),
        layers=config.integer("num_hidden_layers", maximum=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=config.integer("max_position_embeddings"),
    )


def read_layer_types(config: Config, layers: int) -> tuple[str, ...]:
    """The kind of attention of each layer, as ``layer_types`` lists them."""
    types = config.texts("layer_types")
    if len(types) != layers:
        raise config.refusal("layer_types", types, f"one entry for each of the {layers} layers")
    for kind in types:
        if kind not in LAYER_TYPES:
            raise config.refusal("layer_types", kind, " or ".join(LAYER_TYPES))
    return types


def read_decoder(
    config: Config,
    shape: Shape,
    family: str,
    *,
    windows: tuple[int | None, ...],
    default_theta: float | None = None,
    turned: float | None = None,
    rope: StatedRope | None = None,
    norm: Norm | None = None,
    activation: str = "hidden_act",
    tied: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> Decoder:
    """A decoder built like Llama: norms before attention and feed-forward, rope, gated MLP.

    ``rope``: where the config states it in its family's own way; else ``default_theta`` and
    ``turned`` are as ``read_rope`` takes them. ``norm`` None for RMS norms; ``activation`` is the
    key that names it; ``tied``: whether the head is where no key says.
    """
    turns, context_length = rope or read_rope(
        config, shape.head_dim, shape.context_length, default_theta, turned=turned
    )
    return Decoder(
        family=family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        ffn_size=shape.ffn_size,
        context_length=context_length,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        layers=tuple(Layer(window, turns) for window in windows),
        norm=norm or Norm("rms", config.number("rms_norm_eps", above=0)),
        activation=config.choice(activation, ACTIVATIONS),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_head=config.flag("tie_word_embeddings", tied),
    )


def read(config: Config) -> Decoder:
    """Llama 1 to 3 and what was trained in its shape. Llama 1 states neither theta nor kv heads."""
    shape = read_shape(config, kv_heads_required=False)
    if config.has("layer_types") and WINDOWED in read_layer_types(config, shape.layers):
        raise UnsupportedModel(
            f"{config.where}: layer_types asks for windows, which llama does not have: "
            f"set model_type to the family that was meant"
        )
    attention_bias = config.flag("attention_bias", False)
    return read_decoder(
        config,
        shape,
        "llama",
        windows=(None,) * shape.layers,
        default_theta=10000.0,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Every tensor of a model built like Llama, in the order of the computation."""
    hidden, ffn, head_dim = decoder.hidden_size, decoder.ffn_size, decoder.head_dim
    query, key = decoder.query_size, decoder.kv_size

    def product(source: str, role: str, out: int, into: int, bias: bool) -> Iterator[TensorRow]:
        yield TensorRow(f"{source}.weight", f"{role}.weight", (out, into), "linear")
        if bias:
            yield TensorRow(f"{source}.bias", f"{role}.bias", (out,), "bias")

    def vector(source: str, role: str, size: int, kind: Kind = "norm") -> TensorRow:
        return TensorRow(f"{source}.weight", f"{role}.weight", (size,), kind)

    yield TensorRow(
        "model.embed_tokens.weight", "token_embd.weight", (decoder.vocab_size, hidden), "embedding"
    )
    for index in range(len(decoder.layers)):
        source, role = f"model.layers.{index}", f"blk.{index}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        yield vector(f"{source}.input_layernorm", f"{role}.attn_norm", hidden)
        yield from product(f"{attention}.q_proj", f"{role}.attn_q", query, hidden, decoder.qkv_bias)
        yield from product(f"{attention}.k_proj", f"{role}.attn_k", key, hidden, decoder.qkv_bias)
        yield from product(f"{attention}.v_proj", f"{role}.attn_v", key, hidden, decoder.qkv_bias)
        if decoder.qk_norm:
            yield vector(f"{attention}.q_norm", f"{role}.attn_q_norm", head_dim)
            yield vector(f"{attention}.k_norm", f"{role}.attn_k_norm", head_dim)
        yield from product(
            f"{attention}.o_proj", f"{role}.attn_output", hidden, query, decoder.output_bias
        )
        # Where norms follow too, "post_attention_layernorm" is such a one; otherwise it is the
        # norm before the feed-forward, whatever its name says.
        if decoder.post_norms:
            yield vector(
                f"{source}.post_attention_layernorm", f"{role}.post_attention_norm", hidden
            )
            yield vector(f"{source}.pre_feedforward_layernorm", f"{role}.ffn_norm", hidden)
        else:
            yield vector(f"{source}.post_attention_layernorm", f"{role}.ffn_norm", hidden)
        yield from product(f"{mlp}.gate_proj", f"{role}.ffn_gate", ffn, hidden, decoder.mlp_bias)
        yield from product(f"{mlp}.up_proj", f"{role}.ffn_up", ffn, hidden, decoder.mlp_bias)
        yield from product(f"{mlp}.down_proj", f"{role}.ffn_down", hidden, ffn, decoder.mlp_bias)
        if decoder.post_norms:
            yield vector(f"{source}.post_feedforward_layernorm", f"{role}.post_ffw_norm", hidden)
    yield vector("model.norm", "output_norm", hidden)
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (decoder.vocab_size, hidden), "head")


def with_norm_biases(decoder: Decoder) -> Iterator[TensorRow]:
    """The same with a bias behind each norm's weight, as layer norms have."""
    for row in tensors(decoder):
        yield row
        if row.kind == "norm":
            source, role = (name.removesuffix("weight") + "bias" for name in (row.source, row.role))
            yield TensorRow(source, role, row.shape, "bias")


GGUF_FEATURES = frozenset(
    {
        # Never refused: a graph without windows is right for contexts within the window.
        Feature.SLIDING_WINDOW,
        Feature.ALTERNATING_WINDOW,
        Feature.ROPE,
        Feature.ROPE_LINEAR,
        Feature.RMS_NORM,
        Feature.GATED_MLP,
        Feature.TIED_HEAD,
    }
)
"""What the graphs built like that of ``llama`` share."""

GGUF_LLAMA = GGUF_FEATURES | {
    Feature.ROPE_YARN,
    Feature.ROPE_LLAMA3,
    Feature.ROPE_FACTORS,
    Feature.QKV_BIAS,
    Feature.OUTPUT_BIAS,
    Feature.MLP_BIAS,
}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """Biases are those that are there."""
    if facts.keys.has("expert_count") and facts.keys.integer("expert_count", minimum=0):
        from edgellm.architectures.families import mixtral  # which is built on this

        return mixtral.from_gguf(facts)
    biases = {
        "attention_bias": attention_biases(facts, "llama"),
        "mlp_bias": "blk.0.ffn_up.bias" in facts.names,
    }
    return built_like_llama(facts) | biases


# Old checkpoints carry the table that rope_theta gives anyway.
IGNORED_TENSORS = (".rotary_emb.inv_freq",)

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "llama",
        GgufGraph(GGUF_LLAMA, "silu", any_yarn=True),
        interleaved_rope=True,
        rope_factors=("rope_freqs.weight",),
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=IGNORED_TENSORS,
)
