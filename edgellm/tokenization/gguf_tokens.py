"""A tokenizer.json's rules as a GGUF file's tokens: what all kinds of tokenizers share there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization.pieces import SPACE
from edgellm.tokenization.vocabulary import TokenType

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer

# Scores of tokens that no merge makes; far below every merge's.
PADDING_SCORE = -10000.0
ADDED_SCORE = -1000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def tokens(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types by id, holes filled with unused tokens.

    ``rules`` is the parsed tokenizer.json of ``tokenizer``.
    """
    model = rules["model"]
    vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
    by_id = {token_id: token for token, token_id in vocab.items()}
    added = {token["id"]: token for token in rules["added_tokens"]}
    by_id.update({token_id: token["content"] for token_id, token in added.items()})
    taken = set(by_id.values())
    unk = unknown(model)
    tokens: list[str] = []
    types: list[int] = []
    for index in range(max(by_id, default=-1) + 1):
        text = by_id.get(index)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = padding(index, taken), TokenType.UNUSED
        elif index in added:
            if added[index]["special"] or _looks_special(text):
                kind = TokenType.CONTROL
            else:
                # llama.cpp looks for these in the text as it was written.
                text, kind = text.replace(SPACE, " "), TokenType.USER_DEFINED
        elif model.get("byte_fallback") and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        elif text == unk:
            kind = TokenType.UNKNOWN
        if "\0" in text:
            raise UnsupportedTokenizer(
                f"the token {text!r} (id {index}) holds a NUL character, and llama.cpp ends the "
                "text of a token there: choose --format onnx"
            )
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def unknown(model: Mapping[str, Any]) -> str | None:
    """The text of the token that a tokenizer.json's ``model`` takes for what it does not know."""
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _looks_special(text: str) -> bool:
    """Added tokens that models forget to call special; the list is llama.cpp's converter's."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def padding(index: int, taken: set[str]) -> str:
    """The text of the unused token at ``index``; raises when the vocabulary holds it already."""
    text = f"[PAD{index}]"
    if text in taken:
        raise UnsupportedTokenizer(
            f"the vocabulary already holds {text!r}, the name of the unused token {index} in GGUF"
        )
    return text


def pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write them as one text with a space between."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def control_texts(rules: Mapping[str, Any]) -> list[str]:
    """The texts of special tokens."""
    return [token["content"] for token in rules["added_tokens"] if token["special"]]


def contains(tokens: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text holds one of ``tokens``."""
    return lambda text: any(token in text for token in tokens)


def has(pre_tokenizer: Mapping[str, Any] | None, kind: str) -> bool:
    """Whether a pre-tokenizer of a tokenizer.json is, or holds, one of ``kind``."""
    if pre_tokenizer is None:
        return False
    inside = pre_tokenizer.get("pretokenizers", ())
    return pre_tokenizer.get("type") == kind or any(has(step, kind) for step in inside)


def some(texts: Sequence[str]) -> str:
    """The first few of ``texts``, and how many more."""
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def shown(rules: Any) -> str:
    """A part of a tokenizer.json for a message, cut short."""
    text = json.dumps(rules, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "..."
