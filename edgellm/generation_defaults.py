"""What a model suggests for sampling and ending answers: generation_config.json's keys and GGUF's.

A GGUF file keeps suggestions under ``general.sampling.*``, which llama.cpp's programs take where
the user says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.artifact import GENAI_CONFIG
from edgellm.errors import SourceError
from edgellm.json_file import read_json

_PREFIX = "general.sampling."
# By the name in generation_config.json: GGUF's, and what the number is there.
_SAMPLING: dict[str, tuple[str, type[int] | type[float]]] = {
    "temperature": ("temp", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}


def sampling_keys(generation: Mapping[str, Any]) -> dict[str, int | float]:
    """The GGUF keys for the sampling that ``generation`` suggests, none for a model without.

    A model that does not ask for sampling (``do_sample``) gets none: there transformers decodes
    greedily, whatever temperature stands beside. Raises ``SourceError`` for what is no number.
    """
    keys: dict[str, int | float] = {}
    if not generation.get("do_sample"):
        return keys
    for name, (key, kind) in _SAMPLING.items():
        value = generation.get(name)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise SourceError(
                f"generation_config.json: {name} is {value!r}, expected a number: correct the "
                "file, or leave the line out"
            )
        if value < 0:
            raise SourceError(
                f"generation_config.json: {name} is {value!r}, expected 0 or more: correct the "
                "file, or leave the line out"
            )
        keys[_PREFIX + key] = kind(value)
    return keys


def generation_from_gguf(
    metadata: Mapping[str, Any], eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """A ``generation_config.json`` for a GGUF file: where answers end, and how to sample.

    Empty where that says nothing that the tokenizer does not: one end and no sampling.
    """
    sampling = {
        # By way of text: the file's 0.6 is a float32, and not the 0.6 that was written.
        name: kind(str(np.float32(metadata[_PREFIX + key]))) if kind is float
        else kind(metadata[_PREFIX + key])
        for name, (key, kind) in _SAMPLING.items()
        if _PREFIX + key in metadata
    }  # fmt: skip
    if len(eos_token_ids) < 2 and not sampling:
        return {}
    found: dict[str, Any] = {}
    if eos_token_ids:
        found["eos_token_id"] = eos_token_ids[0] if len(eos_token_ids) == 1 else [*eos_token_ids]
    if sampling:
        found["do_sample"] = True
    return {**found, **sampling}


def lost_suggestions(
    generation: Mapping[str, Any], main_file: Path, container: str
) -> tuple[str, ...]:
    """Sentences on what ``generation`` suggests for sampling, and the artifact says otherwise.

    ``main_file`` and ``container`` are the artifact's. Of numbers that its files round (GGUF's are
    float32) the rounded ones are expected. Raises ``SourceError`` as ``sampling_keys`` does.
    """
    wanted = sampling_keys(generation)
    lost = []
    for where, found in _carried(main_file, container).items():
        for name, (key, _) in _SAMPLING.items():
            ours, theirs = wanted.get(_PREFIX + key), found.get(_PREFIX + key)
            if _alike(ours, theirs) or (where == GENAI_CONFIG and (ours is None or name in UNSAID)):
                continue
            said = "no such suggestion" if theirs is None else f"{name} {theirs}"
            asked = "suggests none" if ours is None else f"suggests {name} {ours}"
            lost.append(f"for sampling the source {asked}, and the artifact's {where} has {said}")
    return tuple(lost)


UNSAID = frozenset({"min_p"})
"""What onnxruntime-genai's file has no room for; where nothing is suggested it has its defaults."""


def _carried(main_file: Path, container: str) -> dict[str, dict[str, int | float]]:
    """The sampling that an artifact suggests, in GGUF's words, by the file that does."""
    if container == "gguf":
        from edgellm.source.gguf_file import read_gguf_model

        metadata = read_gguf_model(main_file).metadata
        keys = (_PREFIX + key for key, _ in _SAMPLING.values())
        return {main_file.name: {key: metadata[key] for key in keys if key in metadata}}
    folder = main_file.parent
    path = folder / "generation_config.json"
    found = {path.name: sampling_keys(read_json(path) if path.is_file() else {})}
    genai = folder / GENAI_CONFIG
    if genai.is_file():
        found[genai.name] = sampling_keys(read_json(genai).get("search") or {})
    return found


def _alike(ours: float | None, theirs: float | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return bool(np.float32(ours) == np.float32(theirs))
