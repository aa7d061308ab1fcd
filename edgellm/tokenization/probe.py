"""Telling pre-tokenizers apart by what they do to a text, not by how they are written."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import pre_tokenizers

from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS, build

# What the splits of pre-tokenizers hang on: kinds of letters, digits, marks, spaces, symbols.
_PROBE_PIECES = (
    "a", "b", "Z", "Q", "é", "É", "ß", "ж", "Ж", "ǅ", "ʰ", "中", "文", "の", "カ", "한", "क", "ि",
    "\u0301", "ب", "1", "2", "3", "७", "２", "½", "Ⅷ", " ", " ", "  ", "\n", "\r\n", "\t",
    "\u00a0", "\u3000", "'", "'s", "'S", "'ll", "'Re", "’s", ".", ",", "!", "/", "\\", "-", "_",
    "(", "[", "$", "+", "<", "~", "`", "|", "。", "…", "“", "€", "🙂", "\u200d", "\ufe0f", "word",
    "Word", "HTTPServer", "x1y", "2024",
)  # fmt: skip
_PROBE_LENGTH = 4000


def probe_text(length: int = _PROBE_LENGTH) -> str:
    """A fixed text in which every kind of character meets every other, for telling splits apart."""
    return "".join(random.Random(20240611).choices(_PROBE_PIECES, k=length))


def splits_equal(pre_tokenizer: pre_tokenizers.PreTokenizer, splits: tuple[str, ...]) -> bool:
    """Whether ``pre_tokenizer`` does to ``probe_text()`` what ``splits`` do to it."""
    built = build(splits)
    # Nearly all differences show in the first few words.
    return all(
        _pieces(built, text) == _pieces(pre_tokenizer, text)
        for text in (probe_text(100), probe_text())
    )


def names_of(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Iterator[str]:
    """The names whose splits (llama.cpp's or the trained ones) equal those of ``pre_tokenizer``.

    Compared by what they do to ``probe_text()``, not by how they are written.
    """
    answers: dict[tuple[str, ...], bool] = {}
    for name, row in PRE_TOKENIZERS.items():
        for splits in filter(None, (row.trained_splits, row.splits)):
            if splits not in answers:
                answers[splits] = splits_equal(pre_tokenizer, splits)
            if answers[splits]:
                yield name
                break


def _pieces(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
