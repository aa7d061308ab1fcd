"""Names of adapters' tensors, as every version of PEFT and what is around it writes them."""

from __future__ import annotations

import pytest

from edgellm.errors import AdapterError
from edgellm.lora.reading.peft_keys import Place, place_of

Q = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{Q}.weight"


@pytest.mark.parametrize(
    ("key", "name", "part"),
    [
        (f"base_model.model.{Q}.lora_A.weight", WEIGHT, "lora_A"),
        # Saved from the live model, under whatever name the adapter has.
        (f"base_model.model.{Q}.lora_A.default.weight", WEIGHT, "lora_A"),
        (f"base_model.model.{Q}.lora_B.my-task.weight", WEIGHT, "lora_B"),
        (f"base_model.model.base_model.model.{Q}.lora_B.weight", WEIGHT, "lora_B"),
        (f"{Q}.lora_B.weight", WEIGHT, "lora_B"),
        (f"_orig_mod.base_model.model.{Q}.lora_A.weight", WEIGHT, "lora_A"),
        (f"base_model.model._orig_mod.{Q}.lora_A.weight", WEIGHT, "lora_A"),
        (f"module.base_model.model.{Q}.lora_A.weight", WEIGHT, "lora_A"),
        (
            "_fsdp_wrapped_module.base_model.model.model.layers.0._checkpoint_wrapped_module."
            "self_attn.q_proj.lora_A.weight",
            WEIGHT,
            "lora_A",
        ),
        # A model without its head, and a language model inside a larger one.
        (
            "base_model.model.layers.0.mlp.up_proj.lora_A.weight",
            "layers.0.mlp.up_proj.weight",
            "lora_A",
        ),
        (
            "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "lora_A",
        ),
        (f"base_model.model.{Q}.lora_B.bias", f"{Q}.bias", "lora_bias"),
        (f"base_model.model.{Q}.lora_B.default.bias", f"{Q}.bias", "lora_bias"),
        (f"base_model.model.{Q}.lora_magnitude_vector", WEIGHT, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.weight", WEIGHT, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default", WEIGHT, "lora_magnitude_vector"),
        (
            f"base_model.model.{Q}.lora_magnitude_vector.default.weight",
            WEIGHT,
            "lora_magnitude_vector",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "model.embed_tokens.weight",
            "lora_embedding_A",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_B.default",
            "model.embed_tokens.weight",
            "lora_embedding_B",
        ),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "model.embed_tokens.weight",
            "trainable_tokens_delta",
        ),
        # How deep a parameter is nested tells it from another of the same module.
        (
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
            "model.layers.0.mlp.experts.base_layer.weight",
            "lora_A",
        ),
        # Whole tensors.
        ("base_model.model.lm_head.weight", "lm_head.weight", ""),
        ("base_model.model.lm_head.base_layer.weight", "lm_head.weight", ""),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head.weight", ""),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight", ""),
        (f"base_model.model.{Q}.bias", f"{Q}.bias", ""),
        (f"base_model.model.{Q}.base_layer.bias", f"{Q}.bias", ""),
        (
            "base_model.model.model.embed_tokens.token_adapter.base_layer.weight",
            "model.embed_tokens.weight",
            "",
        ),
        ("base_model.model.model.experts.gate_up_proj", "model.experts.gate_up_proj", ""),
    ],
)
def test_keys_of_every_version(key: str, name: str, part: str) -> None:
    assert place_of(key, "lora", ["experts"], "file") == Place(name, part)


def test_keys_of_other_kinds() -> None:
    prefix = "base_model.model.model.norm"
    assert place_of("base_model.vera_A", "vera", [], "f") == Place("", "vera_A")
    assert place_of(f"{prefix}.ia3_l", "ia3", [], "f") == Place("model.norm.weight", "ia3_l")
    for key in (f"{prefix}.ln_tuning_layers.weight", f"{prefix}.ln_tuning_layers.default.weight"):
        assert place_of(key, "ln_tuning", [], "f") == Place("model.norm.weight", "")
    tokens = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    name = "model.embed_tokens.weight"
    assert place_of(tokens, "trainable_tokens", [], "f") == Place(name, "trainable_tokens_delta")


def test_the_untrained_original_of_a_saved_module_is_passed_over() -> None:
    assert place_of("base_model.model.lm_head.original_module.weight", "lora", [], "f") is None


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q}.ia3_l",
        f"base_model.model.{Q}.lora_a",
        f"base_model.model.{Q}.lora_A.bias",
        f"base_model.model.{Q}.lora_A.one.two.weight",
        f"base_model.model.{Q}.lora_diag",
        "base_model.model.model.experts.gate_up_proj",
        "weight",
        "lora_A.weight",
        "",
    ],
)
def test_unknown_keys_are_errors(key: str) -> None:
    with pytest.raises(AdapterError, match="is no part of an adapter of the kind LORA"):
        place_of(key, "lora", [], "file")
