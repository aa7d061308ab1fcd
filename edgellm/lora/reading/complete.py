"""Whether an adapter is whole, by its files alone: its values, and what its config speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgellm.errors import AdapterError, TensorError
from edgellm.lora.reading.peft_keys import LORA_BIAS, TOKENS
from edgellm.source.matching import listed
from edgellm.tensors import SLAB_BYTES, TensorRef, check_finite, rows_within

PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
MAGNITUDE = "lora_magnitude_vector"

_AGAIN = "the adapter is damaged or its config belongs to another; save it again, or fetch it again"


def check_lora(
    parts: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], where: str
) -> None:
    """Raise ``AdapterError`` for half a pair, and for parts that the config has or has not.

    Leaving such a part out would merge something else than was trained, and nobody would see it.
    """
    for name, found in parts.items():
        for pair in PAIRS:
            there = [part for part in pair if part in found]
            if len(there) == 1:
                missing = pair[1 - pair.index(there[0])]
                raise AdapterError(f"{where}: {name} has {there[0]} and no {missing}: {_AGAIN}")
        factors = any(part in found for pair in PAIRS for part in pair)
        if (MAGNITUDE in found) != bool(factors and config.get("use_dora")):
            raise AdapterError(
                f"{where}: {name} has {', '.join(found)}, and use_dora is "
                f"{config.get('use_dora', False)}: {_AGAIN}"
            )
    with_bias = [name for name, found in parts.items() if LORA_BIAS in found]
    if bool(with_bias) != bool(config.get("lora_bias")):
        raise AdapterError(
            f"{where}: lora_bias is {config.get('lora_bias', False)} and lora_B has a bias in "
            f"{len(with_bias)} places: {_AGAIN}"
        )
    tokens = [name for name, found in parts.items() if TOKENS in found]
    if bool(tokens) != (config.get("trainable_token_indices") is not None):
        raise AdapterError(
            f"{where}: trainable_token_indices is {config.get('trainable_token_indices')} and "
            f"trained rows of tokens are there for {len(tokens)} tables: {_AGAIN}"
        )


def untrained_modules(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """A note where the config speaks of modules for which the adapter holds nothing.

    Trainers have been known to drop ``lm_head`` or the embedding without a word.
    """
    modules = [f".{name.rpartition('.')[0]}." for name in names]
    lost = []
    for key in ("target_modules", "modules_to_save"):
        stated = config.get(key)
        for name in stated if isinstance(stated, list) else ():
            if not any(f".{name}." in module for module in modules):
                lost.append(f"{name} ({key})")
    if not lost:
        return ()
    return (
        f"the config speaks of {listed(sorted(lost))}, and the adapter holds nothing for it: if it "
        "was trained, it was not saved",
    )


def check_values(path: Path, ref: TensorRef) -> None:
    """Raise ``AdapterError`` for an empty tensor, NaN and Inf, and a type that is no float.

    ``path`` is for the message. Reads all of ``ref``, by slabs.
    """
    if not ref.size:
        raise AdapterError(
            f"{path}: {ref.name} has shape {list(ref.shape)}, no values at all: it was saved from "
            "shards (ZeRO-3, FSDP) that were not gathered; save it again from the whole model"
        )
    step = rows_within(SLAB_BYTES, ref.columns)
    for start in range(0, ref.rows, step):
        try:
            rows = ref.load(start, min(start + step, ref.rows))
            check_finite(rows, ref.name, first_row=start)
        except TensorError as error:
            raise AdapterError(f"{path}: {error}") from error
