"""Rope scaling that is asked for, against transformers with the same in its config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models

import edgellm
from edgellm.artifact import Artifact
from edgellm.errors import EdgeError, UnsupportedTarget, UsageError

TinyModel = Callable[[str], Path]

TRAINED = 256
LENGTH = 300
"""Tokens: more than the models were made for."""

RUNTIMES = {"gguf": "llama_cpp", "onnx": "onnxruntime", "hf": "torch", "mlx": "mlx_lm"}
BOUNDS = {("gguf", "gemma3-pattern"): 2e-2, ("mlx", "gemma3-pattern"): 5e-2}
"""ggml looks GELU up in a table of halves, mlx-lm rounds Gemma's embedding scale to bf16. A rope
without the scaling, or with another one, is off by more than 1."""

STATED = {
    "linear:2": {"rope_type": "linear", "factor": 2.0},
    "yarn:4": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3:3": {
        "rope_type": "llama3",
        "factor": 3.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "ntk:2": {"rope_type": "default"},
}
"""What a config says of each."""

CASES = [
    ("llama-256", "linear:2"), ("llama-256", "yarn:4"), ("llama-256", "llama3:3"),
    ("llama-256", "ntk:2"), ("gemma3-pattern", "linear:2"), ("gemma3-pattern", "yarn:4"),
    ("gemma3-pattern", "ntk:2"),
]  # fmt: skip


def stated(folder: Path, asked: str, target: Path) -> Path:
    """A copy of a model whose config says itself what is asked for."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    width, factor = config["head_dim"], float(asked.partition(":")[2])
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    if asked.startswith("ntk"):
        theta = theta * factor ** (width / (width - 2))
    config["max_position_embeddings"] = int(TRAINED * factor)
    if "rope_parameters" in config:
        config["rope_parameters"] = {"rope_theta": theta, **STATED[asked]}
    else:
        config |= {"rope_theta": theta, "rope_scaling": STATED[asked]}
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits(artifact: Artifact | Path, runtime: str | None = None, **options: object) -> np.ndarray:
    path = artifact if isinstance(artifact, Path) else artifact.path
    kept = {"kv_dtype": "f32"} if path.suffix == ".gguf" or runtime == "llamacpp" else {}
    with edgellm.open(path, runtime=runtime, threads=1, **kept, **options) as chat:  # type: ignore[arg-type]
        return chat.session.prefill(tiny_models.some_token_ids(LENGTH), all_logits=True).copy()


@pytest.mark.parametrize(("name", "asked"), CASES)
def test_every_container_reaches_further_as_transformers_does(
    name: str, asked: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    wanted = tiny_models.reference_logits(
        stated(folder, asked, tmp_path / "stated"), tiny_models.some_token_ids(LENGTH)
    )
    factor = float(asked.partition(":")[2])
    for container, module in RUNTIMES.items():
        pytest.importorskip(module)
        if (container, name, asked) == ("gguf", "gemma3-pattern", "yarn:4"):
            continue  # llama.cpp's graph cannot: refused below
        made = edgellm.convert(
            folder,
            tmp_path / container,
            format=container,
            quant="f32",
            rope_scaling=asked,
            check=False,
        )
        facts = made.manifest.artifact  # type: ignore[union-attr]
        assert facts.model.context_length == int(TRAINED * factor)
        assert any(f"{asked} as asked" in note for note in facts.notes), facts.notes
        assert facts.recipe["rope_scaling"] == asked
        found = logits(made, "llamacpp" if container == "gguf" else None)
        bound = BOUNDS.get((container, name), 1e-3)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound, err_msg=container)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("llama-256", "linear:2"), ("llama-256", "yarn:4"), ("llama-256", "ntk:2"),
        ("gemma3-pattern", "linear:2"), ("gemma3-pattern", "ntk:2"),
        ("llama-yarn", "linear:2"), ("llama-yarn", "yarn:8"),
    ],
)  # fmt: skip
def test_a_runtime_can_be_told(
    name: str, asked: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As if it had been converted so; a yarn that the file states is replaced, not added to."""
    folder = tiny_model(name)
    for container, runtime in (("gguf", "llamacpp"), ("hf", "torch")):
        pytest.importorskip(RUNTIMES[container])
        options = {"format": container, "quant": "f32", "check": False}
        plain = edgellm.convert(folder, tmp_path / f"{container}-plain", **options)
        scaled = edgellm.convert(folder, tmp_path / container, rope_scaling=asked, **options)
        reach = scaled.manifest.artifact.model.context_length  # type: ignore[union-attr]
        length = min(LENGTH, reach)
        ids = tiny_models.some_token_ids(length)
        found = []
        for made, told in ((plain, asked), (scaled, None)):
            with edgellm.open(
                made.path, runtime=runtime, threads=1, kv_dtype="f32", rope_scaling=told
            ) as chat:
                assert chat.session.context_tokens == reach
                found.append(chat.session.prefill(ids, all_logits=True).copy())
        np.testing.assert_allclose(*found, rtol=0, atol=1e-3, err_msg=container)


@pytest.mark.parametrize(
    "text", ["yarn", "yarn:", "yarn:1", "yarn:x", "yarn:nan", "spiral:2", "dynamic:2", "linear:1e9"]
)
def test_what_is_no_scaling_is_refused(text: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--rope-scaling"):
        edgellm.convert(tiny_model("llama-256"), tmp_path / "out", rope_scaling=text)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt2", "no rotary positions"), ("llama-linear", "linear rope scaling already")],
)
def test_models_that_cannot_be_stretched_are_refused(
    name: str, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTarget, match=said):
        edgellm.convert(tiny_model(name), tmp_path / "out", rope_scaling="yarn:4")


@pytest.mark.parametrize(
    ("name", "container", "asked", "said"),
    [
        ("llama", "gguf", "yarn:4", "rope_freqs.weight"),
        ("llama-256", "gguf", "llama3:4", "from the file alone"),
        ("llama-linear", "gguf", "yarn:4", "linear rope scaling already"),
        ("gemma3-pattern", "gguf", "yarn:4", "the layers with a window"),
        ("gpt2", "gguf", "yarn:4", "no rotary positions"),
        ("llama-yarn-odd", "gguf", "linear:2", "attn_factor. would stay in force|rope_freqs"),
        ("llama-256", "onnx", "yarn:4", "from the artifact alone: convert.*rope-scaling yarn:4"),
    ],
)
def test_what_cannot_be_told_at_run_time_is_refused(
    name: str, container: str, asked: str, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    pytest.importorskip(RUNTIMES[container])
    made = edgellm.convert(
        tiny_model(name), tmp_path / "out", format=container, quant="f32", check=False
    )
    with pytest.raises(EdgeError, match=said):
        edgellm.open(made.path, rope_scaling=asked)
