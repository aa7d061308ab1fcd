"""WordPiece tokenizers as GGUF keys: the model that llama.cpp calls ``bert``.

There the first piece of a word begins with ▁ and the others with nothing, where a word list writes
the first bare and marks the others with ##.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization.gguf_tokens import contains, shown, tokens, unknown
from edgellm.tokenization.parity import Limit
from edgellm.tokenization.pieces import SPACE
from edgellm.tokenization.vocabulary import ID_KEYS, PREFIX, TokenType

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer

AROUND = ("cls", "sep")
"""The special tokens that llama.cpp puts before and after every text, by name."""
MARK = "##"


def words(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of vocabulary and rules; ``rules`` is the parsed tokenizer.json.

    Raises ``UnsupportedTokenizer`` for rules other than BERT's, and where the two spellings of
    pieces fall together.
    """
    model, normalizer = rules["model"], rules["normalizer"] or {}
    splits = rules["pre_tokenizer"] or {}
    settings = tokenizer.settings
    if (
        normalizer.get("type") != "BertNormalizer"
        or not (normalizer["clean_text"] and normalizer["handle_chinese_chars"])
        or splits.get("type") != "BertPreTokenizer"
        or model["continuing_subword_prefix"] != MARK
    ):
        parts = {"normalizer": normalizer, "pre_tokenizer": splits}
        raise UnsupportedTokenizer(
            "llama.cpp splits words as BERT does, and this WordPiece tokenizer does not: "
            f"{shown(parts)}. Choose --format onnx"
        )
    if not settings.prefix_ids or not settings.suffix_ids:
        raise UnsupportedTokenizer(
            "llama.cpp puts [CLS] before and [SEP] after every text for a WordPiece tokenizer, and "
            "this one does not: choose --format onnx"
        )
    texts, types = tokens(tokenizer, rules)
    written = [
        text if kind != TokenType.NORMAL
        else text.removeprefix(MARK) if text.startswith(MARK) and text != MARK
        else SPACE + text
        for text, kind in zip(texts, types, strict=True)
    ]  # fmt: skip
    if len(set(written)) != len(written):
        twice = next(text for text in written if written.count(text) > 1)
        raise UnsupportedTokenizer(
            f"two tokens are {twice!r} in the spelling of GGUF: choose --format onnx"
        )
    unk = tokenizer.backend.token_to_id(str(unknown(model)))
    lower = bool(normalizer["lowercase"])
    strip = normalizer["strip_accents"]
    return {
        PREFIX + "model": "bert",
        PREFIX + "pre": "default",
        PREFIX + "tokens": written,
        PREFIX + "token_type": types,
        PREFIX + "normalizer.lowercase": lower,
        PREFIX + "normalizer.strip_accents": lower if strip is None else bool(strip),
        PREFIX + ID_KEYS["unk"]: unk,
        # llama.cpp begins texts with this one.
        PREFIX + ID_KEYS["bos"]: settings.prefix_ids[0],
    }


def limits(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> list[Limit]:
    """What llama.cpp does differently with a WordPiece tokenizer."""
    longest = int(rules["model"]["max_input_chars_per_word"])
    normalizer = rules["normalizer"]
    strip, lower = normalizer["strip_accents"], normalizer["lowercase"]
    found = [
        Limit(
            f"llama.cpp cuts words of more than {longest} letters, too",
            lambda text: any(len(word) > longest for word in text.split()),
        ),
        Limit(
            f"llama.cpp takes {SPACE} for the begin of a word, and U+0085 for a space",
            contains((SPACE, "\x85")),
        ),
    ]
    if lower:
        found.append(Limit("llama.cpp writes İ as one small letter", contains(("İ",))))
    if lower if strip is None else strip:
        found.append(
            Limit(
                "llama.cpp strips vowel signs that take space, too, not only accents",
                lambda text: any(
                    unicodedata.category(letter) in ("Mc", "Me")
                    for letter in unicodedata.normalize("NFD", text)
                ),
            )
        )
    return found
