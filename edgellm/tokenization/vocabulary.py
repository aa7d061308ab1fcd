"""The vocabulary of a GGUF file: tokens, types and scores, and what llama.cpp reads into them."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.errors import SourceError

PREFIX = "tokenizer.ggml."
# GGUF's key for a special token's id, by the name that tokenizer_config.json uses.
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in the format
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
# And for ends of an answer beside the eos token: of a turn, and of a message to a tool.
END_KEYS = ("eot_token_id", "eom_token_id")


class TokenType(enum.IntEnum):
    """``tokenizer.ggml.token_type``, as the GGUF format numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that llama.cpp takes for the end of an answer, whatever the file says
# (``llama_vocab::impl::load`` in llama-vocab.cpp, "special_eog_ids").
END_TEXTS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    )
)  # fmt: skip
# Texts that it takes for control tokens besides: fill-in-the-middle.
CONTROL_TEXTS = END_TEXTS | frozenset(
    (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
        "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>",
        "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>",
        "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
    )
)  # fmt: skip
# And these for ordinary tokens of the user's.
_USER_TEXTS = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id; ``types`` are what llama.cpp makes of the file's ``stored_types``."""

    tokens: Sequence[str]
    types: Sequence[int]
    stored_types: Sequence[int]
    scores: Sequence[float]

    def of_type(self, *types: TokenType) -> list[int]:
        """The ids of tokens of ``types``, in order."""
        wanted = set(types)
        return [index for index, kind in enumerate(self.types) if kind in wanted]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in GGUF ``metadata``; raises ``SourceError`` when it is incomplete."""
    tokens = string_list(metadata, "tokens")
    # llama.cpp ends a text at its first NUL, and has a stand-in for an empty one.
    tokens = [token.partition("\0")[0] if "\0" in token else token for token in tokens]
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    # It stops the whole process when a text is there twice.
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise SourceError(f"{PREFIX}tokens holds {twice!r} twice: the file is damaged")
    stored = [int(kind) for kind in metadata.get(PREFIX + "token_type", ())]
    stored = stored or [int(TokenType.NORMAL)] * len(tokens)
    scores = [float(score) for score in metadata.get(PREFIX + "scores", ())]
    scores = scores or [0.0] * len(tokens)
    for key, values in (("token_type", stored), ("scores", scores)):
        if len(values) < len(tokens):
            raise SourceError(
                f"{PREFIX}{key} has {len(values)} entries for {len(tokens)} tokens: "
                "the file is damaged"
            )
    types = list(stored)
    for index, token in enumerate(tokens):
        if token in CONTROL_TEXTS:
            types[index] = TokenType.CONTROL
        elif token in _USER_TEXTS:
            types[index] = TokenType.USER_DEFINED
    return Vocabulary(tokens, types, stored, scores)


def string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    """The list of texts under ``tokenizer.ggml.<key>``; raises ``SourceError`` when it is none."""
    value = metadata.get(PREFIX + key)
    if value is None:
        raise SourceError(f"the GGUF file has no {PREFIX}{key}, so it holds no whole tokenizer")
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise SourceError(f"{PREFIX}{key} is not a list of texts: the file is damaged")
    return list(value)
