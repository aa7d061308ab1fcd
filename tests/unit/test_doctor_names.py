"""Whether names belong together, and what llama.cpp's own way makes of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgellm.lora.adapter import Adapter
from edgellm.lora.base.belonging import belonging, plain_name
from edgellm.lora.check.llamacpp_path import llamacpp_faults
from edgellm.lora.lineage import adapter_entry
from edgellm.tensors import constant


def adapter(parts: tuple[str, ...] = ("lora_A", "lora_B"), **fields: Any) -> Adapter:
    found = {part: constant(part, [[1.0]]) for part in parts}
    config = {"r": 16, "lora_alpha": 32, **fields.pop("config", {})}
    return Adapter(
        **{
            "name": "pirate",
            "path": Path("pirate"),
            "kind": "lora",
            "config": config,
            "parts": {"model.layers.0.self_attn.q_proj.weight": found},
            "files": (),
            **fields,
        }
    )


class Source:
    """What of a model says who it is."""

    def __init__(self, name: str, path: str = "", revision: str = "", **facts: str) -> None:
        self.name, self.path, self.revision = name, Path(path or name), revision
        self.config, self.provenance = {}, facts


@pytest.mark.parametrize(
    "name",
    [
        "SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-135M",
        "/models/SmolLM2-135M/",
        r"C:\models\SmolLM2-135M",
        "unsloth/SmolLM2-135M-bnb-4bit",
        "unsloth/SmolLM2-135M-unsloth-bnb-4bit",
        "SmolLM2-135M-GGUF",
        "smollm2-135m-q4_k_m.gguf",
        "SmolLM2-135M.Q8_0.gguf",
        "SmolLM2-135M-IQ4_NL",
        "SmolLM2_135M-GPTQ-int4",
    ],
)
def test_one_model_by_many_names(name: str) -> None:
    assert plain_name(name) == "smollm2135m"


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "SmolLM2-360M", "SmolLM-135M", "Qwen2"])
def test_other_models(name: str) -> None:
    assert plain_name(name) != "smollm2135m"


def test_verdicts() -> None:
    trained = adapter(base_name="HuggingFaceTB/SmolLM2-135M")
    assert belonging(Source("SmolLM2-135M"), trained).verdict == "same"  # type: ignore[arg-type]
    assert belonging(Source("SmolLM2-135M"), adapter()).verdict == "unknown"  # type: ignore[arg-type]
    found = belonging(Source("Qwen2-0.5B"), trained)  # type: ignore[arg-type]
    assert found.verdict == "different"
    assert "trained on HuggingFaceTB/SmolLM2-135M, and the base given is Qwen2-0.5B" in (
        found.warning("pirate")
    )
    assert belonging(Source("SmolLM2-135M"), trained).warning("pirate") == ""  # type: ignore[arg-type]


def test_a_base_may_say_its_name_in_several_places() -> None:
    trained = adapter(base_name="HuggingFaceTB/SmolLM2-135M")
    by_file = Source("Model Mix 8k", "/downloads/smollm2-135m-q4_0.gguf")
    by_key = Source("x", **{"general.base_model.0.name": "SmolLM2 135M"})
    for source in (by_file, by_key):
        assert belonging(source, trained).verdict == "same"  # type: ignore[arg-type]


def test_another_revision_is_another_base() -> None:
    trained = adapter(base_name="a/model", base_revision="0123abc")
    same = Source("a/model", revision="0123abcdef")
    other = Source("a/model", revision="fedcba")
    assert belonging(same, trained).verdict == "same"  # type: ignore[arg-type]
    found = belonging(other, trained)  # type: ignore[arg-type]
    assert found.verdict == "different"
    assert "a/model@0123abc" in found.warning("pirate")
    assert "a/model@fedcba" in found.warning("pirate")


def test_a_plain_lora_is_safe_in_llama_cpp() -> None:
    assert llamacpp_faults(adapter()) == ()
    # Its scale follows the rank of each product's own factors.
    assert llamacpp_faults(adapter(config={"rank_pattern": {"q_proj": 4}})) == ()


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"config": {"use_rslora": True}}, "4 times too weak at rank 16"),
        ({"config": {"alpha_pattern": {"q_proj": 4}}}, "lora_alpha = 32, also"),
        ({"parts": ("lora_A", "lora_B", "lora_magnitude_vector")}, "DoRA's magnitudes stop"),
        ({"parts": ("trainable_tokens_delta",)}, "trained token rows stop"),
        ({"kind": "loha"}, "not loha: convert --keep-adapters writes it"),
        ({"replaced": {"lm_head.weight": None}}, "whole tables (lm_head.weight) stop"),
        ({"replaced": {"model.norm.weight": None}}, "1 trained norms are dropped in silence"),
    ],
)
def test_what_llama_cpp_gets_wrong(fields: dict[str, Any], fault: str) -> None:
    (found,) = llamacpp_faults(adapter(**fields))
    assert fault in found


def test_the_rank_of_adalora_is_its_own() -> None:
    """PEFT writes LoRA's ``r`` into its config as well, where nothing uses it."""
    found = adapter(kind="adalora", config={"r": 8, "init_r": 6})
    assert adapter_entry(found, 1).rank == 6
    assert adapter_entry(adapter(config={"r": 8, "init_r": 6}), 1).rank == 8
