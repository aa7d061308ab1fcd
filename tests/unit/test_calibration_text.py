"""The built-in text and a user's own, cut into windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm import calibration_text
from edgellm.calibration_text import CHATS, PASSAGES, read_text, windows
from edgellm.errors import UsageError
from edgellm.tokenization import Tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(write_model: Callable[..., Path], tensors: dict[str, object]) -> Tokenizer:
    """A token a byte, and a chat template."""
    folder = write_model(tensors)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.from_hf_folder(folder)


@pytest.fixture
def plain(write_model: Callable[..., Path], tensors: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_hf_folder(write_model(tensors))


def test_chats_and_passages_take_turns(tokenizer: Tokenizer) -> None:
    found = [tokenizer.decode(window) for window in windows(tokenizer, tokens=10**6)]
    assert found[0].startswith(f"<user>{CHATS[0][0]}<assistant>{CHATS[0][1]}"[:256])
    assert found[1] == PASSAGES[0][:256]
    assert len(found) == len(CHATS) + len(PASSAGES)
    assert all(len(text) <= 256 for text in found)


def test_without_a_template_questions_are_plain_words(plain: Tokenizer) -> None:
    first = plain.decode(windows(plain)[0])
    assert first.startswith(f"Question: {CHATS[0][0]}\nAnswer: The capital")


def test_no_more_tokens_than_asked(tokenizer: Tokenizer) -> None:
    found = windows(tokenizer, tokens=600)
    assert sum(map(len, found)) == 600
    assert [len(window) for window in found] == [256, 256, 88]


def test_a_text_is_cut_whole_into_windows(tokenizer: Tokenizer) -> None:
    text = "abcdefghij" * 30
    found = windows(tokenizer, text, window_tokens=128)
    assert [len(window) for window in found] == [128, 128, 44]
    assert "".join(map(tokenizer.decode, found)) == text


def test_special_tokens_in_a_text_are_plain_characters(tokenizer: Tokenizer) -> None:
    (found,) = windows(tokenizer, "a<|end|>b")
    assert len(found) == len("a<|end|>b")


def test_every_window_begins_as_the_tokenizer_says(plain: Tokenizer) -> None:
    from dataclasses import replace

    plain.settings = replace(plain.settings, prefix_ids=(256,))
    found = windows(plain, "x" * 100, window_tokens=40)
    assert [window[0] for window in found] == [256] * 3
    assert [len(window) for window in found] == [40, 40, 23]


@pytest.mark.parametrize("text", ["", None])
def test_nothing_to_measure_on(
    text: str | None, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is None:
        monkeypatch.setattr(calibration_text, "CHATS", ())
        monkeypatch.setattr(calibration_text, "PASSAGES", ())
    with pytest.raises(UsageError, match="has no tokens"):
        windows(tokenizer, text)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    with pytest.raises(UsageError, match="cannot read"):
        read_text(file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(file)
    file.write_text("café", encoding="utf-8")
    assert read_text(file) == "café"
