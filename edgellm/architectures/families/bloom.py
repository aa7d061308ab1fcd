"""BLOOM: ALiBi in the place of positions, a norm on the embeddings, biases everywhere.

q, k and v are one product, stored head by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellm.architectures import alibi
from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    weight_and_bias,
)
from edgellm.architectures.gguf_metadata import plain_sizes
from edgellm.architectures.row_order import FusedHeads

WIDENING = 4
"""The feed-forward's width by that of the model."""


def read(config: Config) -> Decoder:
    """Published configs call the sizes otherwise than transformers, which takes both."""
    hidden = config.integer(config.spelled("hidden_size", "n_embed"))
    heads = config.integer(config.spelled("n_head", "num_attention_heads"))
    layers = config.integer(config.spelled("n_layer", "num_hidden_layers"), maximum=MOST_LAYERS)
    if hidden % heads:
        raise config.refusal("n_head", heads, f"a divisor of hidden_size = {hidden}")
    config.neutral("n_inner", WIDENING * hidden)
    config.neutral("apply_residual_connection_post_layernorm", False)
    # How training was spread over devices, and how products were fused there.
    config.skip("pretraining_tp", "slow_but_exact", "skip_bias_add", "skip_bias_add_qkv")
    config.skip("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion")
    config.skip("offset_alibi")
    return Decoder(
        family="bloom",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=WIDENING * hidden,
        context_length=config.integer("seq_length", 2048),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layers=(Layer(),) * layers,
        norm=Norm("layer", config.number("layer_norm_epsilon", above=0)),
        activation="gelu_tanh",
        gated_mlp=False,
        fused_qkv=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        alibi=alibi.slopes(heads),
        embedding_norm=True,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    hidden, ffn, vocab = decoder.hidden_size, decoder.ffn_size, decoder.vocab_size
    by_head = FusedHeads(decoder.kv_heads, 1, decoder.head_dim)

    def norm(source: str, role: str) -> Iterator[TensorRow]:
        return weight_and_bias(f"transformer.{source}", role, (hidden,), "norm")

    yield TensorRow(
        "transformer.word_embeddings.weight", "token_embd.weight", (vocab, hidden), "embedding"
    )
    yield from norm("word_embeddings_layernorm", "token_embd_norm")
    for index in range(len(decoder.layers)):
        source, role = f"transformer.h.{index}", f"blk.{index}"
        attention, mlp = f"{source}.self_attention", f"{source}.mlp"
        yield from norm(f"h.{index}.input_layernorm", f"{role}.attn_norm")
        yield from weight_and_bias(
            f"{attention}.query_key_value", f"{role}.attn_qkv", (3 * hidden, hidden), "linear",
            order=by_head,
        )  # fmt: skip
        yield from weight_and_bias(
            f"{attention}.dense", f"{role}.attn_output", (hidden, hidden), "linear"
        )
        yield from norm(f"h.{index}.post_attention_layernorm", f"{role}.ffn_norm")
        yield from weight_and_bias(
            f"{mlp}.dense_h_to_4h", f"{role}.ffn_up", (ffn, hidden), "linear"
        )
        yield from weight_and_bias(
            f"{mlp}.dense_4h_to_h", f"{role}.ffn_down", (hidden, ffn), "linear"
        )
    yield from norm("ln_f", "output_norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (vocab, hidden), "head")


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    sizes = plain_sizes(facts)
    if sizes.ffn != WIDENING * sizes.hidden:
        raise facts.keys.refusal("feed_forward_length", sizes.ffn, f"{WIDENING * sizes.hidden}")
    return {
        "hidden_size": sizes.hidden,
        "n_head": sizes.heads,
        "n_layer": sizes.layers,
        "seq_length": sizes.context,
        "layer_norm_epsilon": sizes.epsilon,
    }


GGUF_ALWAYS = frozenset(
    {
        Feature.ALIBI,
        Feature.EMBEDDING_NORM,
        Feature.LAYER_NORM,
        Feature.PLAIN_MLP,
        Feature.QKV_BIAS,
        Feature.OUTPUT_BIAS,
        Feature.MLP_BIAS,
    }
)

FAMILY = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "bloom",
        GgufGraph(
            GGUF_ALWAYS | {Feature.TIED_HEAD},
            "gelu_tanh",
            always=GGUF_ALWAYS,
            square_attention=True,
            differences=alibi.differences,
        ),
        config=_from_gguf,
    ),
    base_prefix="transformer.",
)
