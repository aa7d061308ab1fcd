"""The folder that is written also runs in onnxruntime-genai, and answers the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import onnx_files
import onnxruntime_genai as genai
import tiny_models

from edgellm.architectures import FAMILIES

TinyModel = Callable[[str], Path]

NEW_TOKENS = 24


def genai_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, min_length=0, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.asarray([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def our_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    graph = onnx_files.Graph(folder, len(prompt) + count)
    step, found = prompt, []
    while len(found) < count:
        found.append(int(graph.step(step)[-1].argmax()))
        step = found[-1:]
    # genai stops at the end-of-sequence token and leaves it out.
    return found[: found.index(2)] if 2 in found else found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_type_that_genai_knows(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """By the names of the tiny models, which begin with their family's or its first word."""
    name = next(each for each in tiny_models.MODELS if each.startswith(family.split("_text")[0]))
    onnx_files.write_onnx(tiny_model(name), tmp_path)
    genai.Model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "quant"),  # and the type of the cache
    [
        ("llama", "f32"),
        ("llama", "f16"),
        ("llama-256", "int4-g64"),
        ("mistral", "int8"),
        ("qwen2", "int4-g32-sym"),
        ("qwen3", "int4-g32"),
        ("gemma3", "f32"),
        ("gpt2", "int8-dynamic"),
        ("bloom", "f32"),
        ("mpt", "int4-g32 int8"),
        ("opt", "f32"),
        ("mixtral", "int4-g32"),
        ("qwen2_moe", "f32"),
        ("llama", "f32 int8"),
        ("gemma3", "f32 int8"),
        ("minicpm3", "int4-g32"),
        ("deepseek_v2", "f32"),
        ("cohere-normed", "f32"),
    ],
)
def test_genai_generates_the_same_tokens(
    name: str, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    grid, _, kv_cache = quant.partition(" ")
    onnx_files.write_onnx(tiny_model(name), tmp_path, grid, kv_cache=kv_cache or None)
    seen: set[int] = set()
    for seed in range(4):
        prompt = tiny_models.some_token_ids(20, seed=seed)
        wanted = our_greedy(tmp_path, prompt, NEW_TOKENS)
        assert genai_greedy(tmp_path, prompt, NEW_TOKENS) == wanted
        seen.update(wanted)
    assert len(seen) > 3, "tiny models that say one thing prove nothing"


def test_genai_tokenizes_with_the_files_beside_the_model(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    onnx_files.write_onnx(tiny_model("llama"), tmp_path)
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path)))
    text = "The quick brown fox jumps over 12 lazy dogs."
    assert tokenizer.decode(tokenizer.encode(text)) == text
