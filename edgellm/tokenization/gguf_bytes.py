"""Byte-level BPE tokenizers as GGUF keys: the model that llama.cpp calls ``gpt2``."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import models

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization.gguf_tokens import pairs, shown, tokens
from edgellm.tokenization.parity import AWKWARD_TEXTS, Limit
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, build
from edgellm.tokenization.probe import names_of, probe_text
from edgellm.tokenization.vocabulary import PREFIX

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer


def byte_level(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of vocabulary and rules; ``rules`` is the parsed tokenizer.json."""
    normalizer = rules["normalizer"]
    # llama.cpp normalizes nothing. NFC is let through, as its converter does: it changes decomposed
    # accents only, and the parity check shows it.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UnsupportedTokenizer(
            f"the tokenizer normalizes text first ({shown(normalizer)}), and llama.cpp does not: "
            "choose --format onnx"
        )
    texts, types = tokens(tokenizer, rules)
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": _pre_tokenizer_name(tokenizer, rules["model"]),
        PREFIX + "tokens": texts,
        PREFIX + "token_type": types,
        PREFIX + "merges": [
            " ".join(_without_spaces(part) for part in merge) for merge in pairs(rules["model"])
        ],
        PREFIX + "add_space_prefix": False,
    }


def limits(tokenizer: Tokenizer, rules: Mapping[str, Any]) -> list[Limit]:
    """What llama.cpp does differently with a byte-level tokenizer."""
    found: list[Limit] = []
    normalizer = rules["normalizer"]
    if normalizer is not None and normalizer.get("type") == "NFC":
        found.append(
            Limit(
                "llama.cpp does not compose decomposed accents (NFC) before it splits text",
                lambda text: not unicodedata.is_normalized("NFC", text),
            )
        )
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
    return found


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
        f"give other token ids: {shown(json.loads(tokenizer.backend.to_str())['pre_tokenizer'])}. "
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
    plain = models.BPE(vocab=model["vocab"], merges=list(pairs(model)), ignore_merges=False)
    return all(len(plain.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _without_spaces(part: str) -> str:
    """GGUF parts two sides by a space, so a space inside is written as GPT-2's letter for it."""
    return part.replace(" ", "Ġ")
