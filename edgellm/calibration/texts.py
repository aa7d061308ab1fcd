"""The texts that weights are rounded for, and those that the result is measured on.

Both are ``builtin`` or a file (``documents.read_documents``). The built-in ones lie in ``data/``
and have nothing in common: what is measured on the second was not rounded for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from edgellm.calibration import BUILT_IN
from edgellm.calibration.documents import MOST_BYTES, read_documents
from edgellm.calibration.windows import Encoded, apart, encode, packed
from edgellm.digests import combined_sha256, file_sha256
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.tokenization import Tokenizer

T = TypeVar("T")

DATA = Path(__file__).parent / "data"

LANGUAGES = ("ar", "de", "es", "fr", "hi", "it", "ja", "ko", "pl", "pt", "ru", "tr", "uk", "zh")

PARTS: tuple[tuple[str, ...], ...] = (
    ("chat",),
    ("prose",),
    ("code",),
    ("notes",),
    tuple(f"languages/{name}" for name in LANGUAGES),
)
"""Files of the built-in calibration set. Windows are taken from each row in turn, and of a row from
each file in turn."""

EVALUATION = "evaluation"
"""The file of the built-in text for measuring, which calibration does not see."""

CALIBRATION_TOKENS = 32_768
WINDOW_TOKENS = 512
"""What calibration takes by default: 64 windows."""

LEAST_WINDOWS = 4
"""Fewer say too little of a layer's inputs: a hidden size of 2048 has more directions than four
windows have tokens."""

BYTES_PER_TOKEN = 16
"""More than a token takes in nearly all texts, to know how much of a file is enough."""

MEASURED_TOKENS = 1024
MEASURED_WINDOW = 256
"""Tokens that models are compared on by default, and the length of their windows."""


class TextWindows(msgspec.Struct, frozen=True, kw_only=True):
    """Windows of token ids, and where they are from.

    ``name`` is ``builtin`` or that of the file, ``text_sha256`` the digest of its bytes, the same
    for every tokenizer. ``sha256`` is that of the ids: of each window its length and its ids, as
    little-endian int32.
    """

    name: str
    windows: tuple[tuple[int, ...], ...]
    sha256: str
    text_sha256: str
    tokens: int


class CalibrationText(TextWindows, frozen=True, kw_only=True):
    """The windows that calibration sees, all of one length, as drawn with ``seed``.

    ``notes``: facts that the user should be shown.
    """

    seed: int
    notes: tuple[str, ...] = ()


def calibration_windows(
    tokenizer: Tokenizer,
    asked: str | None = None,
    *,
    tokens: int = CALIBRATION_TOKENS,
    window_tokens: int = WINDOW_TOKENS,
    seed: int = 0,
    context: int | None = None,
) -> CalibrationText:
    """At least ``tokens`` token ids in windows of exactly ``window_tokens``, drawn by ``seed``.

    ``asked`` is a file, or ``builtin`` or None for the built-in set, whose parts take turns.
    ``context`` caps the window. A window begins with what the tokenizer puts before a text, or with
    a conversation as the template writes it. A text that is shorter is used whole, with a note;
    raises ``UsageError`` below ``LEAST_WINDOWS`` windows, and what ``read_documents`` raises.
    """
    length = _length(tokenizer, window_tokens, context)
    count = -(-tokens // length)
    if count < LEAST_WINDOWS:
        raise UsageError(
            f"{tokens} tokens of calibration are too few: ask for at least "
            f"{LEAST_WINDOWS * length} ({LEAST_WINDOWS} windows of {length})"
        )
    text = _Text(asked, PARTS, max(MOST_BYTES, tokens * BYTES_PER_TOKEN))
    prefix = tokenizer.settings.prefix_ids
    rows = []
    for row in text.rows:
        parts = [
            _shuffled(packed(text.encoded(part, tokenizer), prefix, length), f"{seed}:{part}")
            for part in row
        ]
        rows.append(_in_turn(_shuffled(parts, f"{seed}")))
    drawn = _in_turn(rows)
    if len(drawn) < LEAST_WINDOWS:
        has = sum(len(each.ids) for part in text.files for each in text.encoded(part, tokenizer))
        raise UsageError(
            f"the calibration text {text.name} is too short: it has {has} tokens and {tokens} are "
            f"wanted; {LEAST_WINDOWS} windows of {length} are the least: name a longer text, or "
            f"--calibration {BUILT_IN}"
        )
    notes = list(text.notes())
    if length < window_tokens:
        notes.append(
            f"the windows of the calibration text are {length} tokens long, as the model's context "
            f"is, and not {window_tokens}"
        )
    if len(drawn) < count:
        notes.append(
            f"the calibration text {text.name} fills {len(drawn) * length} tokens, in windows of "
            f"{length}, and {tokens} were wanted: all of them are used"
        )
    windows = tuple(tuple(window) for window in drawn[:count])
    return CalibrationText(
        name=text.name,
        windows=windows,
        sha256=ids_sha256(windows),
        text_sha256=text.sha256(),
        tokens=sum(map(len, windows)),
        notes=tuple(notes),
        seed=seed,
    )


def evaluation_windows(
    tokenizer: Tokenizer,
    asked: str | None = None,
    *,
    tokens: int = MEASURED_TOKENS,
    window_tokens: int = MEASURED_WINDOW,
    context: int | None = None,
) -> TextWindows:
    """At most ``tokens`` token ids from the beginning of a text, in windows of ``window_tokens``.

    ``asked`` is a file, or ``builtin`` or None for the built-in text, whose conversations and
    passages take turns. Each document is cut apart, so that no window is about two things, and the
    last window of a document may be short. ``context`` caps the window. Raises ``UsageError`` for a
    text without tokens, and what ``read_documents`` raises.
    """
    length = _length(tokenizer, window_tokens, context)
    text = _Text(asked, ((EVALUATION,),), (tokens + length) * BYTES_PER_TOKEN)
    encoded = chain.from_iterable(text.encoded(part, tokenizer) for part in text.files)
    found: list[tuple[int, ...]] = []
    left = tokens
    for window in apart(encoded, tokenizer.settings.prefix_ids, length):
        if left < 2:
            break
        found.append(tuple(window[:left]))
        left -= len(found[-1])
    if not found:
        raise UsageError(f"the text {text.name} has no tokens: name a file that holds some text")
    windows = tuple(found)
    return TextWindows(
        name=text.name,
        windows=windows,
        sha256=ids_sha256(windows),
        text_sha256=text.sha256(),
        tokens=sum(map(len, windows)),
    )


def check_readable(asked: str | None) -> None:
    """Raise what reading the text ``asked`` raises, before a model is opened."""
    text = _Text(asked, (), MOST_BYTES)
    for file in text.files.values():
        for _ in read_documents(file, text.most_bytes):
            pass


def ids_sha256(windows: Iterable[Sequence[int]]) -> str:
    """Digest of windows: of each its length and its ids, as little-endian int32."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray([len(window), *window], "<i4").tobytes())
    return digest.hexdigest()


class _Text:
    """What was asked for: a file, or the files of a built-in set by part, parts in rows."""

    def __init__(
        self, asked: str | None, built_in: Sequence[Sequence[str]], most_bytes: int
    ) -> None:
        self.most_bytes = most_bytes
        self.refusal = ""
        self.is_built_in = asked is None or asked.lower() == BUILT_IN
        if asked is None or self.is_built_in:
            self.name = BUILT_IN
            self.rows = built_in
            self.files = {part: DATA / f"{part}.jsonl" for row in built_in for part in row}
        else:
            self.name = Path(asked).name
            self.rows = (("",),)  # one part, and its draw does not depend on the file's name
            self.files = {"": Path(asked)}

    def encoded(self, part: str, tokenizer: Tokenizer) -> Iterator[Encoded]:
        """The documents of a part as token ids."""
        for document in read_documents(self.files[part], self.most_bytes):
            found = encode(tokenizer, document, plain_words=self.is_built_in)
            self.refusal = self.refusal or found.refusal
            yield found

    def sha256(self) -> str:
        """Digest of the file, or of all files of a built-in set."""
        return combined_sha256({file.name: file_sha256(file) for file in self.files.values()})

    def notes(self) -> Iterator[str]:
        """What was left unread, and what was not written by the model's template."""
        for file in self.files.values():
            if file.stat().st_size > self.most_bytes:
                yield f"of {file.name} the first {self.most_bytes:,} bytes were read"
        if self.refusal:
            yield (
                "the conversations of the built-in text are written in plain words, since the "
                f"model's chat template does not take them: {self.refusal}"
            )


def _length(tokenizer: Tokenizer, window_tokens: int, context: int | None) -> int:
    """Tokens of a window, no more than the model's context."""
    length = window_tokens if context is None else min(window_tokens, context)
    least = len(tokenizer.settings.prefix_ids) + 2
    if length < least:
        raise UsageError(
            f"windows of {length} tokens are too short to be text, at least {least} are needed"
            + ("" if context is None else f": the context is {context}, choose a longer --context")
        )
    return length


def _shuffled(values: Iterable[T], key: str) -> list[T]:
    """``values`` in an order that follows from ``key`` alone: by digest of the key and the place.

    Not by ``random``, whose order may differ between versions of Python.
    """
    given = list(values)
    digests = [hashlib.sha256(f"{key}:{place}".encode()).digest() for place in range(len(given))]
    return [given[place] for place in sorted(range(len(given)), key=digests.__getitem__)]


def _in_turn(rows: Iterable[Iterable[T]]) -> list[T]:
    """One value of each row, then the next of each; a row that is empty is passed over."""
    nothing = object()
    turns = chain.from_iterable(zip_longest(*rows, fillvalue=nothing))
    return [value for value in turns if value is not nothing]  # type: ignore[misc]
