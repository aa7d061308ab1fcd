"""Streaming, stopping and counting, over a session that says what it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import GenerationError, UsageError
from edgellm.generate import AnswerStream, StopStrings, reuse_prefix
from edgellm.runtimes.fake import FakeSession
from edgellm.runtimes.session import Logits
from edgellm.sampling import SamplingOptions

EOS = 0


class Scripted(FakeSession):
    """A fake session whose most likely next token is the next of ``reply``."""

    def __init__(self, prompt_tokens: int, reply: Sequence[int], context_tokens: int = 64) -> None:
        super().__init__(256, context_tokens)
        self.prompt_tokens = prompt_tokens
        self.reply = reply
        self.computed: list[int] = []

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        self.computed.extend(token_ids)
        rows = super().prefill(token_ids, all_logits=all_logits).copy()
        place = len(self.tokens) - self.prompt_tokens
        rows[-1, self.reply[place]] = 100
        return rows

    def decode(self, token_id: int) -> Logits:
        row: Logits = self.prefill((token_id,))[0]
        return row


class ByteTokenizer:
    """Token ``n`` is the byte ``n``; 0 ends the text."""

    eos_token_ids = (EOS,)

    def decode_stream(self) -> ByteTokenizer:
        self.pending = b""
        return self

    def step(self, token_id: int) -> str | None:
        self.pending += bytes([token_id])
        try:
            text = self.pending.decode()
        except UnicodeDecodeError:
            return None
        self.pending = b""
        return text

    def finish(self) -> str | None:
        return self.pending.decode(errors="replace") or None


def answer_stream(text: bytes | str, *, prompt: bytes = b"hi", **options: object) -> AnswerStream:
    reply = [*(text.encode() if isinstance(text, str) else text), EOS]
    session = Scripted(len(prompt), reply)
    return AnswerStream(session, ByteTokenizer(), list(prompt), **options)  # type: ignore[arg-type]


def test_streams_until_the_model_ends() -> None:
    stream = answer_stream("Grüße 🙂!")
    pieces = list(stream)
    assert pieces == ["G", "r", "ü", "ß", "e", " ", "🙂", "!"]
    answer = stream.answer()
    assert answer.text == "Grüße 🙂!"
    assert answer.token_ids == tuple("Grüße 🙂!".encode())
    assert answer.finish_reason == "stop"
    assert (answer.prompt_tokens, answer.prefilled_tokens, answer.new_tokens) == (2, 2, 13)
    assert answer.seed is None


def test_fields_of_the_answer() -> None:
    answer = answer_stream("abc", reason="asked for").answer()
    assert set(answer.as_dict()) >= {
        "text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason",
        "time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s",
        "peak_memory_bytes", "runtime", "device", "reason",
    }  # fmt: skip
    assert (answer.runtime, answer.device, answer.reason) == ("fake", "cpu", "asked for")
    assert 0 < answer.time_to_first_token_s < 10
    assert answer.prefill_tokens_per_s > 0
    assert answer.decode_tokens_per_s is not None
    assert answer.decode_tokens_per_s > 0
    assert answer.peak_memory_bytes > 1 << 20


def test_time_of_whoever_reads_does_not_count() -> None:
    stream = answer_stream("abcd")
    for _ in stream:
        time.sleep(0.05)
    rate = stream.answer().decode_tokens_per_s
    # Four tokens decoded; the reader alone took 0.2 s.
    assert rate is not None
    assert rate > 4 / 0.1


def test_max_tokens_ends_it() -> None:
    stream = answer_stream("abcdef", max_tokens=3)
    assert stream.answer().finish_reason == "length"
    assert stream.text == "abc"
    assert answer_stream("abc", max_tokens=1).answer().decode_tokens_per_s is None


def test_exactly_max_tokens_is_length_even_if_the_end_would_follow() -> None:
    assert answer_stream("abc", max_tokens=3).answer().finish_reason == "length"


def test_an_unfinished_character_is_shown_as_broken() -> None:
    answer = answer_stream("a🙂", max_tokens=3).answer()
    assert answer.text == "a\ufffd"
    assert answer.new_tokens == 3


def test_context_ends_it_and_every_place_is_used() -> None:
    session = Scripted(2, [ord("x")] * 20, context_tokens=8)
    stream = AnswerStream(session, ByteTokenizer(), [1, 2])
    answer = stream.answer()
    # Six more fit behind the prompt; the seventh is known but not computed.
    assert answer.text == "x" * 7
    assert answer.finish_reason == "length"
    assert len(session.tokens) == 8


def test_prompt_that_fills_the_context_is_an_error() -> None:
    session = Scripted(0, [1])
    with pytest.raises(GenerationError, match=r"has 64 tokens and the context holds 64.*/clear"):
        AnswerStream(session, ByteTokenizer(), [1] * 64)
    assert list(session.tokens) == []


def test_empty_prompt_and_no_tokens_are_errors() -> None:
    with pytest.raises(GenerationError, match="prompt is empty"):
        answer_stream("a", prompt=b"")
    with pytest.raises(UsageError, match="max_tokens is 0"):
        answer_stream("a", max_tokens=0)


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["cd"], "abcdef", "ab"),
        (["ef"], "abcdef", "abcd"),
        (["xyz"], "abcdefxy", "abcdefxy"),
        (["bcx", "d"], "abcde", "abc"),
        (["aab"], "aaaaab!", "aaa"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["🙂"], "so 🙂 yes", "so "),
        (["a"], "abc", ""),
    ],
)
def test_stop_strings_span_tokens_and_are_never_shown(
    stops: list[str], text: str, shown: str
) -> None:
    stream = answer_stream(text, stop=stops)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer().text == shown
    assert stream.finish_reason == "stop"


@given(text=st.text("ab\n", max_size=12), stops=st.lists(st.text("ab\n", min_size=1, max_size=4)))
def test_stop_strings_equal_cutting_the_whole_text(text: str, stops: list[str]) -> None:
    stopper = StopStrings(stops)
    shown = ""
    for character in text:
        shown += stopper.push(character)
        if stopper.found:
            break
    shown += stopper.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
    else:  # cut where the first to be complete begins, the longest of those that end there
        end = min(ends)
        begins = [text.find(stop) for stop in stops if text[:end].endswith(stop) and stop in text]
        assert shown == text[: min(begins)]


def test_empty_stop_string_is_an_error() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        answer_stream("a", stop=["x", ""])


def test_closing_cancels_and_the_cache_holds_what_was_computed() -> None:
    ended = []
    stream = answer_stream("abcdef", on_end=ended.append)
    session = stream._session
    assert [next(stream), next(stream)] == ["a", "b"]
    stream.close()
    stream.close()
    answer = stream.answer()
    assert (answer.text, answer.finish_reason) == ("ab", "cancelled")
    assert list(session.tokens) == [*b"hi", *b"a"]
    assert ended == [stream]


def test_ctrl_c_while_computing_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = answer_stream("abcdef")
    session = stream._session
    assert next(stream) == "a"

    def interrupt(token_id: int) -> Logits:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert stream.answer().finish_reason == "cancelled"
    assert stream.text == "a"
    assert list(session.tokens) == [*b"hi"]


def test_leaving_the_block_cancels() -> None:
    with answer_stream("abcdef") as stream:
        next(stream)
    assert stream.finish_reason == "cancelled"


def test_seed_is_told_when_drawing() -> None:
    sampling = SamplingOptions(temperature=0.5, seed=11)
    assert answer_stream("abc", sampling=sampling).answer().seed == 11
    fresh = answer_stream("abc", sampling=SamplingOptions(temperature=0.5)).answer().seed
    assert fresh is not None


def test_damaged_logits_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = answer_stream("abc")
    nothing = np.full((1, 256), np.nan, np.float32)
    monkeypatch.setattr(stream._session, "prefill", lambda ids: nothing)
    with pytest.raises(GenerationError, match="gave nan"):
        next(stream)


@pytest.mark.parametrize(
    ("cached", "prompt", "kept"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3, 4, 5], 3),
        ([1, 2, 3], [1, 2, 9, 4], 2),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 1),
        ([1, 2, 3], [4], 0),
    ],
)
def test_prefix_is_reused_and_one_token_left(
    cached: list[int], prompt: list[int], kept: int
) -> None:
    session = FakeSession(256, 64)
    if cached:
        session.prefill(cached)
    assert reuse_prefix(session, prompt) == kept
    assert list(session.tokens) == prompt[:kept]


def test_without_reuse_the_cache_is_emptied_first() -> None:
    session = Scripted(2, [ord("a"), EOS])
    FakeSession.prefill(session, [1])  # not counted as computed
    AnswerStream(session, ByteTokenizer(), [1, 2]).answer()
    assert session.computed == [1, 2, ord("a")]
