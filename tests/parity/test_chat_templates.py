"""Chats rendered as transformers renders them, and as llama.cpp does from the GGUF file."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, VARIABLES
from tiny_tokenizers import byte_level, write_folder, write_vocabulary

from edgellm.errors import UsageError
from edgellm.tokenization import LlamaCppTokenizer, Tokenizer, artifact_parity, artifact_tokenizer

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
# What templates of these raise on a conversation that they do not take.
FAILURES = (jinja2.TemplateError, AttributeError, KeyError, TypeError, ValueError)


@pytest.fixture(scope="session")
def smollm2_template(demo_model: Path) -> str:
    template = artifact_tokenizer(demo_model, "gguf").chat_template
    assert template
    return template


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat"), byte_level(vocab_size=300))


def with_template(folder: Path, template: str) -> Tokenizer:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_hf_folder(folder)


@pytest.mark.parametrize("name", [*TEMPLATES, "smollm2"])
def test_chats_are_rendered_as_transformers_renders_them(
    plain_folder: Path, name: str, request: pytest.FixtureRequest
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    template = TEMPLATES.get(name) or request.getfixturevalue("smollm2_template")
    ours = with_template(plain_folder, template)
    theirs = transformers.AutoTokenizer.from_pretrained(plain_folder)
    rendered = 0
    for conversation, messages in CONVERSATIONS.items():
        for variables in VARIABLES.values():
            options = {"add_generation_prompt": True, **variables}
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            except FAILURES:
                with pytest.raises(UsageError):
                    ours.render_chat(messages, **options)
                continue
            assert ours.render_chat(messages, **options) == expected, conversation
            rendered += 1
    assert rendered >= 12


# llama.cpp


def written_by_llamacpp(template: str, messages: list[dict[str, Any]], prompt: bool) -> str:
    """The prompt by llama.cpp's own code, which knows templates by their special tokens."""
    import llama_cpp

    chat = (llama_cpp.llama_chat_message * len(messages))(
        *(
            llama_cpp.llama_chat_message(each["role"].encode(), each["content"].encode())
            for each in messages
        )
    )
    buffer = ctypes.create_string_buffer(100_000)
    count = llama_cpp.llama_chat_apply_template(
        template.encode(), chat, len(messages), prompt, buffer, len(buffer)
    )
    assert 0 < count < len(buffer)
    return buffer.raw[:count].decode()


# Where llama.cpp's own code leaves the begin token to the tokenizer.
OWN_CODE = {
    "llama-3": "turns", "qwen": "system", "chatml": "system", "phi": "turns", "gemma": "turns",
}  # fmt: skip


@needs_llamacpp
@pytest.mark.parametrize("name", OWN_CODE)
@pytest.mark.parametrize("prompt", [True, False])
def test_llamacpps_own_code_writes_the_same(plain_folder: Path, name: str, prompt: bool) -> None:
    ours = with_template(plain_folder, TEMPLATES[name])
    messages = [
        {key: value for key, value in each.items() if value is not None}
        for each in CONVERSATIONS[OWN_CODE[name]]
    ]
    text = ours.render_chat(messages, add_generation_prompt=prompt)
    if name == "phi" and not prompt:
        text = text.removesuffix("</s>")
    assert written_by_llamacpp(TEMPLATES[name], messages, prompt) == text.removeprefix("<s>")


@needs_llamacpp
@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_pythons_formatter_writes_the_same(
    plain_folder: Path, tmp_path: Path, name: str
) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    pytest.importorskip("gguf", reason="gguf is not installed")
    source = with_template(plain_folder, TEMPLATES[name])
    file = write_vocabulary(tmp_path / "x.gguf", source.gguf_metadata())
    judge = LlamaCppTokenizer(file)
    carried, special = judge.chat_template, judge.special_tokens
    judge.close()
    assert carried == TEMPLATES[name]
    read_back = artifact_tokenizer(file, "gguf")
    rendered = 0
    for conversation, messages in CONVERSATIONS.items():
        # llama-cpp-python hands empty values on, where transformers leaves them out.
        given = [{k: v for k, v in each.items() if v is not None} for each in messages]
        for variables in VARIABLES.values():
            options = dict(variables)
            formatter = Jinja2ChatFormatter(
                carried,
                special["eos_token"],
                special["bos_token"],
                add_generation_prompt=options.pop("add_generation_prompt", True),
            )
            options.setdefault("documents", None)
            try:
                expected = formatter(messages=given, **options).prompt
            except FAILURES:
                with pytest.raises(UsageError):
                    read_back.render_chat(messages, **variables)
                continue
            assert read_back.render_chat(messages, **variables) == expected, conversation
            rendered += 1
    assert rendered >= 12


@needs_llamacpp
@pytest.mark.parametrize("lost", ["template", "end"])
def test_an_artifact_without_the_template_or_an_end_is_a_mismatch(
    plain_folder: Path, tmp_path: Path, lost: str
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    source = with_template(plain_folder, TEMPLATES["chatml"])
    keys = source.gguf_metadata()
    assert artifact_parity(source, write_vocabulary(tmp_path / "x.gguf", keys), "gguf").equal
    if lost == "template":
        keys["tokenizer.chat_template"] += " "
    else:
        keys["tokenizer.ggml.tokens"][1] = "</eos>"
        keys["tokenizer.ggml.eos_token_id"] = 2
    verdict = artifact_parity(source, write_vocabulary(tmp_path / "y.gguf", keys), "gguf")
    expected = "another chat template" if lost == "template" else r"ends at '</s>' \(1\)"
    with pytest.raises(AssertionError, match=expected):
        assert verdict.equal, verdict.mismatches


@needs_llamacpp
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ends_of_an_answer_reach_llamacpp(tmp_path: Path, count: int) -> None:
    from edgellm.errors import UnsupportedTokenizer

    pytest.importorskip("gguf", reason="gguf is not installed")
    backend = byte_level(vocab_size=300)
    backend.add_special_tokens(["<|turn|>", "<|call me|>", "<|observe|>", "<|eot_id|>"])
    texts = ["</s>", "<|eot_id|>", "<|turn|>", "<|call me|>", "<|observe|>"]
    ends = [backend.token_to_id(text) for text in texts[: 2 + count]]
    folder = write_folder(tmp_path, backend, generation_config={"eos_token_id": ends})
    source = Tokenizer.from_hf_folder(folder)
    assert source.eos_token_ids == tuple(ends)
    if count == 3:
        with pytest.raises(UnsupportedTokenizer, match=r"<\|observe\|>.*shorten eos_token_id"):
            source.gguf_metadata()
        return
    file = write_vocabulary(tmp_path / "x.gguf", source.gguf_metadata())
    judge = LlamaCppTokenizer(file)
    assert set(judge.eos_token_ids) == set(ends)
    judge.close()
    assert set(artifact_tokenizer(file, "gguf").eos_token_ids) == set(ends)
    assert artifact_parity(source, file, "gguf").equal


@needs_llamacpp
@pytest.mark.parametrize(
    "texts",
    [
        ["<|return|>", "<|call|>", "<|end|>"],
        ["<|calls|>", "<|flush|>", "<|end|>"],
        ["<|end|>", "<|call|>"],
        ["<|end|>", "<|endoftext|>", "<|im_end|>"],
    ],
)
def test_ends_that_llamacpp_knows_by_text(tmp_path: Path, texts: list[str]) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    backend = byte_level(vocab_size=300)
    backend.add_special_tokens(texts)
    keys = Tokenizer.from_hf_folder(write_folder(tmp_path, backend)).gguf_metadata()
    judge = LlamaCppTokenizer(write_vocabulary(tmp_path / "x.gguf", keys))
    assert set(Tokenizer.from_gguf(keys).eos_token_ids) == set(judge.eos_token_ids)
    judge.close()


TEMPLATE_PLACES: dict[str, Any] = {
    "chat_template.jinja": "JINJA",
    "additional_chat_templates/tool_use.jinja": "TOOLS",
    "tokenizer_config.json": {"eos_token": "</s>", "chat_template": "CONFIG"},
    "processor_config.json": {"processor_class": "SomeProcessor", "chat_template": "PROCESSOR"},
    "chat_template.json": {"chat_template": "LEGACY"},
}


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=5)))
def test_templates_are_found_in_the_order_of_transformers(
    tmp_path: Path, present: tuple[bool, ...]
) -> None:
    """As its tokenizer loads them; where that finds none, as a processor does."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = write_folder(tmp_path / "model", byte_level(vocab_size=300), {"eos_token": "</s>"})
    for wanted, (name, content) in zip(present, TEMPLATE_PLACES.items(), strict=True):
        if wanted:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    expected = transformers.PreTrainedTokenizerFast.from_pretrained(path).chat_template
    if expected is None:
        expected = transformers.ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    if not isinstance(expected, dict):
        expected = {"default": expected} if expected else {}
    tokenizer = Tokenizer.from_hf_folder(path)
    assert tokenizer.settings.chat_templates == expected
    # And so in what is written of it, where a tokenizer's reader looks.
    again = path.with_name("again")
    for name, data in tokenizer.files().items():
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes(data)
    assert Tokenizer.from_hf_folder(again).settings.chat_templates == expected
    read = transformers.PreTrainedTokenizerFast.from_pretrained(again).chat_template
    assert (read if isinstance(read, dict) else {"default": read} if read else {}) == expected
