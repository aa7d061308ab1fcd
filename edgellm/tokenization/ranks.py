"""Vocabularies that rank byte strings (tiktoken's files, Mistral's tekken.json), as merge lists."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.errors import SourceError

# GPT-2's letters for bytes: those that print stand for themselves, the rest follow from 256 on.
_PRINTING = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTING]
LETTERS = {byte: chr(byte) for byte in _PRINTING} | {
    byte: chr(256 + index) for index, byte in enumerate(_OTHERS)
}


@dataclass(frozen=True, slots=True)
class Tekken:
    """A tekken.json: byte strings by rank, special tokens by id, and the splitting expression.

    Ids of ordinary tokens begin behind those of special ones.
    """

    ranked: Sequence[bytes]
    special: Sequence[str]
    pattern: str


# Special tokens of tekken.json files that list none (before v7), by id; the rest are fillers.
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip


def is_tiktoken(data: bytes) -> bool:
    """Whether ``data`` looks like tiktoken's lines of base64 and rank."""
    line = data[:200].split(b"\n", 1)[0].split()
    return len(line) == 2 and line[1].isdigit()


def read_tiktoken(data: bytes, where: str) -> list[bytes]:
    """The byte strings of a tiktoken file by rank; raises ``SourceError`` when it is damaged."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            ranks[int(rank)] = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as error:
            raise SourceError(
                f"{where}, line {number} is {line[:60]!r}, not a token in base64 and its rank: "
                "fetch the file again"
            ) from error
    return _checked(ranks, where)


def read_tekken(data: bytes, where: str) -> Tekken:
    """The vocabulary of a tekken.json, cut to the size that its config names."""
    try:
        content: Any = json.loads(data)
        config = content["config"]
        count = int(config["default_num_special_tokens"])
        size = int(config["default_vocab_size"])
        pattern = str(config["pattern"])
        listed = content.get("special_tokens")
        special = {int(each["rank"]): str(each["token_str"]) for each in listed or ()}
        if listed is None:
            special = dict(enumerate(_TEKKEN_SPECIAL))
        ranks = {
            int(each["rank"]): base64.b64decode(each["token_bytes"], validate=True)
            for each in content["vocab"]
            if int(each["rank"]) < size - count
        }
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise SourceError(
            f"{where} is no tekken vocabulary, or a damaged one "
            f"({type(error).__name__}: {error}): fetch it again"
        ) from error
    fillers = [special.get(index, f"<SPECIAL_{index}>") for index in range(count)]
    return Tekken(_checked(ranks, where), fillers, pattern)


def _checked(ranks: Mapping[int, bytes], where: str) -> list[bytes]:
    """Byte strings by rank, none missing or twice, every single byte among them."""
    ranked = [ranks.get(index, b"") for index in range(len(ranks))]
    known = set(ranked)
    missing = sum(bytes([byte]) not in known for byte in range(256))
    if b"" in known or len(known) != len(ranked) or missing:
        raise SourceError(
            f"{where} ranks {len(ranks)} tokens, and should rank all of them from 0 on, each once, "
            f"and every single byte ({missing} are missing): it is damaged. Fetch it again"
        )
    return ranked


def letters(token: bytes) -> str:
    """``token`` in GPT-2's alphabet, as byte-level tokenizers write it."""
    return "".join(LETTERS[byte] for byte in token)


def merges_by_rank(ranked: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges that give what joining neighbours by lowest rank gives, one for each token.

    The two parts of a token are those that stand before the last join when its own bytes are
    joined alone: within a longer text nothing joins differently unless it joins across the token's
    border. Tokens that joining never reaches have no merge; a tokenizer takes them whole
    (``ignore_merges``).
    """
    rank_of = {token: rank for rank, token in enumerate(ranked)}
    never = len(ranked)
    merges: list[tuple[bytes, bytes]] = []
    for token in ranked:
        if len(token) < 2:
            continue
        parts = [token[at : at + 1] for at in range(len(token))]
        joined = [rank_of.get(left + right, never) for left, right in itertools.pairwise(parts)]
        while len(parts) > 2:
            best = min(joined)
            if best == never:
                break
            at = joined.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del joined[at]
            for pair in (at - 1, at):
                if 0 <= pair < len(joined):
                    joined[pair] = rank_of.get(parts[pair] + parts[pair + 1], never)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
