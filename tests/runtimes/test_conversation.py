"""Conversations on every runtime: a follow-up computes its new tokens, and answers as if anew."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.chat import ChatSession

RUNTIMES = (("onnx", "onnxruntime"), ("gguf", "llama_cpp"))
MODELS = ("llama", "gemma3", "gpt2")
MAX_TOKENS = 6


@pytest.mark.parametrize(("container", "module"), RUNTIMES, ids=["onnxruntime", "llamacpp"])
@pytest.mark.parametrize("model", MODELS)
def test_follow_ups(
    container: str, module: str, model: str, artifact: Callable[[str, str], Artifact]
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")

    def opened() -> ChatSession:
        path = artifact(model, container).path
        return edgellm.open(path, context_tokens=120, threads=1, kv_dtype="f32")

    with opened() as chat:
        first = chat.generate("Hi", max_tokens=MAX_TOKENS)
        second = chat.generate("Go on", max_tokens=MAX_TOKENS)
        prompt = list(chat.session.tokens)[: second.prompt_tokens]
    assert first.prefilled_tokens == first.prompt_tokens
    # The answer was computed token by token, but for its last one, which was only drawn.
    held = first.prompt_tokens + first.new_tokens - 1
    assert second.prompt_tokens - second.prefilled_tokens == held
    assert second.prefilled_tokens < second.prompt_tokens / 2
    with opened() as fresh:
        logits = fresh.session.prefill(prompt)[-1]
        for token in second.token_ids:
            assert token == logits.argmax()
            logits = fresh.session.decode(token)
