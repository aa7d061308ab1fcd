"""A tokenizer as the ``tokenizer.*`` keys of a GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import models

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization.parity import AWKWARD_TEXTS, Limit
from edgellm.tokenization.pieces import SPACE
from edgellm.tokenization.pre_tokenizers import (
    PRE_TOKENIZERS,
    PreTokenizer,
    build,
)
from edgellm.tokenization.probe import names_of, probe_text
from edgellm.tokenization.vocabulary import CONTROL_TEXTS, ID_KEYS, PREFIX, TokenType

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer

# Scores of tokens that no merge makes; far below every merge's.
_PADDING_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Letters that Unicode normal forms change, spaces that a normalizer might squeeze, capitals.
_NORMALIZER_PROBE = "a  b\tÅ\u0301 ﬁ ① Ｅ ½ \nĀx  "


def metadata(tokenizer: Tokenizer, rows: int | None) -> dict[str, Any]:
    """The ``tokenizer.*`` keys for ``tokenizer``: see ``Tokenizer.gguf_metadata``."""
    rules = json.loads(tokenizer.backend.to_str())
    model = rules["model"]
    _check_model(model)
    if _has(rules["pre_tokenizer"], "ByteLevel"):
        keys = _byte_level(tokenizer, rules)
    elif model.get("byte_fallback"):
        keys = _sentencepiece(tokenizer, rules)
    else:
        raise UnsupportedTokenizer(
            "this BPE tokenizer neither works on bytes (a ByteLevel pre-tokenizer) nor falls back "
            "to them (byte_fallback), and GGUF has no other kind: choose --format onnx"
        )
    keys.update(_settings(tokenizer))
    return fill_up(keys, rows)


def limits(tokenizer: Tokenizer) -> tuple[Limit, ...]:
    """What llama.cpp does differently with ``tokenizer``: see ``Tokenizer.gguf_limits``."""
    rules = json.loads(tokenizer.backend.to_str())
    found: list[Limit] = []
    normalizer, steps = rules["normalizer"], rules["pre_tokenizer"]
    if normalizer is not None and normalizer.get("type") == "NFC":
        found.append(
            Limit(
                "llama.cpp does not compose decomposed accents (NFC) before it splits text",
                lambda text: not unicodedata.is_normalized("NFC", text),
            )
        )
    if _has(steps, "ByteLevel"):
        name = _pre_tokenizer_name(tokenizer, rules["model"])
        row = PRE_TOKENIZERS[name]
        if row.near and not _same_ids(tokenizer, row):
            found.append(
                Limit(
                    f"llama.cpp's pre-tokenizer {name!r} only comes near the model's own, for "
                    f"{row.near.what}",
                    row.near.concerns,
                )
            )
    else:
        if _space_prefix(tokenizer) and steps is not None:
            found.append(
                Limit(
                    "llama.cpp puts a space before a text that begins with one already, and before "
                    "the text after each special token",
                    _begins_with_space_or_contains(tokenizer.special_texts),
                )
            )
        mergeable = [text for text in _control_texts(rules) if _can_merge(text, rules["model"])]
        _add_limit(found, mergeable, "llama.cpp makes {} out of plain text, too")
    added = rules["added_tokens"]
    greedy = [token["content"] for token in added if token["lstrip"] or token["rstrip"]]
    _add_limit(found, greedy, "llama.cpp keeps the spaces around {}")
    whole = [token["content"] for token in added if token["single_word"]]
    _add_limit(found, whole, "llama.cpp finds {} within words, too")
    taken = sorted((CONTROL_TEXTS & set(rules["model"]["vocab"])) - set(_control_texts(rules)))
    _add_limit(found, taken, "llama.cpp takes {} for control tokens")
    return tuple(found)


def _add_limit(found: list[Limit], tokens: Sequence[str], sentence: str) -> None:
    if tokens:
        found.append(Limit(sentence.format(_some(tokens)), _contains(tokens)))


def _contains(tokens: Sequence[str]) -> Callable[[str], bool]:
    return lambda text: any(token in text for token in tokens)


def _begins_with_space_or_contains(tokens: Sequence[str]) -> Callable[[str], bool]:
    contains = _contains(tokens)
    return lambda text: text.startswith((" ", SPACE)) or contains(text)


def _control_texts(rules: Mapping[str, Any]) -> list[str]:
    return [token["content"] for token in rules["added_tokens"] if token["special"]]


def _can_merge(text: str, model: Mapping[str, Any]) -> bool:
    """Whether two tokens make ``text``, which is all that llama.cpp's SentencePiece asks for."""
    vocab = model["vocab"]
    return any(text[:cut] in vocab and text[cut:] in vocab for cut in range(1, len(text)))


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def fill_up(keys: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """``keys`` with unused tokens up to ``rows``, the embedding's; raises when it has fewer."""
    tokens = keys.get(PREFIX + "tokens", [])
    if rows is None or len(tokens) == rows:
        return keys
    if len(tokens) > rows:
        raise UnsupportedTokenizer(
            f"the tokenizer has {len(tokens)} tokens and the embedding {rows} rows: tokens from "
            f"{tokens[rows]!r} (id {rows}) on have no weights. Take the tokenizer files that "
            "belong to these weights, or resize the embedding"
        )
    more = range(len(tokens), rows)
    taken = set(tokens)
    keys[PREFIX + "tokens"] = [*tokens, *(_padding(index, taken) for index in more)]
    if PREFIX + "token_type" in keys:
        keys[PREFIX + "token_type"] = [
            *keys[PREFIX + "token_type"],
            *(int(TokenType.UNUSED) for _ in more),
        ]
    if PREFIX + "scores" in keys:
        keys[PREFIX + "scores"] = [*keys[PREFIX + "scores"], *(_PADDING_SCORE for _ in more)]
    return keys


def _padding(index: int, taken: set[str]) -> str:
    text = f"[PAD{index}]"
    if text in taken:
        raise UnsupportedTokenizer(
            f"the vocabulary already holds {text!r}, the name of the unused token {index} in GGUF"
        )
    return text


def _check_model(model: Mapping[str, Any]) -> None:
    kind = model.get("type")
    if kind != "BPE":
        raise UnsupportedTokenizer(
            f"the tokenizer's model is {kind}; edgellm writes BPE tokenizers to GGUF (byte-level, "
            "or SentencePiece with byte fallback): choose --format onnx"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedTokenizer(
                f"the tokenizer's BPE model has {option} {model[option]!r}, which llama.cpp does "
                "not do: choose --format onnx"
            )


def _byte_level(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> dict[str, Any]:
    normalizer = rules["normalizer"]
    # llama.cpp normalizes nothing. NFC is let through, as its converter does: it changes decomposed
    # accents only, and the parity check shows it.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UnsupportedTokenizer(
            f"the tokenizer normalizes text first ({_shown(normalizer)}), and llama.cpp does not: "
            "choose --format onnx"
        )
    tokens, types = _tokens(tokenizer, rules)
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": _pre_tokenizer_name(tokenizer, rules["model"]),
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": types,
        PREFIX + "merges": [
            " ".join(_without_spaces(part) for part in merge) for merge in _pairs(rules["model"])
        ],
        PREFIX + "add_space_prefix": False,
    }


def _pre_tokenizer_name(tokenizer: Tokenizer, model: Mapping[str, Any]) -> str:
    """The name under which llama.cpp splits text as this tokenizer does, found by trying.

    Splits that differ will do where this vocabulary comes to the same ids with them: one that was
    trained on single digits has no merges that join them, however coarse the splits are.
    """
    wanted = bool(model.get("ignore_merges"))
    names: list[str] = []
    for name in names_of(tokenizer.backend.pre_tokenizer):
        if PRE_TOKENIZERS[name].ignore_merges == wanted:
            return name
        names.append(name)
    if names and _merges_reach_every_token(tokenizer, model):
        return names[0]
    if names:
        raise UnsupportedTokenizer(
            f"text is split as under llama.cpp's pre-tokenizer {names[0]!r}, but there "
            f"ignore_merges is {not wanted} and here {wanted}, and some tokens are out of "
            "reach of the merges: choose --format onnx"
        )
    for name, row in PRE_TOKENIZERS.items():
        if row.ignore_merges == wanted and _same_ids(tokenizer, row):
            return name
    raise UnsupportedTokenizer(
        "no pre-tokenizer that llama.cpp knows splits text as this one does, so a GGUF file would "
        f"give other token ids: {_shown(json.loads(tokenizer.backend.to_str())['pre_tokenizer'])}. "
        "Choose --format onnx"
    )


def _same_ids(tokenizer: Tokenizer, row: PreTokenizer) -> bool:
    """Whether this vocabulary gives the same ids when ``row`` splits texts for it."""
    ours = tokenizers.Tokenizer(tokenizer.backend.model)
    ours.pre_tokenizer = tokenizer.backend.pre_tokenizer
    theirs = tokenizers.Tokenizer(tokenizer.backend.model)
    theirs.pre_tokenizer = build(row.splits)
    return all(
        theirs.encode(text).ids == ours.encode(text).ids
        for text in (probe_text(100), *AWKWARD_TEXTS, probe_text())
    )


def _merges_reach_every_token(tokenizer: Tokenizer, model: Mapping[str, Any]) -> bool:
    """Whether ``ignore_merges`` changes nothing: merging its own text gives each token."""
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    plain = models.BPE(vocab=model["vocab"], merges=list(_pairs(model)), ignore_merges=False)
    return all(len(plain.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _sentencepiece(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> dict[str, Any]:
    space_prefix = _space_prefix(tokenizer)
    if space_prefix is None:
        shown = {key: rules[key] for key in ("normalizer", "pre_tokenizer")}
        raise UnsupportedTokenizer(
            "the tokenizer does more to the text than writing spaces as ▁, and llama.cpp does not: "
            f"{_shown(shown)}. Choose --format onnx"
        )
    tokens, types = _tokens(tokenizer, rules)
    return {
        PREFIX + "model": "llama",
        PREFIX + "pre": "default",
        PREFIX + "tokens": tokens,
        PREFIX + "scores": _scores(tokens, types, rules["model"]),
        PREFIX + "token_type": types,
        PREFIX + "add_space_prefix": space_prefix,
    }


def _space_prefix(tokenizer: Tokenizer) -> bool | None:
    """Whether a space is put before a text; None when more than spaces is changed."""
    backend = tokenizer.backend
    text = _NORMALIZER_PROBE
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    plain = _NORMALIZER_PROBE.replace(" ", SPACE)
    return {plain: False, SPACE + plain: True}.get(text)


def _scores(tokens: Sequence[str], types: Sequence[int], model: Mapping[str, Any]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merge list.

    SentencePiece numbers its pieces so: less one for each merge, then the single letters.
    """
    order = list(dict.fromkeys(left + right for left, right in _pairs(model)))
    merged = set(order)
    order += [
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind == TokenType.NORMAL and token not in merged
    ]
    rank = {token: float(-index) for index, token in enumerate(order)}
    no_merge = {
        TokenType.BYTE: 0.0,
        TokenType.UNUSED: _PADDING_SCORE,
        TokenType.CONTROL: _ADDED_SCORE,
        TokenType.USER_DEFINED: _ADDED_SCORE,
        TokenType.UNKNOWN: 0.0,
    }
    return [
        no_merge[TokenType(kind)] if kind in no_merge else rank[token]
        for token, kind in zip(tokens, types, strict=True)
    ]


def _tokens(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types by id, holes filled with unused tokens."""
    model = rules["model"]
    by_id = {token_id: token for token, token_id in model["vocab"].items()}
    added = {token["id"]: token for token in rules["added_tokens"]}
    by_id.update({token_id: token["content"] for token_id, token in added.items()})
    taken = set(by_id.values())
    unk = model.get("unk_token")
    tokens: list[str] = []
    types: list[int] = []
    for index in range(max(by_id, default=-1) + 1):
        text = by_id.get(index)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = _padding(index, taken), TokenType.UNUSED
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


def _looks_special(text: str) -> bool:
    """Added tokens that models forget to call special; the list is llama.cpp's converter's."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    settings = tokenizer.settings
    keys: dict[str, Any] = {
        PREFIX + ID_KEYS[name]: token_id
        for name, token_id in settings.special_ids.items()
        if name in ID_KEYS
    }
    for name, ids in (("bos", settings.prefix_ids), ("eos", settings.suffix_ids)):
        own = settings.special_ids.get(name)
        if ids not in ((), (own,)):
            raise UnsupportedTokenizer(
                f"the tokenizer puts the tokens {list(ids)} "
                f"{'before' if name == 'bos' else 'after'} a text, and GGUF can say one {name} "
                f"token ({own}) only: choose --format onnx"
            )
        # Said even when False: llama.cpp's defaults differ between pre-tokenizers.
        keys[f"{PREFIX}add_{name}_token"] = bool(ids)
    for name, template in settings.chat_templates.items():
        safe = re.sub(r"[^a-zA-Z0-9]", "_", name)
        keys["tokenizer.chat_template" + ("" if name == "default" else f".{safe}")] = template
    names = sorted(set(settings.chat_templates) - {"default"})
    if names:
        keys["tokenizer.chat_templates"] = names
    return keys


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write them as one text with a space between."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _without_spaces(part: str) -> str:
    """GGUF parts two sides by a space, so a space inside is written as GPT-2's letter for it."""
    return part.replace(" ", "Ġ")


def _has(pre_tokenizer: Mapping[str, Any] | None, kind: str) -> bool:
    """Whether a pre-tokenizer of a tokenizer.json is, or holds, one of ``kind``."""
    if pre_tokenizer is None:
        return False
    inside = pre_tokenizer.get("pretokenizers", ())
    return pre_tokenizer.get("type") == kind or any(_has(step, kind) for step in inside)


def _shown(rules: Any) -> str:
    text = json.dumps(rules, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "..."
