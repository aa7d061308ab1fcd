"""A full context: the answer ends, or the oldest tokens make room, on every runtime alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.chat import ChatSession
from edgellm.errors import GenerationError, UsageError
from edgellm.generate import SINK_TOKENS, AnswerStream
from edgellm.runtimes.fake import FakeSession

ROOM = 64


@pytest.fixture
def open_chat(container: str, artifact: Callable[..., Artifact]) -> Callable[..., ChatSession]:
    def make(**options: Any) -> ChatSession:
        kv_dtype = "f32" if container in ("onnx", "gguf") else None
        path = artifact("llama", container).path
        return edgellm.open(path, threads=1, context_tokens=ROOM, kv_dtype=kv_dtype, **options)

    return make


class Plain:
    """A tokenizer whose text nobody reads; no token ends an answer."""

    eos_token_ids = ()

    def decode_stream(self) -> Any:
        return self

    def step(self, token_id: int) -> str:
        return "."

    def finish(self) -> str:
        return ""


def by_hand(prompt: list[int], count: int, kept: int) -> list[int]:
    """Greedy tokens where a full cache is replaced by its beginning and its later half."""
    session = FakeSession(64, ROOM)
    held, said = list(prompt), []
    token = int(session.prefill(prompt)[-1].argmax())
    while True:
        said.append(token)
        held.append(token)
        if len(said) == count:
            return said
        if len(held) > ROOM:
            held = held[:kept] + held[-((ROOM - kept) // 2) :]
        session.trim(0)
        token = int(session.prefill(held)[-1].argmax())


@pytest.mark.parametrize(
    ("policy", "beginning", "kept"),
    [("sinks", 20, SINK_TOKENS), ("shift", 20, 20), ("shift", 0, SINK_TOKENS), ("shift", 60, 32)],
)
@pytest.mark.parametrize("draft", [False, True])
def test_what_stays_is_the_beginning_and_the_later_half(
    policy: Any, beginning: int, kept: int, draft: bool
) -> None:
    from edgellm.drafting import PromptLookup

    prompt = [token * 7 % 64 for token in range(50)]
    session = FakeSession(64, ROOM)
    answer = AnswerStream(
        session,
        Plain(),
        prompt,
        max_tokens=150,
        context_policy=policy,
        beginning_tokens=beginning,
        drafter=PromptLookup() if draft else None,
    ).answer()
    assert list(answer.token_ids) == by_hand(prompt, 150, kept)
    assert answer.finish_reason == "length"
    assert len(session.tokens) <= ROOM
    held = len(prompt) + 150 - answer.forgotten_tokens
    assert 0 < held <= ROOM + 1


def test_an_answer_goes_on_beyond_the_context(open_chat: Callable[..., ChatSession]) -> None:
    """By ids, for a random model may end its text anywhere."""
    prompt = [11, 12, 13, 14, 15]
    with open_chat() as chat:
        ended = AnswerStream(chat.session, Plain(), prompt).answer()
        assert ended.finish_reason == "length"
        assert ended.prompt_tokens + ended.new_tokens == ROOM + 1
        longer = AnswerStream(
            chat.session, Plain(), prompt, max_tokens=150, context_policy="sinks"
        ).answer()
        assert longer.new_tokens == 150
        assert ended.forgotten_tokens == 0
        assert longer.token_ids[: ended.new_tokens] == ended.token_ids


def test_the_oldest_messages_make_room_for_new_ones(open_chat: Callable[..., ChatSession]) -> None:
    questions = [f"question number {number}" for number in range(6)]
    with open_chat(system="be brief") as chat, pytest.raises(GenerationError, match="/clear"):
        _ = [chat.generate(question, max_tokens=6) for question in questions]
    with open_chat(system="be brief", context_policy="shift") as chat:
        for question in questions:
            chat.generate(question, max_tokens=6)
        assert chat.forgotten > 0
        assert len(chat.messages) == 2 * len(questions) - chat.forgotten
        assert chat.messages[-2]["content"] == questions[-1]
        kept = [dict(message) for message in chat.messages]
    with open_chat(system="be brief") as chat:  # as a chat that began with what is left
        chat.messages[:] = kept[:-2]
        chat.generate(kept[-2]["content"], max_tokens=6)
        assert chat.messages == kept


def test_an_unknown_policy_is_refused(artifact: Callable[..., Artifact]) -> None:
    with pytest.raises(UsageError, match="stop, shift, sinks"):
        edgellm.open(artifact("llama", "onnx").path, context_policy="drop")  # type: ignore[arg-type]
