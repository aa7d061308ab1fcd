"""Prompts that begin alike are computed once, and answered as if they were computed anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.chat import ChatSession
from edgellm.errors import UsageError
from edgellm.prefix_cache import BLOCK_TOKENS, PrefixCache
from edgellm.runtimes.fake import BYTES_PER_TOKEN, FakeSession

SYSTEM = "You know this page by heart, and nothing else in the whole wide world. " * 2


@pytest.fixture
def open_chat(container: str, artifact: Callable[..., Artifact]) -> Callable[..., ChatSession]:
    def make(model: str = "llama", **options: Any) -> ChatSession:
        return edgellm.open(artifact(model, container).path, threads=1, **options)

    return make


def test_a_second_prompt_starts_behind_what_it_shares(
    open_chat: Callable[..., ChatSession],
) -> None:
    questions = ("who?", "and what else is there?")
    wanted = []
    for question in questions:
        with open_chat(system=SYSTEM) as chat:
            wanted.append(chat.generate(question, max_tokens=8))
    prefixes = PrefixCache()
    found = []
    for question in questions:  # sessions of their own
        with open_chat(system=SYSTEM, prefix_cache=prefixes) as chat:
            found.append(chat.generate(question, max_tokens=8))
            chat.clear()
            again = chat.generate(question, max_tokens=8)
            assert again.token_ids == found[-1].token_ids
            assert again.prefilled_tokens == 1
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert found[0].prefilled_tokens == found[0].prompt_tokens
    assert found[1].prefilled_tokens < found[1].prompt_tokens - len(SYSTEM) // 8
    assert prefixes.hits == 1
    prefixes.clear()
    assert prefixes.nbytes == 0


def test_another_model_finds_nothing(open_chat: Callable[..., ChatSession]) -> None:
    prefixes = PrefixCache()
    for model in ("llama", "gemma3"):
        with open_chat(model, prefix_cache=prefixes) as chat:
            answer = chat.generate(
                "one and the same text, long enough " * 4, raw=True, max_tokens=2
            )
            assert answer.prefilled_tokens == answer.prompt_tokens
    assert prefixes.hits == 0


def filled(tokens: list[int]) -> FakeSession:
    session = FakeSession(64, 1000)
    session.prefill(tokens)
    return session


def reused(prefixes: PrefixCache, tokens: list[int], owner: str = "a") -> int:
    """How many tokens a new session has after it asked, checked to be the right ones."""
    session = FakeSession(64, 1000)
    count = prefixes.reuse(session, tokens, owner)
    assert list(session.tokens) == tokens[:count]
    session.prefill(tokens[count:])
    assert (session.decode(1) == filled(tokens).decode(1)).all()
    return count


PAGE = [token % 64 for token in range(3 * BLOCK_TOKENS + 5)]


def test_whole_blocks_are_shared() -> None:
    prefixes = PrefixCache()
    prefixes.keep(filled(PAGE), "a")
    assert reused(prefixes, [*PAGE, 1, 2, 3]) == 3 * BLOCK_TOKENS
    assert reused(prefixes, PAGE[: 2 * BLOCK_TOKENS + 9]) == 2 * BLOCK_TOKENS
    assert reused(prefixes, [*PAGE[:BLOCK_TOKENS], 63, *PAGE]) == BLOCK_TOKENS
    assert reused(prefixes, PAGE[:BLOCK_TOKENS]) == BLOCK_TOKENS - 1  # one is left to compute
    assert reused(prefixes, PAGE[1:]) == 0
    assert reused(prefixes, PAGE, owner="b") == 0
    assert prefixes.hits == 4


def test_a_session_that_shares_more_already_stays_as_it_is() -> None:
    prefixes = PrefixCache()
    prefixes.keep(filled(PAGE[:BLOCK_TOKENS]), "a")
    session = filled(PAGE)
    assert prefixes.reuse(session, [*PAGE, 7], "a") == len(PAGE)
    assert prefixes.hits == 0


def test_what_goes_on_takes_the_place_of_what_it_goes_on_from() -> None:
    prefixes = PrefixCache()
    prefixes.keep(filled(PAGE[: 2 * BLOCK_TOKENS]), "a")
    prefixes.keep(filled(PAGE), "a")
    assert prefixes.nbytes == BYTES_PER_TOKEN * len(PAGE)
    prefixes.keep(filled(PAGE[: 2 * BLOCK_TOKENS]), "a")  # nothing new
    assert prefixes.nbytes == BYTES_PER_TOKEN * len(PAGE)


def test_the_least_used_goes_first_and_what_it_shared_stays_known() -> None:
    size = 2 * BLOCK_TOKENS
    shared = PAGE[:BLOCK_TOKENS]
    first, second, third = ([*shared, *[number] * BLOCK_TOKENS] for number in (7, 8, 9))
    prefixes = PrefixCache(2 * size * BYTES_PER_TOKEN)
    prefixes.keep(filled(first), "a")
    prefixes.keep(filled(second), "a")
    assert reused(prefixes, [*first, 1]) == size
    prefixes.keep(filled(third), "a")
    assert prefixes.nbytes == 2 * size * BYTES_PER_TOKEN
    assert reused(prefixes, [*second, 1]) == BLOCK_TOKENS
    assert reused(prefixes, [*first, 1]) == reused(prefixes, [*third, 1]) == size


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    prefixes = PrefixCache(10)
    prefixes.keep(filled(PAGE), "a")
    assert prefixes.nbytes == 0
    with pytest.raises(UsageError, match="choose 1 or more"):
        PrefixCache(0)
