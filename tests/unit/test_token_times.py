"""The clock of an answer, by a clock that is set by hand."""

from __future__ import annotations

import pytest

from edgellm import token_times
from edgellm.token_times import TokenTimes


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(token_times, "clock", lambda: time[0])
    return time


def test_each_token_has_its_parts_and_the_readers_time_is_nobodys(now: list[float]) -> None:
    times = TokenTimes(now[0])
    now[0] += 1  # tokenizing the prompt
    times.begin()
    now[0] += 10
    times.computed()
    now[0] += 2
    times.chosen(ends=False)
    now[0] += 0.5
    times.said()
    assert times.first_token_s == 13.5
    assert times.prefill_s == 12
    now[0] += 1000  # the reader
    times.resumed()
    now[0] += 4
    times.computed()
    now[0] += 0.25
    times.chosen(ends=False)
    now[0] += 0.125
    times.said()
    # Without a text there is no reader: the next token follows at once.
    now[0] += 3
    times.computed()
    now[0] += 0.5
    times.chosen(ends=True)
    assert times.latencies_s == [4.375, 3.5]
    assert times.sampling_s == [2, 0.25, 0.5]
    assert times.text_s == [0.5, 0.125]
    assert times.decode_tokens_per_s == 2 / 7.875
    assert (times.first_token_s, times.prefill_s) == (13.5, 12)


def test_a_first_token_that_ends_the_answer_is_the_first_all_the_same(now: list[float]) -> None:
    times = TokenTimes(now[0])
    times.begin()
    now[0] += 2
    times.computed()
    now[0] += 1
    times.chosen(ends=True)
    assert (times.first_token_s, times.prefill_s, times.latencies_s) == (3, 3, [])
    assert times.decode_tokens_per_s is None
