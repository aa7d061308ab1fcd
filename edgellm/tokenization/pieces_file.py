"""SentencePiece's model file (``tokenizer.model``), read without SentencePiece or protobuf.

The file is a protobuf message, ``ModelProto`` of sentencepiece_model.proto: few kinds of fields,
of which these are read, by their numbers there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.tokenization.pieces import Pieces
from edgellm.tokenization.vocabulary import TokenType, Vocabulary

# Fields of ModelProto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
# Of a piece.
_TEXT, _SCORE, _TYPE = 1, 2, 3
# Of TrainerSpec, and what they are where the file leaves them out.
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_SPECIAL = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
# Of NormalizerSpec.
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_Value = int | bytes


class PieceFile(NamedTuple):
    """``pieces`` as they cut text, and the ``special_ids`` that the file names."""

    pieces: Pieces
    special_ids: dict[str, int]


def parse(data: bytes, where: str) -> PieceFile:
    """The SentencePiece model in ``data``, which came from ``where``.

    Raises ``SourceError`` when it is none or damaged, ``UnsupportedTokenizer`` for what is neither
    BPE nor unigram, or does what no ``tokenizers`` model does.
    """
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, _Value] = {}
    normalizer: dict[int, _Value] = {}
    try:
        for number, value in _fields(data):
            if number == _PIECES:
                piece = dict(_fields(_message(value)))
                tokens.append(_message(piece.get(_TEXT, b"")).decode("utf-8"))
                scores.append(_float(piece.get(_SCORE, b"\0\0\0\0")))
                types.append(_int(piece.get(_TYPE, int(TokenType.NORMAL))))
            elif number == _TRAINER:
                trainer = dict(_fields(_message(value)))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(_message(value)))
        kind = _MODEL_TYPES.get(_int(trainer.get(_MODEL_TYPE, 1)), "unknown")
        special = {
            name: token_id
            for name, (number, default) in _SPECIAL.items()
            if 0 <= (token_id := _int(trainer.get(number, default))) < len(tokens)
        }
        flags = {
            number: bool(_int(normalizer.get(number, 1)))
            for number in (_DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES)
        }
        suffix = bool(_int(trainer.get(_SPACE_AS_SUFFIX, 0)))
        charsmap = _message(normalizer.get(_CHARSMAP, b""))
        fallback = bool(_int(trainer.get(_BYTE_FALLBACK, 0)))
    except (ValueError, struct.error) as error:
        raise SourceError(
            f"{where} is no SentencePiece model, or a damaged one ({error}): fetch it again"
        ) from error
    if not tokens or not trainer:
        raise SourceError(f"{where} is no SentencePiece model: it holds no pieces. Fetch it again")
    if kind not in ("unigram", "bpe") or suffix or not flags[_ESCAPE_SPACES]:
        odd = (
            f"is of type {kind!r}" if kind not in ("unigram", "bpe")
            else "writes the space behind a word" if suffix
            else "leaves spaces as they are"
        )  # fmt: skip
        raise UnsupportedTokenizer(
            f"{where} {odd}; edgellm reads SentencePiece models of type 'bpe' and 'unigram' that "
            "write the space before a word as ▁: take a model with a tokenizer.json"
        )
    if kind == "unigram" and "unk" not in special:
        raise SourceError(f"{where} names no piece for what it does not know: fetch it again")
    if len(set(tokens)) != len(tokens):
        raise SourceError(f"{where} holds a piece twice: it is damaged. Fetch it again")
    pieces = Pieces(
        Vocabulary(tokens, types, types, scores),
        unk_id=special.get("unk"),
        unigram=kind == "unigram",
        space_prefix=flags[_DUMMY_PREFIX],
        squeezes_spaces=flags[_REMOVE_SPACES],
        charsmap=charsmap,
        byte_fallback=fallback,
        where=where,
    )
    return PieceFile(pieces, special)


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """The fields of a protobuf message by their numbers; a repeated one comes again."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FOUR_BYTES, _EIGHT_BYTES):
            size = 4 if kind == _FOUR_BYTES else 8
        else:
            raise ValueError(f"a field of unknown kind {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"it ends at byte {len(data)}, within a field of {size} bytes")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, seven bits a byte, and where it ends; negative ones have 64 bits."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value - (1 << 64) if value >> 63 else value, at
    raise ValueError(f"a number of more than ten bytes at byte {at}")


def _message(value: _Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a text should be")
    return value


def _int(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a text where a number should be")
    return value


def _float(value: _Value) -> float:
    return float(struct.unpack("<f", _message(value))[0])
