"""A tokenizer as the ``tokenizer.*`` keys of a GGUF file, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization import gguf_bytes, gguf_pieces, gguf_words
from edgellm.tokenization.gguf_tokens import (
    PADDING_SCORE,
    contains,
    control_texts,
    has,
    padding,
    some,
)
from edgellm.tokenization.parity import Limit
from edgellm.tokenization.vocabulary import (
    CONTROL_TEXTS,
    END_KEYS,
    END_TEXTS,
    ID_KEYS,
    PREFIX,
    TokenType,
)

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer


def metadata(tokenizer: Tokenizer, rows: int | None) -> dict[str, Any]:
    """The ``tokenizer.*`` keys for ``tokenizer``: see ``Tokenizer.gguf_metadata``."""
    rules = json.loads(tokenizer.backend.to_str())
    model = rules["model"]
    around = ("bos", "eos")
    if model["type"] == "Unigram":
        keys = gguf_pieces.likely_pieces(tokenizer, rules)
    elif model["type"] == "WordPiece":
        keys = gguf_words.words(tokenizer, rules)
        around = gguf_words.AROUND
    else:
        _check_model(model)
        if has(rules["pre_tokenizer"], "ByteLevel"):
            keys = gguf_bytes.byte_level(tokenizer, rules)
        elif model.get("byte_fallback"):
            keys = gguf_pieces.merged_pieces(tokenizer, rules)
        else:
            raise UnsupportedTokenizer(
                "this BPE tokenizer neither works on bytes (a ByteLevel pre-tokenizer) nor falls "
                "back to them (byte_fallback), and GGUF has no other kind: choose --format onnx"
            )
    keys.update(_settings(tokenizer, around))
    return fill_up(keys, rows)


def limits(tokenizer: Tokenizer) -> tuple[Limit, ...]:
    """What llama.cpp does differently with ``tokenizer``: see ``Tokenizer.gguf_limits``."""
    rules = json.loads(tokenizer.backend.to_str())
    if rules["model"]["type"] == "WordPiece":
        found = gguf_words.limits(tokenizer, rules)
    elif has(rules["pre_tokenizer"], "ByteLevel"):
        found = gguf_bytes.limits(tokenizer, rules)
    else:
        found = gguf_pieces.limits(tokenizer, rules)
    added = rules["added_tokens"]
    greedy = [token["content"] for token in added if token["lstrip"] or token["rstrip"]]
    _add_limit(found, greedy, "llama.cpp keeps the spaces around {}")
    whole = [token["content"] for token in added if token["single_word"]]
    _add_limit(found, whole, "llama.cpp finds {} within words, too")
    vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
    taken = sorted((CONTROL_TEXTS & set(vocab)) - set(control_texts(rules)))
    _add_limit(found, taken, "llama.cpp takes {} for control tokens")
    return tuple(found)


def _add_limit(found: list[Limit], tokens: Sequence[str], sentence: str) -> None:
    if tokens:
        found.append(Limit(sentence.format(some(tokens)), contains(tokens)))


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
    keys[PREFIX + "tokens"] = [*tokens, *(padding(index, taken) for index in more)]
    if PREFIX + "token_type" in keys:
        keys[PREFIX + "token_type"] = [
            *keys[PREFIX + "token_type"],
            *(int(TokenType.UNUSED) for _ in more),
        ]
    if PREFIX + "scores" in keys:
        keys[PREFIX + "scores"] = [*keys[PREFIX + "scores"], *(PADDING_SCORE for _ in more)]
    return keys


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


def _settings(tokenizer: Tokenizer, around: tuple[str, str]) -> dict[str, Any]:
    """Special tokens, what is put ``around`` a text (by name), and templates."""
    settings = tokenizer.settings
    keys: dict[str, Any] = {
        PREFIX + ID_KEYS[name]: token_id
        for name, token_id in settings.special_ids.items()
        if name in ID_KEYS
    }
    for where, name, ids in (
        ("before", around[0], settings.prefix_ids),
        ("after", around[1], settings.suffix_ids),
    ):
        own = settings.special_ids.get(name)
        if ids not in ((), (own,)):
            raise UnsupportedTokenizer(
                f"the tokenizer puts the tokens {list(ids)} {where} a text, and GGUF can say one "
                f"{name} token ({own}) only: choose --format onnx"
            )
        # Said even when False: llama.cpp's defaults differ between pre-tokenizers.
        keys[f"{PREFIX}add_{'bos' if name == 'cls' else name}_token"] = bool(ids)
    keys.update(_more_ends(tokenizer))
    for name, template in settings.chat_templates.items():
        safe = re.sub(r"[^a-zA-Z0-9]", "_", name)
        keys["tokenizer.chat_template" + ("" if name == "default" else f".{safe}")] = template
    names = sorted(set(settings.chat_templates) - {"default"})
    if names:
        keys["tokenizer.chat_templates"] = names
    return keys


def _more_ends(tokenizer: Tokenizer) -> dict[str, int]:
    """Keys for ends of an answer that llama.cpp neither knows by text nor as the eos token."""
    own = tokenizer.settings.special_ids.get("eos")
    more = [
        token_id
        for token_id in tokenizer.eos_token_ids
        if token_id != own and tokenizer.backend.id_to_token(token_id) not in END_TEXTS
    ]
    if len(more) > len(END_KEYS):
        texts = [str(tokenizer.backend.id_to_token(token_id)) for token_id in more]
        raise UnsupportedTokenizer(
            f"an answer ends at any of {len(tokenizer.eos_token_ids)} tokens, and GGUF has room "
            f"for {len(END_KEYS)} beside the eos token and those that llama.cpp knows by their "
            f"text, not for {some(texts)}: shorten eos_token_id in generation_config.json, or "
            "choose --format onnx"
        )
    return {PREFIX + key: token_id for key, token_id in zip(END_KEYS, more, strict=False)}
