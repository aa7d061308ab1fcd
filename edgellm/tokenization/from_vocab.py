"""A WordPiece tokenizer built from ``vocab.txt``, for BERT's folders without a tokenizer.json.

What transformers' ``BertTokenizer`` builds from the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edgellm.errors import SourceError, UnsupportedTokenizer

VOCABULARY = "vocab.txt"

MODEL_TYPES = ("bert", "distilbert")
"""Models whose ``vocab.txt`` is WordPiece's."""

CLASSES = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")

SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
"""Special tokens where tokenizer_config.json says nothing of them."""


def can_build(folder: Path, model: Mapping[str, Any]) -> bool:
    """Whether ``folder``, whose config.json is ``model``, holds such a vocabulary."""
    return model.get("model_type") in MODEL_TYPES and (folder / VOCABULARY).is_file()


def build(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of ``folder``; ``config``: its tokenizer_config.json.

    Raises ``UnsupportedTokenizer`` for a class that splits text in another way, ``SourceError`` for
    a vocabulary that is damaged or lacks a special token.
    """
    kind = config.get("tokenizer_class", CLASSES[0])
    if kind not in CLASSES:
        raise UnsupportedTokenizer(
            f"{folder} has no tokenizer.json, and its tokenizer_class is {kind!r}; from a "
            f"{VOCABULARY} edgellm builds {', '.join(CLASSES)}: save a fast tokenizer with "
            "transformers (AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    vocabulary = _read(folder / VOCABULARY)
    special = {name: _text(config.get(f"{name}_token"), usual) for name, usual in SPECIAL.items()}
    missing = [text for text in special.values() if text not in vocabulary]
    if missing:
        raise SourceError(
            f"{folder / VOCABULARY} has no {', '.join(missing)}, which are the tokenizer's special "
            "tokens: it belongs to another model, or is cut short; fetch it again"
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    cls, sep = special["cls"], special["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    backend.add_special_tokens(list(special.values()))
    return backend


def _read(path: Path) -> dict[str, int]:
    """A token a line; its id is the line's number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as UTF-8: {error}; fetch it again") from error
    if lines and not lines[-1]:
        lines.pop()
    return {token: place for place, token in enumerate(lines)}


def _text(token: Any, usual: str) -> str:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else usual
