"""Greedy tokens of the real model: equal on every runtime, and equal to transformers'."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm.chat import ChatSession

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = pytest.mark.slow

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "The three largest cities of France are",
)
NEW_TOKENS = 32

MODULES = {"onnx": "onnxruntime", "gguf": "llama_cpp", "hf": "transformers", "mlx": "mlx_lm"}

TIE = 1e-3
"""Two best logits closer than this may swap: f32 sums over 30 layers, taken in another order, move
the logits of this model by up to 2e-4, and two of them move apart."""


@pytest.fixture(scope="module", params=["onnx", "gguf", "hf", "mlx"])
def chat(
    request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChatSession]:
    """The model in f32 on the runtime of each container, with an f32 cache."""
    module = MODULES[request.param]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    out = tmp_path_factory.mktemp("greedy") / request.param
    edgellm.convert(demo_model, out, format=request.param, quant="f32", check=False)
    with edgellm.open(out, verify=False, context_tokens=256, kv_dtype="f32") as session:
        yield session


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_transformers(
    chat: ChatSession, demo_reference: Any, prompt: str
) -> None:
    chat.clear()
    answer = chat.generate(prompt, max_tokens=NEW_TOKENS)
    text = chat.tokenizer.render_chat([{"role": "user", "content": prompt}])
    prompt_ids = chat.tokenizer.encode(text)
    with torch.inference_mode():
        whole = torch.tensor([[*prompt_ids, *answer.token_ids]])
        logits = demo_reference(whole).logits[0, len(prompt_ids) - 1 :]
    assert answer.token_ids
    for place, token in enumerate(answer.token_ids):
        best = logits[place].max()
        assert best - logits[place, token] < TIE, f"token {place} of {answer.text!r}"
    if answer.finish_reason == "stop":
        assert logits[len(answer.token_ids)].argmax() in chat.tokenizer.eos_token_ids


@pytest.mark.parametrize("prompt", PROMPTS[:1])
def test_logits_equal_transformers(chat: ChatSession, demo_reference: Any, prompt: str) -> None:
    ids = chat.tokenizer.encode(prompt * 6)
    chat.session.trim(0)
    found = torch.from_numpy(chat.session.prefill(ids, all_logits=True).copy())
    with torch.inference_mode():
        wanted = demo_reference(torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < TIE / 2
