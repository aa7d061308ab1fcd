"""Conversations: what is computed anew, what is remembered, and what stops a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from edgellm.chat import ChatSession
from edgellm.errors import GenerationError, UsageError
from edgellm.hardware import Choice
from edgellm.runtimes.fake import FakeSession
from edgellm.runtimes.session import Logits

USER, ASSISTANT, SYSTEM, END = 256, 257, 258, 259
SPECIAL = {"<user>": USER, "<assistant>": ASSISTANT, "<system>": SYSTEM, "<end>": END}
CHOICE = Choice("fake", "cpu", "for a test")


class ByteChat:
    """Bytes and four special tokens; ``pairs`` also reads "ab" as one token, 260."""

    eos_token_ids = (END,)
    special_texts = tuple(SPECIAL)
    chat_template: str | None = "bytes"

    def __init__(self, *, pairs: bool = False, strips: bool = False) -> None:
        self.pairs = pairs
        self.strips = strips

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        ids: list[int] = []
        while text:
            for special, token in SPECIAL.items():
                if text.startswith(special):
                    ids.append(token)
                    text = text[len(special) :]
                    break
            else:
                if self.pairs and text.startswith("ab"):
                    ids.append(260)
                    text = text[2:]
                else:
                    ids.append(ord(text[0]))
                    text = text[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join("ab" if token == 260 else chr(token) for token in ids)

    def decode_stream(self) -> ByteChat:
        return self

    def step(self, token_id: int) -> str | None:
        return self.decode([token_id])

    def finish(self) -> str | None:
        return None

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        text = ""
        for message in messages:
            content = message["content"]
            if self.strips and message["role"] == "assistant":
                content = content.strip()
            text += f"<{message['role']}>{content}<end>"
        return text + "<assistant>" * add_generation_prompt


class Replying(FakeSession):
    """A fake session that answers each prompt with the next of ``replies``, then ends."""

    def __init__(self, replies: Sequence[Sequence[int]], context_tokens: int = 200) -> None:
        super().__init__(261, context_tokens)
        self.replies = [[*reply, END] for reply in replies]
        self.computed: list[list[int]] = []
        self.said = 0

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        self.said = 0
        self.computed.append(list(token_ids))
        return self._speak(super().prefill(token_ids).copy())

    def decode(self, token_id: int) -> Logits:
        return self._speak(FakeSession.prefill(self, (token_id,)).copy())[0]

    def _speak(self, rows: Logits) -> Logits:
        reply = self.replies[len(self.computed) - 1]
        rows[-1, reply[min(self.said, len(reply) - 1)]] = 100
        self.said += 1
        return rows


def conversation(*replies: bytes | Sequence[int], **options: Any) -> tuple[ChatSession, Replying]:
    tokenizer = options.pop("tokenizer", None) or ByteChat()
    session = Replying([list(reply) for reply in replies], options.pop("context_tokens", 200))
    return ChatSession(session, tokenizer, choice=CHOICE, **options), session


def test_follow_up_computes_only_the_new_tokens() -> None:
    chat, session = conversation(b"Hello!", b"Ada.", system="Be kind.")
    first = chat.generate("I am Ada.")
    second = chat.generate("Who am I?")
    assert (first.text, second.text) == ("Hello!", "Ada.")
    tokenizer = ByteChat()
    assert session.computed == [
        tokenizer.encode("<system>Be kind.<end><user>I am Ada.<end><assistant>"),
        # The answer is in the cache but for the token that ended it.
        tokenizer.encode("<end><user>Who am I?<end><assistant>"),
    ]
    assert second.prefilled_tokens == len(session.computed[1])
    assert second.prompt_tokens == len(session.computed[0]) + 6 + len(session.computed[1])
    assert chat.messages == [
        {"role": "user", "content": "I am Ada."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who am I?"},
        {"role": "assistant", "content": "Ada."},
    ]
    assert second.reason == "for a test"


def test_answer_that_reads_back_as_other_tokens_is_not_computed_again() -> None:
    # The model wrote "a" and "b"; the tokenizer would read "ab" as one token.
    chat, session = conversation(b"xab", b"y", tokenizer=ByteChat(pairs=True))
    chat.generate("hi")
    chat.generate("go")
    assert session.computed[1] == ByteChat().encode("<end><user>go<end><assistant>")


def test_template_that_changes_the_answer_costs_only_what_it_changes() -> None:
    tokenizer = ByteChat(strips=True)
    chat, session = conversation(b" yes ", b"ok", tokenizer=tokenizer)
    chat.generate("hi")
    chat.generate("go")
    assert list(session.tokens) == tokenizer.encode(
        "<user>hi<end><assistant>yes<end><user>go<end><assistant>ok"
    )
    assert session.computed[1] == tokenizer.encode("yes<end><user>go<end><assistant>")


def test_cut_answer_continues_from_its_last_token() -> None:
    chat, session = conversation(b"abcdef", b"ok")
    assert chat.generate("hi", max_tokens=3).finish_reason == "length"
    chat.generate("go")
    # The third token was known but not yet computed.
    assert session.computed[1] == ByteChat().encode("c<end><user>go<end><assistant>")


def test_answer_cut_by_a_stop_string_is_remembered_as_shown() -> None:
    chat, session = conversation(b"one\ntwo", b"ok")
    assert chat.generate("hi", stop=["\n"]).text == "one"
    chat.generate("go")
    assert chat.messages[1]["content"] == "one"
    assert list(session.tokens) == ByteChat().encode(
        "<user>hi<end><assistant>one<end><user>go<end><assistant>ok"
    )


def test_cancelled_answer_is_remembered_as_far_as_it_came() -> None:
    chat, session = conversation(b"abcdef", b"ok")
    with chat.stream("hi") as stream:
        assert next(stream) + next(stream) == "ab"
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    chat.generate("go")
    assert session.computed[1] == ByteChat().encode("b<end><user>go<end><assistant>")


def test_turn_cancelled_before_its_first_token_never_happened() -> None:
    chat, _ = conversation(b"abc", b"ok")
    chat.stream("hi").close()
    assert chat.messages == []


def test_full_context_ends_the_turn_and_not_the_conversation() -> None:
    chat, session = conversation(b"a", b"b", context_tokens=40)
    chat.generate("hi")
    before = list(session.tokens)
    with pytest.raises(GenerationError, match=r"context holds 40.*/clear"):
        chat.generate("x" * 40)
    assert list(session.tokens) == before
    assert len(chat.messages) == 2
    assert chat.generate("yo").text == "b"


def test_clear_forgets_all_but_the_system_message() -> None:
    chat, session = conversation(b"a", b"b", system="S")
    chat.generate("hi")
    chat.clear()
    assert chat.messages == []
    chat.generate("yo")
    assert session.computed[1] == ByteChat().encode("<system>S<end><user>yo<end><assistant>")


def test_raw_text_is_continued_outside_the_conversation() -> None:
    chat, session = conversation(b"def", b"ok")
    assert chat.generate("abc", raw=True).text == "def"
    assert session.computed[0] == list(b"abc")
    assert chat.messages == []


def test_conversation_goes_on_after_raw_text() -> None:
    chat, session = conversation(b"a", b"raw", b"b")
    chat.generate("hi")
    chat.generate("zzz", raw=True)
    chat.generate("yo")
    text = "<user>hi<end><assistant>a<end><user>yo<end><assistant>"
    assert session.computed[2] == ByteChat().encode(text)


def test_model_without_a_template_continues_text_and_takes_no_system_message() -> None:
    tokenizer = ByteChat()
    tokenizer.chat_template = None
    chat, session = conversation(b"def", tokenizer=tokenizer)
    chat.generate("abc")
    assert session.computed[0] == list(b"abc")
    refused, _ = conversation(b"x", tokenizer=tokenizer, system="S")
    with pytest.raises(UsageError, match="no system message"):
        refused.generate("abc")


def test_counts_and_closing() -> None:
    chat, _ = conversation(b"a")
    with chat:
        chat.generate("hi")
        assert chat.used_tokens == len(ByteChat().encode("<user>hi<end><assistant>a"))
        assert chat.context_tokens == 200
    with pytest.raises(GenerationError, match="closed"):
        chat.generate("hi")
