"""What families with latent attention share: keys of their configs, tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.families import llama
from edgellm.architectures.family import TensorRow
from edgellm.architectures.latent import Latent
from edgellm.architectures.rope import StatedRope, read_rope, yarn_attention_factor
from edgellm.architectures.row_order import PairedRope

LATENT_EPSILON = 1e-6
"""Of the norms of latent vectors, in transformers' code and of no key; ``rms_norm_eps`` is that of
the others."""

REPLACED = (".attn_k.", ".attn_v.", ".attn_output.")
"""Llama's tensors that there are others for, beside those of queries."""

WITHOUT_ADAPTERS = ("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b")
"""Products that llama.cpp's graphs of latent attention compute by ``ggml_mul_mat``, which passes
adapters over, in place of ``build_lora_mm``."""


def read_latent(config: Config, heads: int, value_dim: int | None = None) -> Latent:
    """The latent attention that ``config`` states; ``value_dim`` is taken where it names none.

    Raises ``UnsupportedModel`` for a missing key, for biases, and for widths that do not go
    together.
    """
    config.neutral("num_key_value_heads", heads)
    config.neutral("attention_bias", False)
    query_rank = None
    if config.has("q_lora_rank") or not config.states("q_lora_rank"):
        query_rank = config.integer("q_lora_rank")
    config.skip("q_lora_rank")
    rope_dim = config.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise config.refusal(
            "qk_rope_head_dim", rope_dim, "an even number: rotary positions turn pairs"
        )
    default = () if value_dim is None else (value_dim,)
    latent = Latent(
        rank=config.integer("kv_lora_rank"),
        plain_dim=config.integer("qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=config.integer("v_head_dim", *default),
        query_rank=query_rank,
        epsilon=LATENT_EPSILON,
    )
    config.neutral("head_dim", rope_dim)  # as transformers calls what is turned
    config.neutral("qk_head_dim", latent.plain_dim + rope_dim)
    return latent


def read_shape(config: Config, latent: Latent) -> llama.Shape:
    """The sizes of the whole, heads as wide as keys; every key of them must be there."""
    heads = config.integer("num_attention_heads")
    return llama.Shape(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        ffn_size=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers", maximum=MOST_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=latent.plain_dim + latent.rope_dim,
        context_length=config.integer("max_position_embeddings"),
    )


def read_scaled_rope(
    config: Config, latent: Latent, context: int, theta: float
) -> tuple[StatedRope, float | None]:
    """The rope and its context length, and the attention scale where it is not the usual one.

    With ``mscale_all_dim`` yarn's factor multiplies all of queries and keys, and so its square the
    scores, where ``attention_factor`` is of the turned part alone (``DeepseekV2Attention``).
    """
    sections = [
        config.mapping(key) for key in ("rope_parameters", "rope_scaling") if config.has(key)
    ]
    stated = read_rope(config, latent.rope_dim, context, theta)
    scaling = stated[0].scaling
    whole = next((each["mscale_all_dim"] for each in sections if "mscale_all_dim" in each), None)
    if scaling is None or not whole:
        return stated, None
    factor = yarn_attention_factor(scaling.factor, float(whole))
    return stated, (latent.plain_dim + latent.rope_dim) ** -0.5 * factor**2


def latent_tensors(decoder: Decoder, *, paired: bool) -> Iterator[TensorRow]:
    """Llama's tensors with those of latent attention.

    ``paired``: in the checkpoint rotary positions turn pairs that lie side by side.
    """
    for row in llama.tensors(decoder):
        if ".attn_q." in row.role:
            source, role = (name.rsplit(".", 2)[0] for name in (row.source, row.role))
            yield from _attention(decoder, source, role, paired=paired)
        elif not any(part in row.role for part in REPLACED):
            yield row


def _attention(decoder: Decoder, source: str, role: str, *, paired: bool) -> Iterator[TensorRow]:
    latent, heads, hidden = decoder.latent, decoder.heads, decoder.hidden_size
    assert latent is not None
    compressed = latent.width

    def row(
        name: str, part: str, rows: int, columns: int, rope: PairedRope | None = None
    ) -> TensorRow:
        return TensorRow(
            f"{source}.{name}.weight", f"{role}.{part}.weight", (rows, columns), "linear",
            order=rope if paired else None,
        )  # fmt: skip

    def norm(name: str, part: str, size: int) -> TensorRow:
        return TensorRow(f"{source}.{name}.weight", f"{role}.{part}.weight", (size,), "norm")

    queries = PairedRope(heads, decoder.head_dim, latent.rope_dim, first=latent.plain_dim)
    shared = PairedRope(1, compressed, latent.rope_dim, first=latent.rank)
    if latent.query_rank is None:
        yield row("q_proj", "attn_q", decoder.query_size, hidden, queries)
    else:
        yield row("q_a_proj", "attn_q_a", latent.query_rank, hidden)
        yield norm("q_a_layernorm", "attn_q_a_norm", latent.query_rank)
        yield row("q_b_proj", "attn_q_b", decoder.query_size, latent.query_rank, queries)
    yield row("kv_a_proj_with_mqa", "attn_kv_a_mqa", compressed, hidden, shared)
    yield norm("kv_a_layernorm", "attn_kv_a_norm", latent.rank)
    yield row("kv_b_proj", "attn_kv_b", heads * latent.head_rows, latent.rank)
    yield row("o_proj", "attn_output", hidden, decoder.attended_size)


def with_latent(decoder: Decoder, latent: Latent, scale: float | None) -> Decoder:
    """``decoder`` with latent attention, whose scores are multiplied by ``scale``."""
    return replace(decoder, latent=latent, attention_scale=scale)
