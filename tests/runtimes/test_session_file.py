"""A conversation that was saved goes on, token for token, as one that never stopped."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.chat import ChatSession
from edgellm.errors import GenerationError, OutputError, SourceError, UsageError, VerificationError
from edgellm.sampling import SamplingOptions
from edgellm.session_file import load_session, save_session

CASES = [
    # the container, the module that runs it, what keys and values are kept in
    ("onnx", "onnxruntime", "f32"),
    ("onnx", "onnxruntime", "int8"),
    ("gguf", "llama_cpp", "f32"),
    ("gguf", "llama_cpp", "q8_0"),
    ("hf", "transformers", None),
    ("mlx", "mlx_lm", None),
    ("mlx", "mlx_lm", "int8"),
]
TURNS = ("hello there", "and then?", "tell me more of it")
SAMPLING = SamplingOptions(temperature=0.8, seed=3)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def open_chat(
    request: pytest.FixtureRequest, artifact: Callable[..., Artifact]
) -> Callable[..., ChatSession]:
    """``open_chat(model="llama", **options)``: a chat of the case."""
    container, module, kv_dtype = request.param
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")

    def make(model: str = "llama", **options: Any) -> ChatSession:
        stored = kv_dtype if container == "onnx" and kv_dtype == "int8" else None
        made = artifact(model, container, stored)
        return edgellm.open(made.path, threads=1, kv_dtype=kv_dtype, **options)

    return make


def turns(chat: ChatSession, prompts: tuple[str, ...]) -> list[tuple[int, ...]]:
    return [chat.generate(prompt, sampling=SAMPLING, max_tokens=12).token_ids for prompt in prompts]


def test_what_was_saved_goes_on_as_what_never_stopped(
    open_chat: Callable[..., ChatSession], tmp_path: Path
) -> None:
    with open_chat(system="be brief") as chat:
        wanted = turns(chat, TURNS)
    with open_chat(system="be brief") as chat:
        turns(chat, TURNS[:1])
        held = len(chat.session.tokens)
        nbytes = save_session(chat, tmp_path / "talk")
    assert (tmp_path / "talk").stat().st_size == nbytes
    with open_chat() as chat:
        assert load_session(chat, tmp_path / "talk") == held
        assert chat.system == "be brief"
        answer = chat.generate(TURNS[1], sampling=SAMPLING, max_tokens=12)
        assert answer.token_ids == wanted[1]
        assert answer.prompt_tokens - answer.prefilled_tokens >= held - 1  # nothing anew
        assert turns(chat, TURNS[2:]) == wanted[2:]
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_an_empty_conversation_is_saved_too(
    open_chat: Callable[..., ChatSession], tmp_path: Path
) -> None:
    with open_chat() as chat:
        save_session(chat, tmp_path / "talk")
        wanted = turns(chat, TURNS[:1])
    with open_chat() as chat:
        assert load_session(chat, tmp_path / "talk") == 0
        assert turns(chat, TURNS[:1]) == wanted


@pytest.fixture
def onnx_chat(artifact: Callable[..., Artifact]) -> Callable[..., ChatSession]:
    def make(model: str = "llama", **options: Any) -> ChatSession:
        return edgellm.open(artifact(model, "onnx").path, threads=1, **options)

    return make


@pytest.fixture
def saved(onnx_chat: Callable[..., ChatSession], tmp_path: Path) -> Path:
    with onnx_chat(system="be brief") as chat:
        turns(chat, TURNS[:1])
        save_session(chat, tmp_path / "talk")
    return tmp_path / "talk"


def test_another_model_is_refused(onnx_chat: Callable[..., ChatSession], saved: Path) -> None:
    with onnx_chat("gemma3") as chat, pytest.raises(UsageError, match="saved with another model"):
        load_session(chat, saved)


@pytest.mark.parametrize(
    ("container", "module"), [("gguf", "llama_cpp"), ("mlx", "mlx_lm"), ("hf", "transformers")]
)
def test_another_runtime_is_refused(
    container: str, module: str, artifact: Callable[..., Artifact], saved: Path
) -> None:
    pytest.importorskip(module)
    with edgellm.open(artifact("llama", container).path, threads=1) as chat:
        with pytest.raises(UsageError, match="another model"):
            load_session(chat, saved)
        assert not chat.messages


def test_another_template_or_version_is_refused(
    onnx_chat: Callable[..., ChatSession], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with onnx_chat() as chat, monkeypatch.context() as patch:
        patch.setattr(type(chat.tokenizer), "chat_template", "{{ messages }}")
        with pytest.raises(UsageError, match="another chat template"):
            load_session(chat, saved)
    from edgellm.runtimes.ort import OnnxRuntime

    found = OnnxRuntime.capabilities
    monkeypatch.setattr(
        OnnxRuntime,
        "capabilities",
        lambda self, hardware: dataclasses.replace(found(self, hardware), version="0.1"),
    )
    with onnx_chat() as chat, pytest.raises(UsageError, match="another version of the runtime"):
        load_session(chat, saved)


def test_another_system_message_is_refused(
    onnx_chat: Callable[..., ChatSession], saved: Path
) -> None:
    with onnx_chat(system="be long") as chat, pytest.raises(UsageError, match="--system"):
        load_session(chat, saved)


def test_a_context_too_small_for_it_is_refused(
    onnx_chat: Callable[..., ChatSession], saved: Path
) -> None:
    with onnx_chat(context_tokens=8) as chat, pytest.raises(GenerationError, match="--context"):
        load_session(chat, saved)


@pytest.mark.parametrize("place", [0.5, 0.99])
def test_a_changed_byte_is_found(
    place: float, onnx_chat: Callable[..., ChatSession], saved: Path
) -> None:
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= 1
    saved.write_bytes(content)
    with onnx_chat() as chat:
        with pytest.raises(VerificationError, match="damaged"):
            load_session(chat, saved)
        assert not chat.messages
        assert len(chat.session.tokens) == 0


@pytest.mark.parametrize("content", [b"", b"text, not a session at all", b"\x10" + b"\0" * 40])
def test_what_is_no_session_is_refused(
    content: bytes, onnx_chat: Callable[..., ChatSession], tmp_path: Path
) -> None:
    (tmp_path / "talk").write_bytes(content)
    with onnx_chat() as chat, pytest.raises(SourceError):
        load_session(chat, tmp_path / "talk")


def test_a_model_file_is_no_session(
    onnx_chat: Callable[..., ChatSession], tiny_model: Callable[[str], Path]
) -> None:
    with onnx_chat() as chat, pytest.raises(SourceError, match="no session that edgellm saved"):
        load_session(chat, tiny_model("llama") / "model.safetensors")


def test_what_cannot_be_written_leaves_what_was_there(
    onnx_chat: Callable[..., ChatSession], saved: Path
) -> None:
    before = saved.read_bytes()
    with onnx_chat() as chat:
        with pytest.raises(OutputError):
            save_session(chat, saved.parent / "nowhere" / "talk")
        (saved.parent / "folder").mkdir()
        with pytest.raises(OutputError):
            save_session(chat, saved.parent / "folder")
    assert saved.read_bytes() == before
    assert {path.name for path in saved.parent.iterdir()} == {"talk", "folder"}
