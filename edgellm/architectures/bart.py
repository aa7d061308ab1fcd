"""BART: learned positions on both sides, layer norms after attention and feed-forward, biases.

mBART and Marian are built like it, and differ by what ``mbart.py`` and ``marian.py`` say.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Norm
from edgellm.architectures.encoder import ACTIVATIONS, norm, product
from edgellm.architectures.family import TensorRow
from edgellm.architectures.seq2seq import (
    ANSWER_EMBEDDING,
    EMBEDDING,
    Seq2Seq,
    Seq2SeqFamily,
    Stack,
)

EPSILON = 1e-5
"""torch's own, which transformers' classes take; no key holds it."""

SKIPPED_POSITIONS = 2
"""Rows of the table of positions that stand before the first token's (fairseq's padding)."""

START = 2
"""What begins an answer where the config does not say."""


def read(config: Config) -> Seq2Seq:
    """BART, of which ``normalize_embedding`` of old configs is always true."""
    config.neutral("normalize_embedding", True)
    return described(config, "bart", config.integer("decoder_start_token_id", START, minimum=0))


def described(config: Config, family: str, start_token_id: int) -> Seq2Seq:
    """What the configs of BART and its kin say alike, for a network as BART's.

    Both sides have their own number of layers, of heads and of feed-forward values.
    """
    hidden = config.integer("d_model")
    sides = []
    for side in ("encoder", "decoder"):
        heads = config.integer(f"{side}_attention_heads")
        if hidden % heads:
            raise config.refusal(
                f"{side}_attention_heads", heads, f"a divisor of d_model = {hidden}"
            )
        layers = config.integer(f"{side}_layers", maximum=MOST_LAYERS)
        sides.append(Stack(layers, heads, config.integer(f"{side}_ffn_dim")))
    if sides[0].heads != sides[1].heads:
        raise config.refusal(
            "decoder_attention_heads", sides[1].heads, f"the encoder's {sides[0].heads}"
        )
    head_dim = hidden // sides[0].heads
    return Seq2Seq(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        head_dim=head_dim,
        encoder=sides[0],
        decoder=sides[1],
        norm=Norm("layer", EPSILON),
        pre_norm=False,
        activation=config.choice("activation_function", ACTIVATIONS),
        gated_ffn=False,
        biased=True,
        attention_scale=head_dim**-0.5,
        start_token_id=start_token_id,
        positions=config.integer("max_position_embeddings") + SKIPPED_POSITIONS,
        skipped_positions=SKIPPED_POSITIONS,
        embedding_norm=True,
        embedding_scale=hidden**0.5 if config.flag("scale_embedding", False) else 1.0,
        head_bias=True,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def tensors(model: Seq2Seq) -> Iterator[TensorRow]:
    """Every tensor, in the order of the computation."""
    hidden = model.hidden_size

    def attention(source: str, role: str) -> Iterator[TensorRow]:
        for part in ("q", "k", "v"):
            yield from product(f"{source}.{part}_proj", f"{role}_{part}", hidden, hidden)
        yield from product(f"{source}.out_proj", f"{role}_output", hidden, hidden)
        yield from norm(f"{source}_layer_norm", f"{role}_norm", hidden)

    tables = {EMBEDDING: ("model.shared.weight", model.vocab_size)}
    if model.answer_vocab_size is not None:
        tables = {
            EMBEDDING: ("model.encoder.embed_tokens.weight", model.vocab_size),
            ANSWER_EMBEDDING: ("model.decoder.embed_tokens.weight", model.answer_vocab_size),
        }
    for role, (source, rows) in tables.items():
        yield TensorRow(source, role, (rows, hidden), "embedding")
    for side, short, stack in (
        ("encoder", "enc", model.encoder),
        ("decoder", "dec", model.decoder),
    ):
        whole = f"model.{side}"
        yield TensorRow(
            f"{whole}.embed_positions.weight",
            f"{short}.position_embd.weight",
            (model.positions or 0, hidden),
            "positions",
        )
        if model.embedding_norm:
            yield from norm(f"{whole}.layernorm_embedding", f"{short}.token_embd_norm", hidden)
        for index in range(stack.layers):
            source, role = f"{whole}.layers.{index}", f"{short}.blk.{index}"
            yield from attention(f"{source}.self_attn", f"{role}.attn")
            if short == "dec":
                yield from attention(f"{source}.encoder_attn", f"{role}.cross_attn")
            yield from product(f"{source}.fc1", f"{role}.ffn_up", stack.ffn_size, hidden)
            yield from product(f"{source}.fc2", f"{role}.ffn_down", hidden, stack.ffn_size)
            yield from norm(f"{source}.final_layer_norm", f"{role}.ffn_norm", hidden)
        if model.pre_norm:
            yield from norm(f"{whole}.layer_norm", f"{short}.output_norm", hidden)
    if not model.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (model.head_rows, hidden), "head")
    yield TensorRow("final_logits_bias", "output.bias", (1, model.head_rows), "bias")


SHARED = "model.shared.weight"
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")

FAMILY = Seq2SeqFamily(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    read=read,
    tensors=tensors,
    shared=SHARED,
    copies=COPIES,
    ignored_tensors=(".version",),
)
