"""Documents as token ids, cut into windows: what a model is given at once, from an empty cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgellm.calibration.documents import Document
from edgellm.errors import SourceError, UsageError

if TYPE_CHECKING:
    from edgellm.tokenization import Tokenizer

SPEAKERS = {"user": "Question: ", "assistant": "Answer: "}
"""How the built-in conversations name who speaks, for a model without a chat template."""

TODAY = datetime(2025, 1, 1)
"""The day that templates are told: some write it, and the same text must give the same ids."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The token ids of a document; ``whole``: they begin as they should, with no prefix needed.

    ``refusal``: why a conversation was not written by the model's template, where it has one.
    """

    ids: list[int]
    whole: bool
    refusal: str = ""


def encode(tokenizer: Tokenizer, document: Document, *, plain_words: bool = False) -> Encoded:
    """The token ids of ``document``, without the tokenizer's prefix.

    A conversation goes through the model's chat template, which writes the begin token itself;
    special tokens written in a text are plain characters. Raises ``UsageError`` where there is no
    template or it refuses the conversation, ``SourceError`` where it is damaged; with
    ``plain_words`` the conversation is then written as questions and answers.
    """
    if not document.messages:
        return Encoded(tokenizer.encode(document.text, parse_special=False), whole=False)
    try:
        return _by_template(tokenizer, document)
    except (SourceError, UsageError) as error:
        if not plain_words:
            raise
        lines = "\n".join(_spoken(message) for message in document.messages)
        ids = tokenizer.encode(lines, parse_special=False)
        refusal = "" if tokenizer.chat_template is None else str(error)
        return Encoded(ids, whole=False, refusal=refusal)


def _by_template(tokenizer: Tokenizer, document: Document) -> Encoded:
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{document.place}: a conversation, and this model has no chat template that says how "
            "to write it: give a text file (or objects with text), or add a chat_template.jinja to "
            "the model"
        )
    try:
        rendered = tokenizer.render_chat(
            document.messages, add_generation_prompt=False, strftime_now=TODAY.strftime
        )
    except UsageError as error:
        raise UsageError(f"{document.place}: {error}") from error
    return Encoded(tokenizer.encode(rendered), whole=True)


def _spoken(message: Mapping[str, Any]) -> str:
    return f"{SPEAKERS[message['role']]}{message['content']}"


def apart(
    documents: Iterable[Encoded], prefix: tuple[int, ...], window_tokens: int
) -> Iterator[list[int]]:
    """Windows of at most ``window_tokens``, each of one document; its last one may be short.

    A window begins with ``prefix``, what the tokenizer puts before a text.
    """
    for document in documents:
        start = 0
        while start < len(document.ids):
            window = _begun(document, start, prefix)
            stop = start + window_tokens - len(window)
            yield window + document.ids[start:stop]
            start = stop


def packed(
    documents: Iterable[Encoded], prefix: tuple[int, ...], window_tokens: int
) -> Iterator[list[int]]:
    """Windows of exactly ``window_tokens``, documents following each other in them.

    So that windows begin where documents do, as far as it goes, the end of a document that is cut
    by the end of a window is dropped where it is shorter than a window and others came before it.
    What is left after the last full window is dropped too.
    """
    window: list[int] = []
    for document in documents:
        start = 0
        while start < len(document.ids):
            alone = not window
            window = window or _begun(document, start, prefix)
            stop = start + window_tokens - len(window)
            window += document.ids[start:stop]
            start = stop
            if len(window) == window_tokens:
                yield window
                window = []
                if not alone and len(document.ids) - start < window_tokens:
                    break


def _begun(document: Encoded, start: int, prefix: tuple[int, ...]) -> list[int]:
    return [] if document.whole and start == 0 else list(prefix)
