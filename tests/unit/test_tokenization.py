"""Tokenizers read from Hugging Face folders; what cannot be read is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_tokenizers import byte_level, changed, write_folder
from tokenizers import processors

from edgellm.errors import SourceError
from edgellm.tokenization import Tokenizer

Folder = Callable[..., Path]
BOS, EOS, IM_START = 0, 1, 2


@pytest.fixture(scope="module")
def bytes_backend() -> tokenizers.Tokenizer:
    return byte_level()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def write(backend: tokenizers.Tokenizer, *args: Any, **files: Any) -> Path:
        return write_folder(tmp_path / "model", backend, *args, **files)

    return write


def read_back(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_gguf(tokenizer.gguf_metadata())


def test_ends_of_an_answer_come_from_both_configs(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    path = folder(
        bytes_backend,
        {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
        generation_config={"eos_token_id": [IM_START, EOS, 999_999]},
        config={"eos_token_id": 77, "pad_token_id": IM_START},
    )
    tokenizer = Tokenizer.from_hf_folder(path)
    assert tokenizer.bos_token_id == BOS
    assert tokenizer.eos_token_ids == (EOS, IM_START)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_start|>",
    }  # fmt: skip
    assert tokenizer.vocab_size == bytes_backend.get_vocab_size()


def test_the_models_config_says_the_end_where_nothing_else_does(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    path = folder(bytes_backend, {}, config={"text_config": {"eos_token_id": [EOS, IM_START]}})
    assert Tokenizer.from_hf_folder(path).eos_token_ids == (EOS, IM_START)


@pytest.mark.parametrize(
    ("single", "expected"),
    [("<s> $A", [BOS]), ("$A </s>", [EOS]), ("<s> $A </s>", [BOS, EOS]), ("$A", [])],
)
def test_begin_and_end_tokens_are_what_the_post_processor_adds(
    folder: Folder, bytes_backend: tokenizers.Tokenizer, single: str, expected: list[int]
) -> None:
    backend = changed(bytes_backend)
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    bare = tokenizer.encode("text")
    whole = tokenizer.encode("text", add_special=True)
    assert [token for token in whole if token not in bare] == expected
    assert tokenizer.add_bos == (BOS in expected)
    assert read_back(tokenizer).encode("text", add_special=True) == whole


def test_special_tokens_in_text_are_characters_on_request(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    tokenizer = Tokenizer.from_hf_folder(folder(bytes_backend))
    assert tokenizer.encode("a</s>b").count(EOS) == 1
    plain = tokenizer.encode("a</s>b", parse_special=False)
    assert EOS not in plain
    assert tokenizer.decode(plain) == "a</s>b"
    assert tokenizer.encode("a</s>b").count(EOS) == 1
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "ab"
    assert tokenizer.decode(tokenizer.encode("a</s>b"), skip_special=False) == "a</s>b"


def test_padding_and_truncation_of_training_are_off(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    backend = changed(bytes_backend)
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    assert (
        tokenizer.decode(tokenizer.encode("a longer text than that")) == "a longer text than that"
    )


def test_files_are_handed_on_byte_by_byte(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    path = folder(bytes_backend)
    (path / "chat_template.jinja").write_text("default {{ x }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.from_hf_folder(path)
    assert tokenizer.files() == {
        name: (path / name).read_bytes()
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        )
    }
    assert tokenizer.chat_template == "default {{ x }}"
    assert tokenizer.render_chat([], tools=[{}]) == "tools"


@pytest.mark.parametrize(
    ("template", "default"),
    [
        ("plain", "plain"),
        ([{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}], "D"),
        (None, None),
    ],
)
def test_templates_in_the_config(
    folder: Folder, bytes_backend: tokenizers.Tokenizer, template: Any, default: str | None
) -> None:
    config = {"eos_token": "</s>", "chat_template": template}
    tokenizer = Tokenizer.from_hf_folder(folder(bytes_backend, config))
    assert tokenizer.chat_template == default
    assert bool(tokenizer.chat_template_sha256()) == bool(default)
    again = read_back(tokenizer)
    assert again.settings.chat_templates == tokenizer.settings.chat_templates


def test_no_tokenizer_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_hf_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model"', r"tokenizer\.json cannot be read"),
        ("tokenizer.json", b"{}", r"tokenizer\.json cannot be read"),
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("generation_config.json", b"[]", "not an object"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "<s>"}}', "by their ids"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": ["<s>"]}', "by their ids"),
        ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(
    folder: Folder,
    bytes_backend: tokenizers.Tokenizer,
    name: str,
    content: bytes,
    message: str,
) -> None:
    path = folder(bytes_backend)
    (path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        Tokenizer.from_hf_folder(path)


def test_tokens_that_only_the_config_knows_are_added(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    size = bytes_backend.get_vocab_size()
    token = {"content": "<|tool|>", "special": True}
    path = folder(bytes_backend, {"added_tokens_decoder": {str(size): token}})
    tokenizer = Tokenizer.from_hf_folder(path)
    assert tokenizer.encode("<|tool|>") == [size]
    assert b"<|tool|>" in tokenizer.files()["tokenizer.json"]
    path = folder(bytes_backend, {"added_tokens_decoder": {str(size + 9): token}})
    with pytest.raises(SourceError, match=r"<\|tool\|>.*the id"):
        Tokenizer.from_hf_folder(path)


def test_digests_follow_what_decides_ids(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    first = Tokenizer.from_hf_folder(folder(bytes_backend))
    same = Tokenizer.from_hf_folder(folder(bytes_backend, chat_template={}))
    config = {"bos_token": "<s>", "eos_token": "<|im_start|>", "chat_template": "T"}
    other = Tokenizer.from_hf_folder(folder(bytes_backend, config))
    assert first.sha256() == same.sha256()
    assert len({first.sha256(), other.sha256(), read_back(other).sha256()}) == 3
    template = Tokenizer.from_hf_folder(folder(bytes_backend, config | {"chat_template": "U"}))
    assert template.sha256() == other.sha256()
    assert template.chat_template_sha256() != other.chat_template_sha256()


def test_jinja_is_not_imported_until_a_chat_is_rendered() -> None:
    code = "import sys, edgellm.tokenization; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
