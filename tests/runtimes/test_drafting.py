"""Guessing tokens ahead changes no answer, on any runtime, greedy or drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm import drafting
from edgellm.artifact import Artifact
from edgellm.chat import ChatSession
from edgellm.drafting import MOST_GUESSED, DraftModel, Lookahead, PromptLookup
from edgellm.errors import UsageError
from edgellm.runtimes.fake import FakeSession
from edgellm.sampling import Sampler, SamplingOptions


@pytest.fixture
def open_chat(container: str, artifact: Callable[..., Artifact]) -> Callable[..., ChatSession]:
    def make(**options: Any) -> ChatSession:
        kv_dtype = "f32" if container in ("onnx", "gguf") else None
        made = artifact("llama", container)
        return edgellm.open(made.path, threads=1, kv_dtype=kv_dtype, **options)

    return make


@pytest.mark.parametrize("sampling", [SamplingOptions(), SamplingOptions(temperature=0.7, seed=5)])
@pytest.mark.parametrize("draft", ["lookup", "the model itself"])
def test_answers_are_those_without(
    draft: str,
    sampling: SamplingOptions,
    open_chat: Callable[..., ChatSession],
    artifact: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random model repeats itself greedily, so that lookup has something to find."""
    monkeypatch.setattr(drafting, "SURE", 0.0)  # such a model is sure of nothing
    prompts = ("one two three one two three one two", "and again one two three")
    with open_chat() as chat:
        wanted = [chat.generate(each, sampling=sampling, max_tokens=40) for each in prompts]
    path = draft if draft == "lookup" else artifact("llama", "onnx").path
    with open_chat(draft=path) as chat:
        found = [chat.generate(each, sampling=sampling, max_tokens=40) for each in prompts]
        assert len(chat.session.tokens) <= found[-1].prompt_tokens + found[-1].new_tokens
    for plain, guessed in zip(wanted, found, strict=True):
        assert guessed.token_ids == plain.token_ids
        assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
        assert guessed.accepted_tokens <= guessed.drafted_tokens
        assert plain.drafted_tokens == 0
    if draft != "lookup" and sampling.temperature == 0:
        assert found[0].accepted_tokens == found[0].drafted_tokens > 20
    assert sum(answer.drafted_tokens for answer in found) > 0


class Guesses:
    """Guesses from a list of what to guess, then nothing."""

    def __init__(self, *guesses: Sequence[int]) -> None:
        self.guesses = list(guesses)
        self.asked: list[int] = []

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        self.asked.append(count)
        return self.guesses.pop(0)[:count] if self.guesses else ()

    def close(self) -> None:
        pass


def plain(prompt: list[int], count: int) -> list[int]:
    session = FakeSession(64, 100)
    tokens = [*prompt, int(session.prefill(prompt)[-1].argmax())]
    for _ in range(count):
        tokens.append(int(session.decode(tokens[-1]).argmax()))
    return tokens


@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_the_cache_holds_what_came_true_and_nothing_else(right: int) -> None:
    prompt = [3, 1, 4]
    wanted = plain(prompt, 8)
    guess = [*wanted[4 : 4 + right], *((wanted[4 + right] + 1) % 64,) * (5 - right)]
    session = FakeSession(64, 100)
    session.prefill(prompt)
    ahead = Lookahead(session, Guesses(guess))
    tokens = wanted[:4]
    for _ in range(8):
        tokens.append(int(ahead.logits_after(tokens, 20).argmax()))
    assert tokens == wanted
    assert (ahead.guessed, ahead.taken) == (5, right)
    ahead.forget(len(tokens) - 1)
    assert list(session.tokens) == tokens[:-1]


def test_guesses_shrink_pause_and_grow() -> None:
    wanted = plain([3, 1, 4], 60)
    wrong = [[(token + 1) % 64] * 10 for token in wanted]
    session = FakeSession(64, 100)
    session.prefill([3, 1, 4])
    drafter = Guesses(*wrong[:5])
    ahead = Lookahead(session, drafter)
    tokens = wanted[:4]
    while len(tokens) < 30:
        tokens.append(int(ahead.logits_after(tokens, 50).argmax()))
        if len(tokens) == 12:
            drafter.guesses += [wanted[len(tokens) + 5 : len(tokens) + 6]]
    assert tokens == wanted[:30]
    assert drafter.asked[:5] == [MOST_GUESSED, 5, 2, 1, 1]


def test_no_guess_leaves_the_context_or_what_is_wanted() -> None:
    session = FakeSession(64, 10)
    session.prefill([3, 1, 4])
    drafter = Guesses(*[[1] * 20] * 9)
    ahead = Lookahead(session, drafter)
    tokens = plain([3, 1, 4], 0)
    while len(tokens) < 10:
        tokens.append(int(ahead.logits_after(tokens, 3).argmax()))
        assert len(session.tokens) <= 10
    assert max(drafter.asked) <= 3


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1, 2]),
        ([1, 2, 9, 1, 2, 7, 1, 2], [7, 1, 2]),  # the last place wins
        ([5, 1, 2, 9, 6, 1, 2, 7, 5, 1, 2], [9, 6, 1, 2, 7]),  # so does the longest end
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_prompt_lookup_finds_where_the_end_stood_before(
    tokens: list[int], wanted: list[int]
) -> None:
    lookup = PromptLookup()
    assert list(lookup.draft(tokens, 5)) == wanted
    fresh = PromptLookup()
    for end in range(1, len(tokens)):  # learnt as the text grows, or at once: the same
        fresh.draft(tokens[:end], 5)
    assert list(fresh.draft(tokens, 5)) == wanted
    fresh.draft([9, 9, 9, 9], 5)
    assert list(fresh.draft(tokens, 5)) == wanted


def test_drawn_tokens_have_the_models_probabilities() -> None:
    """Of a thousand seeds, with guesses that are often right: chi squared over the tokens."""
    prompt, options = [3, 1, 4], {"temperature": 2.0, "top_k": 8}
    session = FakeSession(64, 100)
    first = session.prefill(prompt)[-1].copy()
    likeliest = int(first.argmax())
    ids, chances = Sampler(SamplingOptions(seed=0, **options)).candidates(
        session.decode(likeliest), [*prompt, likeliest]
    )
    counts = dict.fromkeys(map(int, ids), 0)
    for seed in range(2000):
        session.trim(3)
        sampler = Sampler(SamplingOptions(seed=seed, **options))
        ahead = Lookahead(session, Guesses([int(ids[seed % len(ids)])]))
        tokens = [*prompt, likeliest]
        counts[sampler.pick(ahead.logits_after(tokens, 9), tokens)] += 1
    expected = dict(zip(map(int, ids), 2000 * chances, strict=True))
    chi_squared = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in counts)
    assert chi_squared < 24.3  # 7 degrees of freedom: one time in a thousand by chance


def test_a_draft_model_with_other_tokens_is_refused(
    artifact: Callable[..., Artifact], tiny_model: Callable[[str], Path]
) -> None:
    target, other = artifact("llama", "onnx").path, artifact("qwen2", "onnx").path
    with pytest.raises(UsageError, match="other tokens"):
        edgellm.open(target, draft=other)


def test_a_draft_model_guesses_while_it_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own probabilities, by their definition, of what it would guess."""
    prompt = [3, 1, 4]
    guesses = plain(prompt, 8)[3:]
    session = FakeSession(64, 30)
    rows = session.prefill([*prompt, *guesses[:-1]], all_logits=True)[2:].astype(np.float64)
    chances = [float(np.exp(row - row.max()).sum() ** -1) for row in rows]
    for sure in (*chances, 1.0):
        monkeypatch.setattr(drafting, "SURE", sure * (1 - 1e-6))
        wanted = next((n for n, chance in enumerate(chances) if chance < drafting.SURE), 8)
        assert list(DraftModel(FakeSession(64, 30)).draft(prompt, 8)) == guesses[:wanted]


def test_a_draft_model_starts_where_the_texts_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "SURE", 0.0)
    model = DraftModel(FakeSession(64, 30))
    wanted = plain([3, 1, 4], 5)
    assert list(model.draft(wanted[:4], 3)) == wanted[4:7]
    assert list(model.draft(wanted[:6], 2)) == wanted[6:8]
    other = [3, 1, 5]
    assert list(model.draft(other, 2)) == plain(other, 1)[3:]
    assert list(model.draft(np.arange(30).tolist(), 4)) == []
    assert len(model.draft(np.arange(28).tolist(), 4)) == 2
