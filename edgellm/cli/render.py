"""How commands show things: sizes, tables, notes, and the one JSON document of ``--json``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from edgellm.errors import EdgeError
    from edgellm.generate import Answer, AnswerStream


def show_json(document: Any) -> None:
    """Print ``document`` (plain values, structs or dataclasses) on stdout, indented."""
    import msgspec

    plain = msgspec.to_builtins(document, str_keys=True, enc_hook=str)
    print(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())


def say(message: str) -> None:
    """One line for the person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def show_notes(lines: Iterable[str], mark: str = "·") -> None:
    """What belongs to the answer and the person should know, a line each on stdout.

    On a terminal a line that does not fit goes on below itself, behind the ``mark``; elsewhere
    lines are whole.
    """
    for line in lines:
        print(_marked(mark, line, sys.stdout))


def say_notes(lines: Iterable[str]) -> None:
    """What the person should know (a default and its reason, a cap), likewise on stderr."""
    for line in lines:
        say(_marked("·", line, sys.stderr))


def _marked(mark: str, text: str, stream: TextIO) -> str:
    room = shutil.get_terminal_size().columns - 4 if stream.isatty() else 0
    return f"  {mark} " + "\n    ".join(_folded(text, room))


def say_error(error: EdgeError) -> None:
    """The message of an error, on stderr."""
    say(f"\x1b[1;31merror:\x1b[0m {error}" if sys.stderr.isatty() else f"error: {error}")


def show_stream(stream: AnswerStream) -> Answer:
    """Print an answer on stdout as it comes, then return it whole; Ctrl-C ends it early."""
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
    print()
    return stream.answer()


def why_cut(answer: Answer, max_tokens: int | None, context_tokens: int) -> str:
    """What cut an answer short, empty where nothing did."""
    if answer.finish_reason != "length":
        return ""
    if answer.new_tokens == max_tokens:
        return f"--max-tokens {max_tokens} reached"
    return f"the context of {context_tokens} tokens is full (--context TOKENS)"


def answer_facts(answer: Answer) -> list[str]:
    """What an answer took, in lines."""
    decode = answer.decode_tokens_per_s
    return [
        f"first token after {duration(answer.time_to_first_token_s)} "
        f"({answer.prefilled_tokens} of {answer.prompt_tokens} prompt tokens computed, "
        f"{answer.prefill_tokens_per_s:.0f} tokens/s)",
        f"{answer.new_tokens} new tokens" + (f", {decode:.1f} tokens/s" if decode else ""),
        *([] if not answer.drafted_tokens else [_drafted(answer)]),
        f"peak memory {size(answer.peak_memory_bytes)}",
        answer.reason,
    ]


def _drafted(answer: Answer) -> str:
    share = answer.accepted_tokens / answer.drafted_tokens
    return (
        f"{answer.accepted_tokens} of {answer.drafted_tokens} tokens guessed ahead came true "
        f"({share:.0%})"
    )


def size(nbytes: float) -> str:
    """Bytes as people read them, in powers of ten: ``91.7 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{0 if nbytes >= 100 * scale else 1}f} {unit}"
    return f"{nbytes:.0f} B"


def active_line(weights: int | None, active: int | None) -> list[tuple[str, str]]:
    """A fact about a mixture of experts, none of a model whose tokens pass all weights."""
    if not weights or not active:
        return []
    return [("weights", f"{large(weights)}, of which a token passes {large(active)}")]


def large(number: float) -> str:
    """``46.7 billion``, ``630 million``, ``5120``."""
    for word, scale in (("billion", 1e9), ("million", 1e6)):
        if number >= scale:
            return f"{number / scale:.{0 if number >= 100 * scale else 1}f} {word}"
    return f"{number:.0f}"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Seconds as people read them: ``85 ms``, ``4.2 s``, ``3 min 10 s``."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> None:
    """A table on stdout; ``right`` holds the indices of the columns to align right.

    On a terminal a last column that does not fit goes on below itself; elsewhere lines are whole.
    """
    table = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    left = sum(widths[:-1]) + 2 * (len(widths) - 1)
    for index, row in enumerate(table):
        cells = [
            cell.rjust(width) if str(place) in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        last = _folded(cells[-1].rstrip(), room - left)
        print("  ".join([*cells[:-1], last[0]]).rstrip())
        for line in last[1:]:
            print(" " * left + line)
        if index == 0:
            print("  ".join("-" * width for width in widths)[: room or None])


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Name and value pairs on stdout, the values in one column; empty values are left out.

    On a terminal a value that does not fit goes on below itself; elsewhere lines are whole.
    """
    shown = [(name, value) for name, value in facts if value]
    width = max((len(name) for name, _ in shown), default=0)
    room = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else 0
    for name, value in shown:
        for index, line in enumerate(_folded(value, room)):
            print(f"{'' if index else name:<{width}}  {line}")


def _folded(text: str, room: int) -> list[str]:
    """``text`` in lines of at most ``room`` characters, words whole; uncut if that is too few."""
    if len(text) <= room or room <= 20:
        return [text]
    return textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)
