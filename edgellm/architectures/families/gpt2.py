"""GPT-2: learned positions, layer norms with biases, one product for q, k and v, plain MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellm.architectures.config import ACTIVATIONS, MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout, TensorRow
from edgellm.architectures.gguf_metadata import plain_sizes


def read(config: Config) -> Decoder:
    """``activation_function`` and ``layer_norm_epsilon`` are in every published config."""
    hidden = config.integer("n_embd")
    heads = config.integer("n_head")
    if hidden % heads:
        raise config.refusal("n_head", heads, f"a divisor of n_embd = {hidden}")
    context = config.integer("n_positions")
    config.neutral("n_ctx", context)
    config.neutral("scale_attn_by_inverse_layer_idx", False)
    scaled = config.flag("scale_attn_weights", True)
    return Decoder(
        family="gpt2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("n_inner", 4 * hidden),
        context_length=context,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layers=(Layer(),) * config.integer("n_layer", maximum=MOST_LAYERS),
        norm=Norm("layer", config.number("layer_norm_epsilon", above=0)),
        activation=config.choice("activation_function", ACTIVATIONS),
        gated_mlp=False,
        fused_qkv=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=context,
        attention_scale=None if scaled else 1.0,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Every tensor; products are stored ``[in, out]`` in the checkpoint (Conv1D)."""
    hidden, ffn = decoder.hidden_size, decoder.ffn_size

    def product(source: str, role: str, out: int, into: int) -> Iterator[TensorRow]:
        yield TensorRow(f"{source}.weight", f"{role}.weight", (out, into), "linear", True)
        yield TensorRow(f"{source}.bias", f"{role}.bias", (out,), "bias")

    def norm(source: str, role: str) -> Iterator[TensorRow]:
        yield TensorRow(f"{source}.weight", f"{role}.weight", (hidden,), "norm")
        yield TensorRow(f"{source}.bias", f"{role}.bias", (hidden,), "bias")

    yield TensorRow(
        "transformer.wte.weight", "token_embd.weight", (decoder.vocab_size, hidden), "embedding"
    )
    yield TensorRow(
        "transformer.wpe.weight",
        "position_embd.weight",
        (decoder.learned_positions or 0, hidden),
        "positions",
    )
    for index in range(len(decoder.layers)):
        source, role = f"transformer.h.{index}", f"blk.{index}"
        yield from norm(f"{source}.ln_1", f"{role}.attn_norm")
        yield from product(f"{source}.attn.c_attn", f"{role}.attn_qkv", 3 * hidden, hidden)
        yield from product(f"{source}.attn.c_proj", f"{role}.attn_output", hidden, hidden)
        yield from norm(f"{source}.ln_2", f"{role}.ffn_norm")
        yield from product(f"{source}.mlp.c_fc", f"{role}.ffn_up", ffn, hidden)
        yield from product(f"{source}.mlp.c_proj", f"{role}.ffn_down", hidden, ffn)
    yield from norm("transformer.ln_f", "output_norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (decoder.vocab_size, hidden), "head")


GGUF_FEATURES = frozenset(
    {
        Feature.LEARNED_POSITIONS,
        Feature.LAYER_NORM,
        Feature.PLAIN_MLP,
        Feature.QKV_BIAS,
        Feature.OUTPUT_BIAS,
        Feature.MLP_BIAS,
        Feature.TIED_HEAD,
    }
)


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    sizes = plain_sizes(facts)
    return {
        "n_embd": sizes.hidden,
        "n_head": sizes.heads,
        "n_layer": sizes.layers,
        "n_positions": sizes.context,
        "n_inner": sizes.ffn,
        "layer_norm_epsilon": sizes.epsilon,
        "activation_function": "gelu_new",
    }


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "gpt2",
        GgufGraph(GGUF_FEATURES, "gelu_tanh", square_attention=True),
        config=_from_gguf,
    ),
    base_prefix="transformer.",
    # Causal masks that old checkpoints carry.
    ignored_tensors=(".attn.bias", ".attn.masked_bias"),
)
