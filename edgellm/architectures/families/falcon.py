"""Falcon: attention and a plain feed-forward side by side, few keys for many queries.

7B has one norm for both and one head of keys, 40B a norm for each and a key for each group of
queries. The RefinedWeb models (falcon-rw) have ALiBi, biases, and one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgellm.architectures import alibi
from edgellm.architectures.config import ACTIVATIONS, MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    weight_and_bias,
)
from edgellm.architectures.gguf_metadata import built_like_llama
from edgellm.architectures.rope import read_rope
from edgellm.architectures.row_order import FusedHeads
from edgellm.quant import floats

ROUNDED = (
    "transformers rounds what ALiBi adds to bf16, by the place of the key: answers to long texts "
    "differ from its by that"
)


def read(config: Config) -> Decoder:
    """Old configs call the sizes ``n_embed``, ``n_layer``, ``n_head`` and ``n_head_kv``."""
    hidden = config.integer(config.spelled("hidden_size", "n_embed"))
    heads = config.integer(config.spelled("num_attention_heads", "n_head"))
    layers = config.integer(config.spelled("num_hidden_layers", "n_layer"), maximum=MOST_LAYERS)
    if hidden % heads:
        raise config.refusal("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    grouped = config.flag("new_decoder_architecture", False)
    parallel = config.flag("parallel_attn", True)
    if grouped and not parallel:
        raise config.refusal("parallel_attn", parallel, "true with new_decoder_architecture")
    norms = config.integer("num_ln_in_parallel_attn", 2 if grouped else 1, maximum=2)
    if norms == 2 and not grouped:
        raise config.refusal("num_ln_in_parallel_attn", norms, "1 without new_decoder_architecture")
    kv_heads = config.integer(config.spelled("num_kv_heads", "n_head_kv"), heads)
    if not grouped:
        kv_heads = 1 if config.flag("multi_query", True) else heads
    if heads % kv_heads:
        raise config.refusal("num_kv_heads", kv_heads, f"a divisor of the {heads} heads")
    config.neutral("apply_residual_connection_post_layernorm", False)
    config.skip("multi_query")
    ffn = config.integer("ffn_hidden_size", 4 * hidden)
    config.neutral("ff_factor", ffn // hidden)
    head_dim = hidden // heads
    context = config.integer("max_position_embeddings", 2048)
    falls: tuple[float, ...] = ()
    rope = None
    if config.flag("alibi", False):
        # Both the slopes, rounded, and the scores are divided by the root of a head's width.
        exact = np.asarray(alibi.slopes(heads), np.float32)
        falls = tuple(float(each) * head_dim**-0.5 for each in floats.rounded(exact, "bf16"))
        config.skip("rope_parameters", "rope_scaling", "rope_theta")
        config.note(ROUNDED)
    else:
        rope, context = read_rope(config, head_dim, context, 10000.0)
    bias = config.flag("bias", False)
    return Decoder(
        family="falcon",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=ffn,
        context_length=context,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=(Layer(None, rope),) * layers,
        norm=Norm("layer", config.number("layer_norm_epsilon", 1e-5, above=0)),
        activation=config.choice("activation", ACTIVATIONS, "gelu"),
        gated_mlp=False,
        fused_qkv=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        alibi=falls,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    hidden, ffn, vocab = decoder.hidden_size, decoder.ffn_size, decoder.vocab_size
    wide = decoder.query_size + 2 * decoder.kv_size
    groups = FusedHeads(decoder.kv_heads, decoder.heads // decoder.kv_heads, decoder.head_dim)
    order = groups if decoder.kv_heads > 1 else None

    def norm(source: str, role: str) -> Iterator[TensorRow]:
        return weight_and_bias(source, role, (hidden,), "norm")

    yield TensorRow(
        "transformer.word_embeddings.weight", "token_embd.weight", (vocab, hidden), "embedding"
    )
    two = decoder.parallel and not decoder.shared_norm
    first, second = (
        ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    )
    for index in range(len(decoder.layers)):
        source, role = f"transformer.h.{index}", f"blk.{index}"
        attention, mlp = f"{source}.self_attention", f"{source}.mlp"
        yield from norm(f"{source}.{first}", f"{role}.attn_norm")
        yield from weight_and_bias(
            f"{attention}.query_key_value", f"{role}.attn_qkv", (wide, hidden), "linear",
            decoder.qkv_bias, order=order,
        )  # fmt: skip
        yield from weight_and_bias(
            f"{attention}.dense", f"{role}.attn_output", (hidden, hidden), "linear",
            decoder.output_bias,
        )  # fmt: skip
        if not decoder.shared_norm:
            yield from norm(f"{source}.{second}", f"{role}.ffn_norm")
        yield from weight_and_bias(
            f"{mlp}.dense_h_to_4h", f"{role}.ffn_up", (ffn, hidden), "linear", decoder.mlp_bias
        )
        yield from weight_and_bias(
            f"{mlp}.dense_4h_to_h", f"{role}.ffn_down", (hidden, ffn), "linear", decoder.mlp_bias
        )
    yield from norm("transformer.ln_f", "output_norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (vocab, hidden), "head")


def _gguf_names(decoder: Decoder) -> dict[str, str]:
    """llama.cpp calls the feed-forward's norm ``attn_norm`` and attention's ``attn_norm_2``."""
    two = decoder.parallel and not decoder.shared_norm
    return {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"} if two else {}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """As models of the newer architecture, of which the older ones are cases."""
    keys, config = facts.keys, built_like_llama(facts)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config["head_dim"] * heads != hidden:
        raise keys.refusal("attention.key_length", config["head_dim"], f"{hidden // heads}")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_kv_heads": config["num_key_value_heads"],
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1 + ("blk.0.attn_norm_2.weight" in facts.names),
        "ffn_hidden_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "rope_parameters": config["rope_parameters"],
        "activation": "gelu_new",
    }


FAMILY = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "falcon",
        GgufGraph(
            frozenset(
                {
                    Feature.ROPE,
                    Feature.ROPE_LINEAR,
                    Feature.ROPE_YARN,
                    Feature.LAYER_NORM,
                    Feature.PARALLEL_BLOCK,
                    Feature.SHARED_NORM,
                    Feature.PLAIN_MLP,
                    Feature.TIED_HEAD,
                }
            ),
            "gelu_tanh",
            nearly=("gelu",),
            always=frozenset({Feature.ROPE, Feature.PARALLEL_BLOCK}),
            square_attention=True,
        ),
        names=_gguf_names,
        config=_from_gguf,
    ),
    base_prefix="transformer.",
)
