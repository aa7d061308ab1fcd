"""What a merged Hugging Face folder holds beside its weights: config, tokenizer, code, a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import SourceError
from edgellm.lora.adapter import Adapter
from edgellm.lora.checkpoint_weights import text_config
from edgellm.manifest import MANIFEST
from edgellm.source.checkpoint import INDEX
from edgellm.source.pickles import PICKLES
from edgellm.tokenization.from_hf import TEMPLATE_FOLDER

CARD = "README.md"
CONFIG = "config.json"

LEFT_OUT = (".safetensors", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".index.json", *PICKLES)
"""Ends of names of weights in any form, and of what only goes with them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
)
"""Files that are one tokenizer: they are taken from one folder, or from another, together."""

LARGEST_FILE_BYTES = 256 << 20


def companion_files(
    folder: Path, tokenizer_folder: Path | None = None
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files of ``folder`` that a merged model needs too, and facts about those it lacks.

    Weights, the model card, hidden files and the manifest of an earlier merge stay behind, and so
    do folders, save that of chat templates. ``tokenizer_folder``: where the tokenizer is taken from
    instead. Raises ``SourceError`` for a file that cannot be read.
    """
    wanted = {path.name: path for path in _files_of(folder)}
    if tokenizer_folder is not None:
        theirs = _templates(tokenizer_folder) | {
            name: tokenizer_folder / name
            for name in TOKENIZER_FILES
            if (tokenizer_folder / name).is_file()
        }
        wanted = {name: path for name, path in wanted.items() if name not in TOKENIZER_FILES}
        wanted |= theirs
    else:
        wanted |= _templates(folder)
    notes = []
    folders = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != TEMPLATE_FOLDER
    )
    if folders:
        notes.append(f"not copied from the base: the folders {', '.join(folders)}")
    code = sorted(name for name in wanted if name.endswith(".py"))
    if code:
        notes.append(
            f"the base brings code of its own ({', '.join(code)}), which is copied: loading it "
            "needs trust_remote_code"
        )
    return {name: _content(path) for name, path in sorted(wanted.items())}, tuple(notes)


def _files_of(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (MANIFEST, CARD, INDEX)
        and not path.name.endswith(LEFT_OUT)
    ]


def _templates(folder: Path) -> dict[str, Path]:
    return {
        f"{TEMPLATE_FOLDER}/{path.name}": path
        for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")
    }


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise SourceError(
                f"{path} has {path.stat().st_size} bytes and belongs to no model that edgellm "
                "knows of: move it out of the folder"
            )
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def changed_config(content: bytes, changes: Mapping[str, Any]) -> bytes:
    """``config.json`` with ``changes`` made where they differ; as it was where none does.

    A key about the language model is changed inside ``text_config`` where the config has one.
    """
    config: dict[str, Any] = json.loads(content)
    inner = text_config(config)
    before = json.dumps(config)
    for key, value in changes.items():
        if (key in config or inner is config) and config.get(key) != value:
            config[key] = value
        if inner is not config and key in inner and isinstance(config["text_config"], dict):
            config["text_config"][key] = value
    if json.dumps(config) == before:
        return content
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def index_file(total_bytes: int, weight_map: Mapping[str, str]) -> bytes:
    """``model.safetensors.index.json``, as transformers writes it."""
    document = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def quantized_card(base: str, licence: str, grid: str, layout: str) -> bytes:
    """A model card of a folder whose weights were rounded to ``grid``; no ``layout`` for floats."""
    front = [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"]
    if licence:
        front.insert(0, f"license: {licence}")
    how = f"{grid}, stored as {layout}" if layout else grid
    said = f"{base} in {how}, by edgellm; manifest.json has the digests."
    return ("\n".join(["---", *front, "---", "", said]) + "\n").encode()


def card(base: str, licence: str, adapters: Sequence[Adapter]) -> bytes:
    """A model card that says what the folder is made of, in the terms of the Hub."""
    front = [f"base_model: {json.dumps(base)}", "base_model_relation: merge"]
    if licence:
        front.insert(0, f"license: {licence}")
    lines = [
        "---",
        *front,
        "---",
        "",
        f"{base} with adapters merged into its weights by edgellm; manifest.json has the digests:",
        "",
        *(f"- {adapter.name} ({adapter.kind}), weight {adapter.weight:g}" for adapter in adapters),
    ]
    return ("\n".join(lines) + "\n").encode()
