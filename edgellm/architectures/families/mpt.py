"""MPT: ALiBi in the place of positions, no bias anywhere, and queries, keys and values clipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgellm.architectures import alibi
from edgellm.architectures.config import HARMLESS_KEYS, MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm
from edgellm.architectures.family import (
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    Value,
)
from edgellm.architectures.gguf_metadata import plain_sizes

WIDENING = 4
"""The feed-forward's width by that of the model: transformers goes by no key."""


def read(config: Config) -> Decoder:
    """As transformers computes it, which knows ALiBi with slopes to 2 ** -8 alone."""
    hidden = config.integer("d_model")
    heads = config.integer("n_heads")
    if hidden % heads:
        raise config.refusal("n_heads", heads, f"a divisor of d_model = {hidden}")
    config.neutral("expansion_ratio", WIDENING)
    config.neutral("no_bias", True)
    config.neutral("logit_scale")
    config.neutral("norm_type", "low_precision_layernorm", "layernorm")
    # Positions are learned only without ALiBi; the rest is of training alone.
    config.skip("learned_pos_emb", "embedding_fraction", "emb_pdrop", "resid_pdrop")
    config.skip("init_config", "init_device", "verbose", "tokenizer_name")
    clip, scale = _attention(config) if config.has("attn_config") else (None, None)
    return Decoder(
        family="mpt",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=WIDENING * hidden,
        context_length=config.integer("max_seq_len"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layers=(Layer(),) * config.integer("n_layers", maximum=MOST_LAYERS),
        norm=Norm("layer", config.number("layer_norm_epsilon", 1e-5, above=0), bias=False),
        activation="gelu",
        gated_mlp=False,
        fused_qkv=True,
        qkv_clip=clip,
        attention_scale=scale,
        alibi=alibi.slopes(heads),
        tied_head=config.flag("tie_word_embeddings", True),
    )


def _attention(config: Config) -> tuple[float | None, float | None]:
    """What queries, keys and values are clipped at, and the scale of scores; None for neither."""
    section = config.section("attn_config")
    section.skip(*HARMLESS_KEYS, "is_encoder_decoder", "attn_impl")
    section.neutral("attn_type", "multihead_attention")
    section.neutral("alibi", True)
    section.neutral("alibi_bias_max", alibi.LARGEST)
    for key in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        section.neutral(key, False)
    found = [
        section.number(key, above=0) if section.has(key) else None
        for key in ("clip_qkv", "softmax_scale")
    ]
    section.skip("clip_qkv", "softmax_scale")
    return found[0], found[1]


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    hidden, ffn, vocab = decoder.hidden_size, decoder.ffn_size, decoder.vocab_size
    shapes = {
        "norm_1": ("attn_norm", (hidden,)),
        "attn.Wqkv": ("attn_qkv", (3 * hidden, hidden)),
        "attn.out_proj": ("attn_output", (hidden, hidden)),
        "norm_2": ("ffn_norm", (hidden,)),
        "ffn.up_proj": ("ffn_up", (ffn, hidden)),
        "ffn.down_proj": ("ffn_down", (hidden, ffn)),
    }
    yield TensorRow("transformer.wte.weight", "token_embd.weight", (vocab, hidden), "embedding")
    for index in range(len(decoder.layers)):
        for part, (role, shape) in shapes.items():
            yield TensorRow(
                f"transformer.blocks.{index}.{part}.weight",
                f"blk.{index}.{role}.weight",
                shape,
                "norm" if len(shape) == 1 else "linear",
            )
    yield TensorRow("transformer.norm_f.weight", "output_norm.weight", (hidden,), "norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (vocab, hidden), "head")


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    clip = {} if decoder.qkv_clip is None else {"attention.clamp_kqv": decoder.qkv_clip}
    return {"attention.max_alibi_bias": alibi.LARGEST, **clip}


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    keys, sizes = facts.keys, plain_sizes(facts)
    if sizes.ffn != WIDENING * sizes.hidden:
        raise keys.refusal("feed_forward_length", sizes.ffn, f"{WIDENING * sizes.hidden}")
    largest = keys.number("attention.max_alibi_bias", 0.0)
    if largest != alibi.LARGEST:
        raise keys.refusal("attention.max_alibi_bias", largest, f"{alibi.LARGEST:g}")
    return {
        "d_model": sizes.hidden,
        "n_heads": sizes.heads,
        "n_layers": sizes.layers,
        "max_seq_len": sizes.context,
        "layer_norm_epsilon": sizes.epsilon,
        "attn_config": {"clip_qkv": keys.number("attention.clamp_kqv", 0.0) or None},
    }


FAMILY = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "mpt",
        GgufGraph(
            frozenset(
                {
                    Feature.ALIBI,
                    Feature.LAYER_NORM,
                    Feature.UNBIASED_LAYER_NORM,
                    Feature.QKV_CLIP,
                    Feature.PLAIN_MLP,
                    Feature.TIED_HEAD,
                }
            ),
            "gelu_tanh",
            nearly=("gelu",),
            square_attention=True,
            differences=alibi.differences,
        ),
        keys=_gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="transformer.",
)
