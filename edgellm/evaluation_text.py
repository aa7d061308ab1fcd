"""The text that models are evaluated on, cut into passages of tokens.

Two ways to score. ``half`` is llama-perplexity's, for a text that goes on: windows lie one behind
the other, each begins with the begin token in the stead of its first one where the tokenizer adds
it, and only the tokens behind the middle of a window are scored, so that each was given half a
window at least; what does not fill a window is left out. ``all`` cuts every document apart and
scores each token that has another before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

from edgellm.calibration import BUILT_IN
from edgellm.calibration.documents import Document, read_documents
from edgellm.calibration.texts import DATA, EVALUATION, ids_sha256
from edgellm.calibration.windows import Encoded, apart, encode
from edgellm.digests import file_sha256
from edgellm.errors import UsageError

Score = Literal["half", "all"]

WINDOW_TOKENS = 512
"""llama-perplexity's default."""

LEAST_WINDOW = 4

CONTEXT_TOKENS = 8
"""Tokens of the passage before that a passage is decoded behind: whether it begins within a word,
and a space before it, show only there."""

REPLACEMENT = "\ufffd"
"""What a token that ends within a character is decoded to."""

WORD_START = re.compile(r"(?<!\S)\S")


class TextTokenizer(Protocol):
    """What cutting and counting needs of a tokenizer."""

    @property
    def add_bos(self) -> bool: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> str | None: ...

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of a file or of the text that comes with edgellm; ``sha256`` is the file's."""

    name: str
    documents: tuple[Document, ...]
    sha256: str

    @property
    def goes_on(self) -> bool:
        """Whether it is one text, and not documents that have nothing to do with each other."""
        return len(self.documents) == 1 and not self.documents[0].messages


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids that are computed together; those behind place ``first`` are scored."""

    ids: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return len(self.ids) - 1 - self.first


@dataclass(frozen=True)
class Cut:
    """A corpus as passages of at most ``window_tokens``."""

    passages: tuple[Passage, ...]
    score: Score
    window_tokens: int

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """The token ids of the passages."""
        return [passage.ids for passage in self.passages]

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return sum(passage.scored for passage in self.passages)

    @property
    def description(self) -> str:
        """What was scored, for people."""
        number = len(self.passages)
        windows = f"{number} window{'s' * (number != 1)} of at most {self.window_tokens} tokens"
        if self.score == "half":
            return f"the tokens behind the middle of {windows}, as llama-perplexity does"
        return f"every token but the first of {windows}"

    def sha256(self) -> str:
        """Digest of what was computed and scored: figures of equal digests can be compared."""
        firsts = [passage.first for passage in self.passages]
        return ids_sha256([firsts, *self.windows])


def corpus_named(asked: str) -> Corpus:
    """``builtin``, or the whole file of that path (one named so is ``./builtin``).

    Raises ``UsageError`` for a file that cannot be read, is no text or holds none, and
    ``RuntimeMissing`` for Parquet without pyarrow.
    """
    built_in = asked.lower() == BUILT_IN
    path = DATA / f"{EVALUATION}.jsonl" if built_in else Path(asked)
    size = path.stat().st_size if path.exists() else 0  # reading says what is wrong
    documents = tuple(read_documents(path, size))
    return Corpus(BUILT_IN if built_in else path.name, documents, file_sha256(path))


def cut(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    *,
    window_tokens: int = WINDOW_TOKENS,
    score: Score | None = None,
    tokens: int | None = None,
) -> Cut:
    """``corpus`` cut into passages of ``window_tokens``, at most ``tokens`` of it scored.

    ``score`` None is ``half`` for a text that goes on and fills a window, else ``all``. Raises
    ``UsageError`` for a text of less than two tokens and for settings that leave none to score.
    """
    if score not in (None, *get_args(Score)):
        raise UsageError(f"no way to score named {score!r}: choose {', '.join(get_args(Score))}")
    if window_tokens < LEAST_WINDOW:
        raise UsageError(
            f"a window must have at least {LEAST_WINDOW} tokens, got {window_tokens}: choose "
            f"another --window (llama-perplexity's is {WINDOW_TOKENS})"
        )
    if tokens is not None and tokens < 1:
        raise UsageError(f"at least 1 token must be scored, got --tokens {tokens}")
    prefix = begin_ids(tokenizer)
    encoded = _encoded(corpus, tokenizer)
    if corpus.goes_on:
        (text,) = encoded
        encoded = iter([text])
        score = score or ("half" if len(text.ids) + len(prefix) >= window_tokens else "all")
    if score == "half":
        stream = list(chain.from_iterable(document.ids for document in encoded))
        if len(stream) + len(prefix) < window_tokens:
            raise UsageError(
                f"the text {corpus.name} has {len(stream)} tokens, and a window of "
                f"{window_tokens} is not filled: choose a shorter --window, or --score all"
            )
        windows = _halves(prefix, stream, window_tokens)
    else:
        windows = _wholes(prefix, encoded, window_tokens)
    passages = tuple(_first_tokens(windows, tokens))
    if not passages:
        raise UsageError(
            f"the text {corpus.name} has less than two tokens, and a token is scored given those "
            "before it: name a longer text"
        )
    return Cut(passages, score or "all", window_tokens)


def begin_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The begin token, where the tokenizer puts it before a text."""
    bos = tokenizer.bos_token_id
    return (bos,) if tokenizer.add_bos and bos is not None else ()


def scored_text(tokenizer: TextTokenizer, passages: Sequence[Passage]) -> tuple[int, int]:
    """Words that begin in what is scored of ``passages``, and its bytes in UTF-8.

    A word is what stands between white space; special tokens are no text. A character that two
    tokens share counts where it ends.
    """
    words = nbytes = 0
    before: tuple[int, ...] = ()
    for passage in passages:
        start = tokenizer.decode((*before, *passage.ids[: passage.first + 1])).rstrip(REPLACEMENT)
        whole = tokenizer.decode((*before, *passage.ids)).rstrip(REPLACEMENT)
        words += sum(found.start() >= len(start) for found in WORD_START.finditer(whole))
        nbytes += len(whole[len(start) :].encode())
        before = passage.ids[-CONTEXT_TOKENS:]
    return words, nbytes


def _encoded(corpus: Corpus, tokenizer: TextTokenizer) -> Iterator[Encoded]:
    known = cast("Any", tokenizer)  # asks for a template and its words, which every tokenizer has
    plain_words = corpus.name == BUILT_IN
    return (encode(known, document, plain_words=plain_words) for document in corpus.documents)


def _halves(prefix: tuple[int, ...], ids: list[int], window_tokens: int) -> Iterator[Passage]:
    """llama-perplexity's: the begin token before the text, and over the first of each window."""
    stream = [*prefix, *ids]
    for start in range(0, len(stream) - window_tokens + 1, window_tokens):
        window = (*prefix, *stream[start + len(prefix) : start + window_tokens])
        yield Passage(window, window_tokens // 2)


def _wholes(
    prefix: tuple[int, ...], documents: Iterable[Encoded], window_tokens: int
) -> Iterator[Passage]:
    for window in apart(documents, prefix, window_tokens):
        yield Passage(tuple(window), 0)


def _first_tokens(passages: Iterable[Passage], tokens: int | None) -> Iterator[Passage]:
    """``passages`` up to ``tokens`` scored ones, the last of them cut; None takes all."""
    left = tokens
    for passage in passages:
        if passage.scored < 1:
            continue
        if left is None or passage.scored <= left:
            kept = passage
        else:
            kept = Passage(passage.ids[: passage.first + 1 + left], passage.first)
        yield kept
        if left is not None:
            left -= kept.scored
            if left < 1:
                return
