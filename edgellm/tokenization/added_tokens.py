"""Tokens that stand in a tokenizer's configs beside its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from edgellm.errors import SourceError


def token_text(token: Any) -> str | None:
    """A token as configs write it: its text, or an object with ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> bool:
    """Add the tokens that only tokenizer_config.json knows, as transformers does; whether any.

    Raises ``SourceError`` where it gives a token another id than the vocabulary does.
    """
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
        raise SourceError(
            f"{folder}: added_tokens_decoder in tokenizer_config.json is not an object of tokens "
            "by their ids: fetch it again"
        )
    added = False
    for key, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        text = token_text(token)
        if text is None:
            continue
        token = token if isinstance(token, Mapping) else {}
        if backend.token_to_id(text) is None:
            backend.add_tokens(
                [
                    tokenizers.AddedToken(
                        text,
                        single_word=bool(token.get("single_word")),
                        lstrip=bool(token.get("lstrip")),
                        rstrip=bool(token.get("rstrip")),
                        normalized=bool(token.get("normalized")),
                        special=bool(token.get("special")),
                    )
                ]
            )
            added = True
        if backend.token_to_id(text) != int(key):
            raise SourceError(
                f"{folder}: tokenizer_config.json gives the token {text!r} the id {key}, "
                f"tokenizer.json gives it {backend.token_to_id(text)}"
            )
    return added
