"""GPT-J: attention and a plain feed-forward side by side behind one norm, and a bias on the head.

Rotary positions turn the first ``rotary_dim`` values of a head in pairs that lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.config import ACTIVATIONS, MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Layer, Norm, Rope
from edgellm.architectures.family import Family, TensorRow, weight_and_bias
from edgellm.architectures.row_order import PairedRope

THETA = 10000.0
"""Of its rotary positions, in the code of transformers and of no key."""


def read(config: Config) -> Decoder:
    hidden = config.integer("n_embd")
    heads = config.integer("n_head")
    if hidden % heads:
        raise config.refusal("n_head", heads, f"a divisor of n_embd = {hidden}")
    head_dim = hidden // heads
    turned = config.integer("rotary_dim", maximum=head_dim)
    if turned % 2:
        raise config.refusal("rotary_dim", turned, "an even number: rotary positions turn pairs")
    config.neutral("rotary", True)
    config.neutral("scale_attn_weights", True)
    context = config.integer("n_positions")
    config.neutral("n_ctx", context)
    return Decoder(
        family="gptj",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("n_inner", 4 * hidden),
        context_length=context,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        layers=(Layer(None, Rope(THETA, turned)),) * config.integer("n_layer", maximum=MOST_LAYERS),
        norm=Norm("layer", config.number("layer_norm_epsilon", above=0)),
        activation=config.choice("activation_function", ACTIVATIONS),
        gated_mlp=False,
        mlp_bias=True,
        head_bias=True,
        parallel=True,
        shared_norm=True,
        tied_head=config.flag("tie_word_embeddings", False),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    hidden, ffn, vocab = decoder.hidden_size, decoder.ffn_size, decoder.vocab_size
    rope = decoder.layers[0].rope
    assert rope is not None
    paired = PairedRope(decoder.heads, decoder.head_dim, rope.dimensions)
    yield TensorRow("transformer.wte.weight", "token_embd.weight", (vocab, hidden), "embedding")
    for index in range(len(decoder.layers)):
        source, role = f"transformer.h.{index}", f"blk.{index}"
        yield from weight_and_bias(f"{source}.ln_1", f"{role}.attn_norm", (hidden,), "norm")
        for theirs, ours, order in (
            ("q_proj", "attn_q", paired),
            ("k_proj", "attn_k", paired),
            ("v_proj", "attn_v", None),
            ("out_proj", "attn_output", None),
        ):
            yield from weight_and_bias(
                f"{source}.attn.{theirs}", f"{role}.{ours}", (hidden, hidden), "linear", False,
                order=order,
            )  # fmt: skip
        yield from weight_and_bias(f"{source}.mlp.fc_in", f"{role}.ffn_up", (ffn, hidden), "linear")
        yield from weight_and_bias(
            f"{source}.mlp.fc_out", f"{role}.ffn_down", (hidden, ffn), "linear"
        )
    yield from weight_and_bias("transformer.ln_f", "output_norm", (hidden,), "norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (vocab, hidden), "head")
    yield TensorRow("lm_head.bias", "output.bias", (vocab,), "bias")


FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    read=read,
    tensors=tensors,
    gguf=None,
    base_prefix="transformer.",
    # Causal masks that old checkpoints carry.
    ignored_tensors=(".attn.bias", ".attn.masked_bias"),
)
