"""What comes with an adapter and tells how its base was stored while it was trained.

Names of bases, PEFT's and trainers' model cards, and the settings files of trainers. Texts other
than JSON are searched for lines ``key: value``, whether YAML or a list in Markdown, so that code
which shows how to run the model counts for nothing. ``training_args.bin`` is a pickle and is never
opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.lora.adapter import Adapter

FULL = "full"
CARD = "README.md"
CONFIG = "adapter_config.json"
SETTINGS_FILES = (
    "training_config.json",
    "training_args.json",
    "train_config.json",
    "finetune_config.json",
    "quantization_config.json",
)
PICKLED_SETTINGS = "training_args.bin"
MAX_BYTES = 1 << 20
"""Longer texts are no settings; of a card, what lies beyond is not read."""

NAMES = (
    (re.compile(r"bnb[-_]?4bit$"), "nf4-dq"),
    (re.compile(r"bnb[-_]?8bit$"), "int8"),
    (re.compile(r"[-_.]gptq\b"), "gptq"),
    (re.compile(r"[-_.]awq\b"), "awq"),
)
"""Ends of names of bases that are stored quantized. Unsloth's bnb-4bit ones are nf4 with double
quantization."""

UNSLOTH_DYNAMIC = re.compile(r"unsloth[-_]bnb[-_]?4bit$")

KEYS = (
    "load_in_4bit",
    "load_in_8bit",
    "quant_method",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "use_bnb_nested_quant",
    "double_quantization",
    "quantization_bit",
    "llm_int8_skip_modules",
    "adapter",
    "base_model",
    "model_name_or_path",
)
LINE = re.compile(rf"^[ \t>*\-]*[`\"']?_?({'|'.join(KEYS)})[`\"']?[ \t]*:(.*)$", re.MULTILINE)
"""A key and the rest of its line; no part of it can run on, so it takes time by length alone."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that was said.

    ``method`` is ``full``, a row of ``rounded_base.METHODS``, or the name of another (``gptq``),
    whose rounding cannot be repeated.

    ``where`` and ``says`` make the sentence "``where`` says ``says``". ``exact``: the settings were
    spelled out, not told from a name. ``skipped`` is ``llm_int8_skip_modules`` where it was set.
    """

    method: str
    where: str
    says: str
    exact: bool = True
    skipped: tuple[str, ...] | None = None

    @property
    def family(self) -> str:
        """``4bit`` for all of bitsandbytes' 4-bit types, which only details tell apart."""
        return "4bit" if self.method.startswith(("nf4", "fp4")) else self.method


def evidence(adapter: Adapter) -> list[Evidence]:
    """All that is said, the adapter's config first, then its card, then settings files."""
    found = list(_of_name(adapter.base_name, "adapter_config.json"))
    folder = adapter.path if adapter.path.is_dir() else None
    if folder is None:
        return found
    for path, where in _texts(folder):
        found += _of_texts(_settings(path), where)
    return found


def unread_settings(adapter: Adapter) -> str:
    """A word on the pickle that might say more, where there is one."""
    if adapter.path.is_dir() and (adapter.path / PICKLED_SETTINGS).exists():
        return f" ({PICKLED_SETTINGS} was not opened: it is a pickle)"
    return ""


def is_settings_file(name: str) -> bool:
    """Whether a file at the top of an adapter's folder may hold settings of its training."""
    return "/" not in name and (name.endswith((".yaml", ".yml")) or name in SETTINGS_FILES)


def is_unsloth_dynamic(name: str) -> bool:
    """Whether the base of that name has some layers left out, which only it knows."""
    return UNSLOTH_DYNAMIC.search(name.lower()) is not None


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    yield folder / CONFIG, CONFIG
    yield folder / CARD, "the adapter's model card"
    for name in sorted(path.name for path in folder.iterdir()):
        if is_settings_file(name):
            yield folder / name, name


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _of_name(name: str, where: str, key: str = "base_model_name_or_path") -> Iterator[Evidence]:
    for pattern, method in NAMES:
        if pattern.search(name.rstrip("/\\").lower()):
            yield Evidence(method, where, f"{key} {name}", exact=False)
            return


def _settings(path: Path) -> dict[str, str]:
    """What a text says of ``KEYS``; of one that it says twice, the first."""
    text = _read(path)
    said: dict[str, str] = {}
    pairs = _json_pairs(text) if path.suffix == ".json" else LINE.findall(text)
    for key, value in pairs:
        said.setdefault(key, value.strip().removesuffix(",").strip("`\"' \t"))
    return said


def _json_pairs(text: str) -> list[tuple[str, str]]:
    """Keys and values of a JSON text at any depth; nothing where it is damaged."""
    found: list[tuple[str, str]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        plain = ((key.removeprefix("_"), value) for key, value in pairs)
        found.extend((key, str(value)) for key, value in plain if key in KEYS)

    try:
        json.loads(text, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return []
    return found


def _of_texts(said: Mapping[str, str], where: str) -> Iterator[Evidence]:
    found = _of_settings(said, where)
    if found is not None:
        yield found
    for key in ("base_model", "model_name_or_path"):
        yield from _of_name(said.get(key, ""), where, key)


def _of_settings(said: Mapping[str, str], where: str) -> Evidence | None:
    method = said.get("quant_method", "").lower()
    if method not in ("", "none", "null", "bitsandbytes"):
        return Evidence(method, where, f"quant_method: {method}")
    skipped = _modules(said.get("llm_int8_skip_modules", ""))
    for key, value in (("load_in_4bit", "true"), ("quantization_bit", "4"), ("adapter", "qlora")):
        if said.get(key, "").lower() == value:
            return Evidence(_four_bit(said), where, f"{key}: {said[key]}", skipped=skipped)
    for key, value in (("load_in_8bit", "true"), ("quantization_bit", "8")):
        if said.get(key, "").lower() == value:
            return Evidence("int8", where, f"{key}: {said[key]}", skipped=skipped)
    if said.get("load_in_4bit", "").lower() == "false":
        return Evidence(FULL, where, "load_in_4bit: false")
    return None


def _four_bit(said: Mapping[str, str]) -> str:
    """The 4-bit type: ``BitsAndBytesConfig``'s defaults where its own keys are there, trainers'
    (axolotl, Unsloth, LLaMA-Factory: nf4, rounded twice) where only theirs are.
    """
    own = any(key.startswith("bnb_4bit") or key == "quant_method" for key in said)
    kind = said.get("bnb_4bit_quant_type", "fp4" if own else "nf4").lower()
    keys = ("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization")
    double = next((said[key] for key in keys if key in said), "false" if own else "true")
    return kind + ("-dq" if double.lower() == "true" else "")


def _modules(text: str) -> tuple[str, ...] | None:
    """The names in a list on one line; None where the key was left at its default."""
    return tuple(re.findall(r"[\w.]+", text)) if text.startswith("[") else None
