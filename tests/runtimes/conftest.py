"""Sessions of every runtime on the same tiny models, in f32 with f32 caches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgellm.artifact import Artifact
from edgellm.conversion import convert
from edgellm.recipe import Recipe
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import RunOptions, Session

CONTEXT_TOKENS = 96


@dataclass(frozen=True)
class Case:
    """A runtime, the module that it needs, and the artifact that it opens.

    ``kv_dtype``: what the cache is kept in. ``bound``: how far logits may lie apart that differ
    only in how the tokens were handed over. The tiny models' logits reach about 10, and f32 sums of
    a few hundred terms are taken in another order; ggml also looks GELU up in a table of f16. A key
    that lies between two codes of int8 may be rounded the other way.
    """

    runtime: str
    container: str
    module: str
    bound: float
    kv_dtype: str = "f32"


CASES = (
    Case("fake", "onnx", "numpy", 0.0),
    Case("onnxruntime", "onnx", "onnxruntime", 1e-4),
    Case("onnxruntime", "onnx", "onnxruntime", 2e-2, kv_dtype="int8"),
    Case("llamacpp", "gguf", "llama_cpp", 1e-3),
    Case("llamacpp", "gguf", "llama_cpp", 2e-2, kv_dtype="q8_0"),
    Case("onnxruntime-genai", "onnx", "onnxruntime_genai", 1e-4),
    Case("onnxruntime-genai", "onnx", "onnxruntime_genai", 2e-2, kv_dtype="int8"),
    Case("torch", "hf", "transformers", 1e-4),
    Case("torch", "hf", "transformers", 2e-2, kv_dtype="int8"),
    Case("mlx", "mlx", "mlx_lm", 1e-4),
    Case("mlx", "mlx", "mlx_lm", 1e-4, kv_dtype="int8"),
)
MODELS = ("llama", "gemma3")
"""One with plain attention, one with windows of eight tokens in every other layer."""

STATEFUL = "lfm2"
"""One whose short convolutions have a state, which cannot be cut."""

HOLDING_STATES = ("onnxruntime", "llamacpp", "onnxruntime-genai")
"""Runtimes that open it."""


@pytest.fixture(scope="session")
def artifact(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Artifact]:
    """``artifact(model, container, kv_cache=None)``: the tiny model in f32, made at first use."""
    made: dict[tuple[str, str, str | None], Artifact] = {}

    def make(model: str, container: str, kv_cache: str | None = None) -> Artifact:
        key = (model, container, kv_cache)
        if key not in made:
            recipe = Recipe(
                source=str(tiny_model(model)), format=container, quant="f32", kv_cache=kv_cache
            )
            out = tmp_path_factory.mktemp("artifacts") / f"{model}-{container}"
            made[key] = convert(recipe, out, check=False)
        return made[key]

    return make


MODULES = {"onnx": "onnxruntime", "gguf": "llama_cpp", "hf": "transformers", "mlx": "mlx_lm"}
"""What runs each container."""


@pytest.fixture(params=MODULES)
def container(request: pytest.FixtureRequest) -> str:
    """Each container in turn; skipped where what runs it is missing."""
    if importlib.util.find_spec(MODULES[request.param]) is None:
        pytest.skip(f"{MODULES[request.param]} is not installed")
    return str(request.param)


@pytest.fixture(
    params=[
        *((case, model) for case in CASES for model in MODELS),
        *((case, STATEFUL) for case in CASES if case.runtime in HOLDING_STATES),
    ],
    ids=lambda given: f"{given[0].runtime}-{given[0].kv_dtype}-{given[1]}",
)
def case(request: pytest.FixtureRequest) -> tuple[Case, str]:
    """A runtime and a model; skipped where the runtime's library is missing."""
    chosen, model = request.param
    if importlib.util.find_spec(chosen.module) is None:
        pytest.skip(f"{chosen.module} is not installed")
    return chosen, model


@pytest.fixture
def bound(case: tuple[Case, str]) -> float:
    return case[0].bound


@pytest.fixture
def open_session(
    case: tuple[Case, str], artifact: Callable[..., Artifact]
) -> Iterator[Callable[..., Session]]:
    """``open_session(**options)``: a session of the case, closed when the test ends."""
    chosen, model = case
    opened: list[Session] = []

    def make(**options: Any) -> Session:
        settings = {
            "context_tokens": CONTEXT_TOKENS,
            "threads": 1,
            "kv_dtype": chosen.kv_dtype,
            **options,
        }
        stored = (
            chosen.container == "onnx" and chosen.runtime != "fake" and chosen.kv_dtype != "f32"
        )
        kv_cache = chosen.kv_dtype if stored else None
        model_folder = artifact(model, chosen.container, kv_cache)
        opened.append(runtime_named(chosen.runtime).open(model_folder, RunOptions(**settings)))
        return opened[-1]

    yield make
    for session in opened:
        session.close()


@pytest.fixture
def session(open_session: Callable[..., Session]) -> Session:
    return open_session()
