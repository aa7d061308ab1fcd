"""ALiBi: attention scores that fall with the distance between tokens (arXiv 2108.12409)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from edgellm.architectures.decoder import Decoder

LARGEST = 8.0
"""The exponent of the steepest slopes' series that all published models have."""


def slopes(heads: int, largest: float = LARGEST) -> tuple[float, ...]:
    """How much a score falls by token, for each head.

    ``2 ** (-largest / n)`` to its n-th power for the n heads of a power of two; what is left over
    takes every second slope of twice as many (transformers' ``build_alibi_tensor``, llama.cpp's
    ``ggml_compute_forward_soft_max``).
    """
    n = 2 ** math.floor(math.log2(heads))
    own = [2.0 ** (-largest * (head + 1) / n) for head in range(n)]
    more = [2.0 ** (-largest * (2 * head + 1) / (2 * n)) for head in range(heads - n)]
    return (*own, *more)


def differences(decoder: Decoder) -> Iterator[str]:
    """In words, where llama.cpp would compute other slopes than ``decoder`` has."""
    if decoder.alibi != slopes(decoder.heads):
        yield "ALiBi with slopes of its own"
