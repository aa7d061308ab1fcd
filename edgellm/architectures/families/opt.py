"""OPT: GPT-2's network with ReLU, and a table of positions whose first two rows are never used."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.config import ACTIVATIONS, MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Layer, Norm
from edgellm.architectures.family import Family, TensorRow, weight_and_bias

SKIPPED = 2
"""``OPTLearnedPositionalEmbedding.offset``, of no key."""

EPSILON = 1e-5
"""Of its norms: torch's own, of no key."""


def read(config: Config) -> Decoder:
    """OPT 350M, with norms behind attention and feed-forward, is refused."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    if hidden % heads:
        raise config.refusal("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    config.neutral("do_layer_norm_before", True)
    config.neutral("_remove_final_layer_norm", False)
    config.neutral("word_embed_proj_dim", hidden)
    config.skip("dropout", "layerdrop", "activation_dropout", "init_std")
    context = config.integer("max_position_embeddings")
    bias = config.flag("enable_bias", True)
    affine = config.flag("layer_norm_elementwise_affine", True)
    return Decoder(
        family="opt",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("ffn_dim"),
        context_length=context,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layers=(Layer(),) * config.integer("num_hidden_layers", maximum=MOST_LAYERS),
        norm=Norm("layer", EPSILON, weight=affine, bias=affine),
        activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        learned_positions=context,
        skipped_positions=SKIPPED,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    hidden, ffn, vocab = decoder.hidden_size, decoder.ffn_size, decoder.vocab_size
    places = (decoder.learned_positions or 0) + decoder.skipped_positions

    def norm(source: str, role: str) -> Iterator[TensorRow]:
        if decoder.norm.weight:
            yield from weight_and_bias(source, role, (hidden,), "norm")

    yield TensorRow(
        "model.decoder.embed_tokens.weight", "token_embd.weight", (vocab, hidden), "embedding"
    )
    yield TensorRow(
        "model.decoder.embed_positions.weight",
        "position_embd.weight",
        (places, hidden),
        "positions",
    )
    for index in range(len(decoder.layers)):
        source, role = f"model.decoder.layers.{index}", f"blk.{index}"
        yield from norm(f"{source}.self_attn_layer_norm", f"{role}.attn_norm")
        for theirs, ours, biased in (
            ("q_proj", "attn_q", decoder.qkv_bias),
            ("k_proj", "attn_k", decoder.qkv_bias),
            ("v_proj", "attn_v", decoder.qkv_bias),
            ("out_proj", "attn_output", decoder.output_bias),
        ):
            yield from weight_and_bias(
                f"{source}.self_attn.{theirs}", f"{role}.{ours}", (hidden, hidden), "linear", biased
            )
        yield from norm(f"{source}.final_layer_norm", f"{role}.ffn_norm")
        yield from weight_and_bias(
            f"{source}.fc1", f"{role}.ffn_up", (ffn, hidden), "linear", decoder.mlp_bias
        )
        yield from weight_and_bias(
            f"{source}.fc2", f"{role}.ffn_down", (hidden, ffn), "linear", decoder.mlp_bias
        )
    yield from norm("model.decoder.final_layer_norm", "output_norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (vocab, hidden), "head")


FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    read=read,
    tensors=tensors,
    gguf=None,
    base_prefix="model.",
)
