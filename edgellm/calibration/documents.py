"""Texts and conversations as files hold them: plain text, one JSON object a line, Parquet.

The keys of an object are those of the common datasets of fine-tuning: ``messages`` (role and
content), ``text``, or ``prompt`` and ``completion``, which follow each other as they are (TRL's
"Dataset formats"). Where several are there the first of them counts.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import RuntimeMissing, UsageError

KEYS = "messages, text, or prompt and completion"

COLUMNS = ("messages", "text", "prompt", "completion")

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"

MOST_BYTES = 16 << 20
"""Bytes of a file that are read by default: some four million tokens."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a conversation where there are ``messages``; ``place``: where it was found."""

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    place: str = ""


def read_documents(path: Path, most_bytes: int = MOST_BYTES) -> Iterator[Document]:
    """The documents of a file in its order, up to about ``most_bytes`` of it.

    A ``.jsonl`` or ``.parquet`` file has many, any other file is one text. Raises ``UsageError``
    for a file that cannot be read or is none of these, with the line at fault, and
    ``RuntimeMissing`` for Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_lines(path, most_bytes)
    if suffix == PARQUET:
        return _parquet(path, most_bytes)
    if suffix == ".json":
        raise UsageError(
            f"{path} is a JSON document: write one object a line, into a file named .jsonl "
            f"(jq -c '.[]' {path.name} > {path.stem}.jsonl)"
        )
    return _plain(path, most_bytes)


def _plain(path: Path, most_bytes: int) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes)
            cut = bool(file.read(1))
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from error
    if cut:  # not in the middle of a word, where there are words
        content = content[: max(content.rfind(b"\n"), content.rfind(b" ")) + 1] or content
    yield Document(text=_decoded(content, str(path), cut=cut), place=path.name)


def _decoded(content: bytes, place: str, *, cut: bool = False) -> str:
    """UTF-8 as text, without a byte order mark; ``cut`` content may end within a character."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=not cut)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place} is not UTF-8 ({error}): name a plain text file, or convert it "
            "(iconv -f ENCODING -t UTF-8)"
        ) from error
    if "\0" in text:
        raise UsageError(
            f"{place} holds NUL characters, so it is no text, or UTF-16: name a plain text file "
            "in UTF-8"
        )
    return text


def _json_lines(path: Path, most_bytes: int) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            left = most_bytes
            for number, line in enumerate(file, 1):
                if left <= 0:
                    return
                left -= len(line)
                place = f"{path}, line {number}"
                if text := _decoded(line, place).strip():
                    yield _document(_object(text, place), place)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _object(line: str, place: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{place}: not JSON ({error.msg} at character {error.pos + 1}); a .jsonl file has one "
            "object a line"
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{place}: expected an object with {KEYS}, got {_kind(found)}")
    return found


def _document(fields: Mapping[str, Any], place: str) -> Document:
    if fields.get("messages") is not None:
        return Document(messages=_messages(fields["messages"], place), place=place)
    if fields.get("text") is not None:
        return Document(text=_string(fields, "text", place), place=place)
    if fields.get("prompt") is not None and fields.get("completion") is not None:
        if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
            turns = [*fields["prompt"], *fields["completion"]]
            return Document(messages=_messages(turns, place), place=place)
        both = (_string(fields, "prompt", place), _string(fields, "completion", place))
        return Document(text="".join(both), place=place)
    raise UsageError(
        f"{place}: expected an object with {KEYS}, got {', '.join(fields) or 'an empty one'}"
    )


def _messages(found: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(found, list) or not found:
        raise UsageError(
            f"{place}: messages must be a list of objects with role and content, got {_kind(found)}"
        )
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"{place}: each of the messages must be an object with role and content, got "
                f"{json.dumps(message, ensure_ascii=False, default=str)[:80]}"
            )
    return tuple(found)


def _string(fields: Mapping[str, Any], key: str, place: str) -> str:
    if not isinstance(fields[key], str):
        raise UsageError(f"{place}: {key} must be a string, got {_kind(fields[key])}")
    text: str = fields[key]
    return text


def _kind(value: Any) -> str:
    """What an error says that it got."""
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null"}
    if type(value) not in names:
        return repr(value)
    return names[type(value)] + ("" if value or value is None else " that is empty")


def _parquet(path: Path, most_bytes: int) -> Iterator[Document]:
    if not path.is_file():
        raise UsageError(f"cannot read {path}: there is no such file")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RuntimeMissing(
            f"{path} is a Parquet file, and pyarrow reads those: pip install pyarrow (or pip "
            "install 'edgellm[parquet]'), or convert it to .jsonl"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in COLUMNS]
            if not columns:
                raise UsageError(f"{path}: expected columns {KEYS}, got {', '.join(names)}")
            left, row = most_bytes, 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                if left <= 0:
                    return
                left -= batch.nbytes
                for fields in batch.to_pylist():
                    row += 1
                    yield _document(fields, f"{path}, row {row}")
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as a Parquet file: {error}") from error
