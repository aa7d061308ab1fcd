"""The figures of a cell, by field: what people call them, their unit, which end is the good one."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.profiling.document import Cell, Figure


@dataclass(frozen=True, slots=True)
class Quantity:
    """``field`` of ``Cell``; ``unit`` as documents write it; ``more``: more of it is better."""

    field: str
    words: str
    unit: str
    more: bool = False

    def of(self, cell: Cell) -> Figure | None:
        """The cell's figure, None where it has none."""
        figure: Figure | None = getattr(cell, self.field)
        return figure


LOAD = Quantity("load_s", "loading", "s")
TOKENIZATION = Quantity("tokenization_s", "tokenizing the prompt", "s")
FIRST_TOKEN = Quantity("time_to_first_token_s", "time to first token", "s")
PREFILL = Quantity("prefill_tokens_per_s", "prefill speed", "tokens/s", more=True)
DECODE = Quantity("decode_tokens_per_s", "decode speed", "tokens/s", more=True)
END_TO_END = Quantity("end_to_end_s", "whole answer", "s")
SAMPLING = Quantity("sampling_s", "sampling a token", "s")
DETOKENIZATION = Quantity("detokenization_s", "a token to text", "s")
CPU = Quantity("cpu_s", "processor time of a round", "s")
ENCODE = Quantity("encode_s", "reading the text", "s")
TEXTS = Quantity("texts_per_s", "texts a second", "texts/s", more=True)
TEXT_TOKENS = Quantity("tokens_per_s", "reading speed", "tokens/s", more=True)

FIGURES = (
    LOAD, TOKENIZATION, FIRST_TOKEN, PREFILL, DECODE, END_TO_END, SAMPLING, DETOKENIZATION, CPU,
    ENCODE, TEXTS, TEXT_TOKENS,
)  # fmt: skip

SPREADS = {
    "inter_token_latency_s": "between tokens",
    "latency_s": "a batch of texts",
}
"""Distributions by field, and what people call them."""

PERCENTILES = ("mean", "p50", "p90", "p95", "p99", "max")
"""What a distribution says of itself."""


def words_of(field: str) -> str:
    """What people call ``field``; an unknown one with its underscores as spaces."""
    known = {each.field: each.words for each in FIGURES} | SPREADS
    return known.get(field, field.replace("_", " "))
