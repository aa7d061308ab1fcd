"""Suggestions for sampling and ends of an answer, between generation_config.json and GGUF."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgellm.errors import SourceError
from edgellm.generation_defaults import generation_from_gguf, sampling_keys

SUGGESTED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.05,
}


def test_suggestions_come_back() -> None:
    keys = sampling_keys({**SUGGESTED, "eos_token_id": [2, 7], "transformers_version": "5"})
    assert keys == {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.05,
    }
    # As a GGUF file holds them.
    stored = {key: np.float32(v).item() if isinstance(v, float) else v for key, v in keys.items()}
    assert stored != keys
    assert generation_from_gguf(stored, (2, 7)) == {"eos_token_id": [2, 7], **SUGGESTED}


def test_a_whole_temperature_stays_a_fraction() -> None:
    keys = sampling_keys({"do_sample": True, "temperature": 1})
    assert isinstance(keys["general.sampling.temp"], float)


@pytest.mark.parametrize(
    "generation", [{}, {"temperature": 0.6}, {**SUGGESTED, "do_sample": False}]
)
def test_a_model_that_decodes_greedily_suggests_nothing(generation: dict[str, Any]) -> None:
    assert sampling_keys(generation) == {}


@pytest.mark.parametrize(
    ("ends", "expected"), [((), {}), ((2,), {}), ((2, 7), {"eos_token_id": [2, 7]})]
)
def test_ends_are_said_where_the_tokenizer_cannot(
    ends: tuple[int, ...], expected: dict[str, Any]
) -> None:
    assert generation_from_gguf({}, ends) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("top_k", True), ("top_p", float("nan")), ("top_k", -1)],
)
def test_what_is_no_number_is_named(name: str, value: Any) -> None:
    with pytest.raises(SourceError, match=rf"generation_config\.json: {name} is"):
        sampling_keys({"do_sample": True, name: value})
