"""GPT-NeoX and Pythia: attention and a plain feed-forward side by side, each behind its own norm.

A part of each head is turned. q, k and v are one product, stored head by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellm.architectures.config import ACTIVATIONS, MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    Value,
    weight_and_bias,
)
from edgellm.architectures.gguf_metadata import built_like_llama
from edgellm.architectures.rope import read_rope
from edgellm.architectures.row_order import FusedHeads


def read(config: Config) -> Decoder:
    """``rotary_pct`` and ``rotary_emb_base`` are the older names of ``rope_parameters``."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    if hidden % heads:
        raise config.refusal("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    config.skip("classifier_dropout")
    rope, context = read_rope(
        config,
        hidden // heads,
        config.integer("max_position_embeddings"),
        config.number("rotary_emb_base", 10000.0, above=1.0),
        turned=config.number("rotary_pct", 0.25, above=0),
    )
    bias = config.flag("attention_bias", True)
    return Decoder(
        family="gpt_neox",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("intermediate_size"),
        context_length=context,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layers=(Layer(None, rope),) * config.integer("num_hidden_layers", maximum=MOST_LAYERS),
        norm=Norm("layer", config.number("layer_norm_eps", above=0)),
        activation=config.choice("hidden_act", ACTIVATIONS),
        gated_mlp=False,
        fused_qkv=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        parallel=config.flag("use_parallel_residual", True),
        tied_head=config.flag("tie_word_embeddings", False),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    hidden, ffn, vocab = decoder.hidden_size, decoder.ffn_size, decoder.vocab_size
    by_head = FusedHeads(decoder.kv_heads, 1, decoder.head_dim)

    yield TensorRow("gpt_neox.embed_in.weight", "token_embd.weight", (vocab, hidden), "embedding")
    for index in range(len(decoder.layers)):
        source, role = f"gpt_neox.layers.{index}", f"blk.{index}"
        attention, mlp = f"{source}.attention", f"{source}.mlp"
        yield from weight_and_bias(
            f"{source}.input_layernorm", f"{role}.attn_norm", (hidden,), "norm"
        )
        yield from weight_and_bias(
            f"{attention}.query_key_value", f"{role}.attn_qkv", (3 * hidden, hidden), "linear",
            decoder.qkv_bias, order=by_head,
        )  # fmt: skip
        yield from weight_and_bias(
            f"{attention}.dense", f"{role}.attn_output", (hidden, hidden), "linear",
            decoder.output_bias,
        )  # fmt: skip
        yield from weight_and_bias(
            f"{source}.post_attention_layernorm", f"{role}.ffn_norm", (hidden,), "norm"
        )
        yield from weight_and_bias(
            f"{mlp}.dense_h_to_4h", f"{role}.ffn_up", (ffn, hidden), "linear"
        )
        yield from weight_and_bias(
            f"{mlp}.dense_4h_to_h", f"{role}.ffn_down", (hidden, ffn), "linear"
        )
    yield from weight_and_bias("gpt_neox.final_layer_norm", "output_norm", (hidden,), "norm")
    if not decoder.tied_head:
        yield TensorRow("embed_out.weight", "output.weight", (vocab, hidden), "head")


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    return {"use_parallel_residual": decoder.parallel}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    keys, config = facts.keys, built_like_llama(facts, partial_rope=True)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.pop("num_key_value_heads") != heads:
        raise keys.refusal(
            "attention.head_count_kv", keys.integer("attention.head_count_kv"), heads
        )
    if config.pop("head_dim") * heads != hidden:
        raise keys.refusal(
            "attention.key_length", keys.integer("attention.key_length"), hidden // heads
        )
    return config | {
        "hidden_act": "gelu_new",
        "use_parallel_residual": keys.flag("use_parallel_residual", True),
    }


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "gptneox",
        GgufGraph(
            frozenset(
                {
                    Feature.ROPE,
                    Feature.ROPE_PARTIAL,
                    Feature.ROPE_LINEAR,
                    Feature.ROPE_YARN,
                    Feature.LAYER_NORM,
                    Feature.PARALLEL_BLOCK,
                    Feature.PLAIN_MLP,
                    Feature.QKV_BIAS,
                    Feature.OUTPUT_BIAS,
                    Feature.MLP_BIAS,
                }
            ),
            "gelu_tanh",
            nearly=("gelu",),
            always=frozenset({Feature.QKV_BIAS, Feature.OUTPUT_BIAS, Feature.MLP_BIAS}),
            square_attention=True,
        ),
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="gpt_neox.",
    # Causal masks and tables of frequencies that old checkpoints carry.
    ignored_tensors=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
