"""What cells are asked: tokens of the built-in text, the same for all of one tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgellm.calibration.documents import read_documents
from edgellm.calibration.texts import DATA, EVALUATION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgellm.tokenization import Tokenizer

SEPARATOR = "\n\n"


class Encoding(Protocol):
    """What making a prompt needs of a tokenizer."""

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """``depth_ids`` lie in the cache before, ``ids`` are computed, ``text`` is what they say."""

    depth_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


def prompt_of(tokenizer: Encoding, prompt_tokens: int, depth_tokens: int) -> Prompt:
    """A prompt of so many tokens behind so many others, of one text that goes on."""
    text = builtin_text()
    ids = tokenizer.encode(text, add_special=True)
    needed = depth_tokens + prompt_tokens
    while len(ids) < needed:
        ids += tokenizer.encode(SEPARATOR + text)
    asked = ids[depth_tokens:needed]
    return Prompt(tuple(ids[:depth_tokens]), tuple(asked), tokenizer.decode(asked))


def builtin_text() -> str:
    """The text that comes with edgellm for measuring, whole."""
    documents = read_documents(DATA / f"{EVALUATION}.jsonl")
    return SEPARATOR.join(document.text for document in documents)


def whole_text(tokenizer: Tokenizer, tokens: int, before: str = "") -> tuple[str, int]:
    """A text of so many ``tokens``, the model's own counted, and how many it came to.

    ``before`` stands in front of it. Cutting a text may change its last token, so that there are a
    few more or less.
    """
    text = f"{before} {builtin_text()}" if before else builtin_text()
    while len(tokenizer.encode(text)) < tokens:
        text += f" {text}"
    encoded = tokenizer.encode_whole(text, max_tokens=tokens)
    text = text[: max(end for _, end in encoded.spans)]
    return text, len(tokenizer.encode_whole(text, max_tokens=2 * tokens).ids)
