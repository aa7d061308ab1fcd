"""SentencePiece tokenizers as GGUF keys: the models that llama.cpp calls ``llama`` and ``t5``."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import normalizers

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization.gguf_tokens import (
    ADDED_SCORE,
    PADDING_SCORE,
    contains,
    control_texts,
    pairs,
    shown,
    some,
    tokens,
    unknown,
)
from edgellm.tokenization.parity import Limit
from edgellm.tokenization.pieces import SPACE
from edgellm.tokenization.vocabulary import ID_KEYS, PREFIX, TokenType

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer

# Letters that Unicode normal forms change, spaces that a normalizer might squeeze, capitals.
_NORMALIZER_PROBE = "a  b\tÅ\u0301 ﬁ ① Ｅ ½ \nĀx  "


def merged_pieces(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a tokenizer that merges pieces by score; ``rules`` is the tokenizer.json."""
    found = _before_cutting(tokenizer, rules)
    if found is None or found.charsmap or found.squeezes:
        raise _refusal(rules)
    texts, types = tokens(tokenizer, rules)
    return {
        PREFIX + "model": "llama",
        PREFIX + "pre": "default",
        PREFIX + "tokens": texts,
        PREFIX + "scores": _merge_scores(texts, types, rules["model"]),
        PREFIX + "token_type": types,
        PREFIX + "add_space_prefix": found.prefix,
    }


def likely_pieces(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a unigram tokenizer; ``rules`` is the tokenizer.json."""
    found = _before_cutting(tokenizer, rules)
    # llama.cpp puts a space before every word whenever it squeezes spaces.
    if found is None or (found.squeezes and not found.prefix):
        raise _refusal(rules)
    model = rules["model"]
    texts, types = tokens(tokenizer, rules)
    own = {TokenType.NORMAL, TokenType.BYTE, TokenType.UNKNOWN}
    scores = [
        float(model["vocab"][index][1]) if TokenType(kind) in own
        else PADDING_SCORE if kind == TokenType.UNUSED
        else 0.0
        for index, kind in enumerate(types)
    ]  # fmt: skip
    keys: dict[str, Any] = {
        PREFIX + "model": "t5",
        PREFIX + "pre": "default",
        PREFIX + "tokens": texts,
        PREFIX + "scores": scores,
        PREFIX + "token_type": types,
        PREFIX + "add_space_prefix": found.prefix,
        PREFIX + "remove_extra_whitespaces": found.squeezes,
    }
    if model.get("unk_id") is not None:
        keys[PREFIX + ID_KEYS["unk"]] = int(model["unk_id"])
    if found.charsmap:
        keys[PREFIX + "precompiled_charsmap"] = found.charsmap
    return keys


def limits(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> list[Limit]:
    """What llama.cpp does differently with a tokenizer of pieces."""
    found: list[Limit] = []
    before = _before_cutting(tokenizer, rules)
    model = rules["model"]
    if before is not None and before.prefix and rules["pre_tokenizer"] is not None:
        found.append(
            Limit(
                "llama.cpp puts a space before a text that begins with one already, and before "
                "the text after each special token",
                _begins_with_space_or_contains(tokenizer.special_texts),
            )
        )
    if model["type"] != "Unigram":
        mergeable = [text for text in control_texts(rules) if _can_merge(text, model["vocab"])]
        if mergeable:
            found.append(
                Limit(
                    f"llama.cpp makes {some(mergeable)} out of plain text, too",
                    contains(mergeable),
                )
            )
        return found
    special = control_texts(rules)
    if special:
        found.append(
            Limit("llama.cpp does not find special tokens in plain text", contains(special))
        )
    if before is not None and before.charsmap:
        found.append(
            Limit(
                "llama.cpp replaces characters one by one, the tokenizers library with the marks "
                "that follow them",
                _joins_characters,
            )
        )
    if before is not None and before.prefix and not before.squeezes:
        found.append(
            Limit(
                "llama.cpp puts no space before spaces alone",
                lambda text: not _normalized(tokenizer, text).strip(SPACE),
            )
        )
    if before is not None and before.squeezes:
        found.append(
            Limit(
                f"llama.cpp keeps {SPACE} at the end of a text",
                lambda text: text.rstrip(" ").endswith(SPACE),
            )
        )
    if model.get("byte_fallback"):
        found.append(
            Limit(
                f"llama.cpp writes {unknown(model)} for what no piece holds, not its bytes",
                lambda text: any(
                    _BYTE.fullmatch(tokenizer.backend.id_to_token(token_id) or "")
                    for token_id in tokenizer.encode(text, parse_special=False)
                ),
            )
        )
    return found


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _joins_characters(text: str) -> bool:
    return any(unicodedata.category(letter)[0] == "M" or letter in "\u200d\r" for letter in text)


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    normalizer = tokenizer.backend.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


class _Before(NamedTuple):
    """What is done to a text before it is cut into pieces."""

    prefix: bool
    squeezes: bool
    charsmap: bytes


def _before_cutting(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> _Before | None:
    """What ``tokenizer`` does to a probe, or None when SentencePiece does no such thing."""
    backend = tokenizer.backend
    text = plain = _NORMALIZER_PROBE
    charsmap = _charsmap(rules["normalizer"])
    if charsmap:
        plain = normalizers.Precompiled(charsmap).normalize_str(plain)
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    squeezed = re.sub(" {2,}", " ", plain.strip(" "))
    for squeezes, each in ((False, plain), (True, squeezed)):
        spaced = each.replace(" ", SPACE)
        if text in (spaced, SPACE + spaced):
            return _Before(text != spaced, squeezes, charsmap)
    return None


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes:
    """SentencePiece's table of replaced characters in a tokenizer.json, empty for none."""
    if normalizer is None:
        return b""
    if normalizer.get("type") == "Precompiled":
        return base64.b64decode(normalizer.get("precompiled_charsmap") or "")
    inside = map(_charsmap, normalizer.get("normalizers", ()))
    return next(filter(None, inside), b"")


def _refusal(rules: Mapping[str, Any]) -> UnsupportedTokenizer:
    parts = {key: rules[key] for key in ("normalizer", "pre_tokenizer")}
    return UnsupportedTokenizer(
        "the tokenizer does more to the text than writing spaces as ▁, and llama.cpp does not: "
        f"{shown(parts)}. Choose --format onnx"
    )


def _merge_scores(
    texts: Sequence[str], types: Sequence[int], model: Mapping[str, Any]
) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merge list.

    SentencePiece numbers its pieces so: less one for each merge, then the single letters.
    """
    order = list(dict.fromkeys(left + right for left, right in pairs(model)))
    merged = set(order)
    order += [
        token
        for token, kind in zip(texts, types, strict=True)
        if kind == TokenType.NORMAL and token not in merged
    ]
    rank = {token: float(-index) for index, token in enumerate(order)}
    no_merge = {
        TokenType.BYTE: 0.0,
        TokenType.UNUSED: PADDING_SCORE,
        TokenType.CONTROL: ADDED_SCORE,
        TokenType.USER_DEFINED: ADDED_SCORE,
        TokenType.UNKNOWN: 0.0,
    }
    return [
        no_merge[TokenType(kind)] if kind in no_merge else rank[token]
        for token, kind in zip(texts, types, strict=True)
    ]


def _begins_with_space_or_contains(special: Sequence[str]) -> Callable[[str], bool]:
    holds = contains(special)
    return lambda text: text.startswith((" ", SPACE)) or holds(text)


def _can_merge(text: str, vocab: Mapping[str, int]) -> bool:
    """Whether two tokens make ``text``, which is all that llama.cpp's SentencePiece asks for."""
    return any(text[:cut] in vocab and text[cut:] in vocab for cut in range(1, len(text)))
