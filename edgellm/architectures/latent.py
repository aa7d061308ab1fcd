"""Multi-head latent attention (MLA, arXiv 2405.04434): what a ``Decoder`` says of it."""

from __future__ import annotations

from dataclasses import dataclass

CACHE_MULTIPLE = 8
"""What divides the width of heads that onnxruntime's attention takes; zeros fill up to it."""


@dataclass(frozen=True, slots=True)
class Latent:
    """Keys and values of all heads, made of one vector of ``rank`` values a token: the latent.

    A norm of its own comes after it. From it ``attn_kv_b`` ``[heads * (plain_dim + value_dim),
    rank]`` makes, head by head, the ``plain_dim`` first values of a key and the ``value_dim`` of a
    value. A key ends with ``rope_dim`` values that rotary positions turn; they come beside the
    latent (``attn_kv_a_mqa`` makes both) and all heads share them. Queries are laid out as keys:
    made at once by ``attn_q``, or by ``attn_q_b`` out of a vector of ``query_rank`` values, which
    is normed as well.

    Instead of keys and values a cache may hold the latent and the turned values: a key's product
    with a query is the latent's with the query taken through ``attn_kv_b``, and the values that
    attention mixes are mixed latents taken through it (appendix C of the paper: absorbed).
    """

    rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None
    epsilon: float

    @property
    def width(self) -> int:
        """Values that ``attn_kv_a_mqa`` makes of a token: the latent and what is turned."""
        return self.rank + self.rope_dim

    @property
    def cache_dim(self) -> int:
        """Values that our graphs keep of a token instead of its keys and values."""
        return -(-self.width // CACHE_MULTIPLE) * CACHE_MULTIPLE

    @property
    def head_rows(self) -> int:
        """Rows of ``attn_kv_b`` for each head: those of its keys, then those of its values."""
        return self.plain_dim + self.value_dim


VALUES_ARE_KEYS = "edgellm.values_are_keys"
"""In the metadata of an ONNX model: both caches of a layer hold the same, so that one memory can
stand for both."""
