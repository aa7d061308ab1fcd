"""T5, Flan-T5 and mT5: relative positions, RMS norms before everything, no biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Norm
from edgellm.architectures.encoder import ACTIVATIONS
from edgellm.architectures.family import TensorRow
from edgellm.architectures.seq2seq import Relative, Seq2Seq, Seq2SeqFamily, Stack

GATED = "gated-"


def read(config: Config) -> Seq2Seq:
    """``feed_forward_proj`` names the activation, with ``gated-`` before it from version 1.1 on.

    Whether the head's input is scaled follows from ``tie_word_embeddings``, as in transformers:
    the first T5 ties and scales, 1.1 does neither; new configs say ``scale_decoder_outputs``.
    """
    hidden = config.integer("d_model")
    heads = config.integer("num_heads")
    layers = config.integer("num_layers", maximum=MOST_LAYERS)
    ffn = config.integer("d_ff")
    buckets = config.integer("relative_attention_num_buckets", 32, minimum=4)
    longest = config.integer("relative_attention_max_distance", 128)
    if buckets % 4 or longest <= buckets // 2:
        raise config.refusal(
            "relative_attention_num_buckets", buckets, "a multiple of 4, below twice the distance"
        )
    named = config.text("feed_forward_proj", "relu")
    gated, name = named.startswith(GATED), named.removeprefix(GATED)
    # "for backwards compatibility", says transformers' config class.
    name = "gelu_new" if named == "gated-gelu" else name
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise config.refusal("feed_forward_proj", named, f"one of {known}, or gated- and one")
    config.skip("dense_act_fn", "is_gated_act")
    tied = config.flag("tie_word_embeddings", True)
    return Seq2Seq(
        family="t5",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        head_dim=config.integer("d_kv"),
        encoder=Stack(layers, heads, ffn),
        decoder=Stack(config.integer("num_decoder_layers", layers), heads, ffn),
        norm=Norm("rms", config.number("layer_norm_epsilon", 1e-6, above=0)),
        pre_norm=True,
        activation=ACTIVATIONS[name],
        gated_ffn=gated,
        biased=False,
        attention_scale=1.0,
        start_token_id=config.integer("decoder_start_token_id", 0, minimum=0),
        relative=Relative(buckets, longest),
        head_scale=hidden**-0.5 if config.flag("scale_decoder_outputs", tied) else 1.0,
    )


def read_mt5(config: Config) -> Seq2Seq:
    """T5 1.1 for many languages; its head's input is not scaled, whatever the config says."""
    return replace(read(config), family="mt5", head_scale=1.0)


def tensors(model: Seq2Seq) -> Iterator[TensorRow]:
    """Every tensor, in the order of the computation."""
    hidden, size = model.hidden_size, model.encoder.heads * model.head_dim

    def attention(source: str, role: str) -> Iterator[TensorRow]:
        for part in ("q", "k", "v"):
            yield TensorRow(
                f"{source}.{part}.weight", f"{role}_{part}.weight", (size, hidden), "linear"
            )
        yield TensorRow(f"{source}.o.weight", f"{role}_output.weight", (hidden, size), "linear")

    def norm(source: str, role: str) -> TensorRow:
        return TensorRow(f"{source}.weight", f"{role}.weight", (hidden,), "norm")

    def feed_forward(source: str, role: str, ffn: int) -> Iterator[TensorRow]:
        ups = {"wi_0": "ffn_gate", "wi_1": "ffn_up"} if model.gated_ffn else {"wi": "ffn_up"}
        yield norm(f"{source}.layer_norm", f"{role}.ffn_norm")
        for name, part in ups.items():
            yield TensorRow(
                f"{source}.DenseReluDense.{name}.weight",
                f"{role}.{part}.weight",
                (ffn, hidden),
                "linear",
            )
        yield TensorRow(
            f"{source}.DenseReluDense.wo.weight", f"{role}.ffn_down.weight", (hidden, ffn), "linear"
        )

    yield TensorRow("shared.weight", "token_embd.weight", (model.vocab_size, hidden), "embedding")
    for side, short, stack in (
        ("encoder", "enc", model.encoder),
        ("decoder", "dec", model.decoder),
    ):
        assert model.relative is not None
        yield TensorRow(
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{short}.attn_rel_b.weight",
            (model.relative.buckets, stack.heads),
            "positions",
        )
        for index in range(stack.layers):
            block, role = f"{side}.block.{index}.layer", f"{short}.blk.{index}"
            yield norm(f"{block}.0.layer_norm", f"{role}.attn_norm")
            yield from attention(f"{block}.0.SelfAttention", f"{role}.attn")
            if short == "dec":
                yield norm(f"{block}.1.layer_norm", f"{role}.cross_attn_norm")
                yield from attention(f"{block}.1.EncDecAttention", f"{role}.cross_attn")
            last = 2 if short == "dec" else 1
            yield from feed_forward(f"{block}.{last}", role, stack.ffn_size)
        yield norm(f"{side}.final_layer_norm", f"{short}.output_norm")
    if not model.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (model.vocab_size, hidden), "head")


def _family(
    model_type: str, architecture: str, reader: Callable[[Config], Seq2Seq]
) -> Seq2SeqFamily:
    return Seq2SeqFamily(
        model_type=model_type,
        architecture=architecture,
        read=reader,
        tensors=tensors,
        shared="shared.weight",
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        # The first T5's checkpoints have one where no distance is.
        ignored_tensors=(".layer.1.EncDecAttention.relative_attention_bias.weight",),
    )


FAMILY = _family("t5", "T5ForConditionalGeneration", read)
MT5 = _family("mt5", "MT5ForConditionalGeneration", read_mt5)
