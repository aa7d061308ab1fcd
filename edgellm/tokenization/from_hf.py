"""Reading the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from edgellm.errors import SourceError
from edgellm.json_file import read_json
from edgellm.manifest import GENAI_CONFIG
from edgellm.tokenization import slow_files
from edgellm.tokenization.added_tokens import add_missing, token_text
from edgellm.tokenization.to_hf import files as written
from edgellm.tokenization.tokenizer import SPECIAL_NAMES, Settings, Tokenizer, surroundings

# What travels with a model, beside tokenizer.json.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATE_FOLDER = "additional_chat_templates"


def read(folder: Path) -> Tokenizer:
    """The tokenizer of ``folder``: see ``Tokenizer.from_hf_folder``."""
    config: Mapping[str, Any] = {
        **_json_object(folder / "special_tokens_map.json"),
        **_json_object(folder / "tokenizer_config.json"),
    }
    model = _json_object(folder / "config.json")
    inner = model.get("text_config")
    model = {**(inner if isinstance(inner, dict) else {}), **model}
    generation = _json_object(folder / "generation_config.json")

    path = folder / "tokenizer.json"
    files: dict[str, bytes] = {}
    if path.is_file():
        files["tokenizer.json"] = _bytes(path)
        backend = parse(files["tokenizer.json"], str(path))
    else:
        built = slow_files.read(folder, config, model)
        if built is None:
            raise SourceError(
                f"{folder} has no tokenizer: tokenizer.json is missing. Fetch the model's "
                f"tokenizer files again; from an older kind of tokenizer, {slow_files.WAY_OUT}"
            )
        backend, config = built.backend, built.config
    if add_missing(backend, config, folder) and files:
        files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    special_ids = _special_ids(backend, config, model)
    # The post-processor alone: with a tokenizer.json, transformers 5 reads neither add_bos_token
    # nor add_eos_token of the config.
    backend.no_padding()  # that of its training, which sentence-transformers leaves in
    backend.no_truncation()
    prefix, suffix = surroundings(backend)
    eos: list[int] = [special_ids["eos"]] if "eos" in special_ids else []
    # As transformers: the model's config speaks where there is no generation config. Folders of
    # onnxruntime-genai's builder have neither.
    inside = _json_object(folder / GENAI_CONFIG).get("model")
    said = (generation, model, inside if isinstance(inside, dict) else {})
    eos += next(filter(None, (_ids(each.get("eos_token_id")) for each in said)), [])
    settings = Settings(
        special_ids=special_ids,
        # Configs also name ids that have no token: no model answers with those.
        eos_token_ids=tuple(
            token_id for token_id in dict.fromkeys(eos) if backend.id_to_token(token_id) is not None
        ),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat_templates=_chat_templates(folder, config),
    )
    if not files:
        # Not the older files: beside a tokenizer.json, readers would take rules from them again.
        files = written(Tokenizer(backend, settings))
        return Tokenizer(backend, settings, source_files=files)
    for name in _COMPANIONS:
        if (folder / name).is_file():
            files[name] = _bytes(folder / name)
    for extra in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        files[f"{TEMPLATE_FOLDER}/{extra.name}"] = _bytes(extra)
    return Tokenizer(backend, settings, source_files=files)


def parse(data: bytes, where: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes; raises ``SourceError`` when it is damaged."""
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:
        # The library raises bare ``Exception`` for whatever it cannot read, and nothing narrower.
        if type(error) not in (Exception, ValueError):
            raise
        raise SourceError(
            f"{where} cannot be read: {error}; it may be cut short, or written for a newer version "
            f"of the tokenizers library than the installed {tokenizers.__version__}"
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def _special_ids(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, int]:
    """Ids by name, from the tokenizer's config and, failing that, the model's."""
    ids: dict[str, int] = {}
    for name in SPECIAL_NAMES:
        text = token_text(config.get(f"{name}_token"))
        found = backend.token_to_id(text) if text is not None else None
        if found is None:
            found = next(iter(_ids(model.get(f"{name}_token_id"))), None)
        if found is not None and backend.id_to_token(found) is not None:
            ids[name] = found
    return ids


def _ids(value: Any) -> list[int]:
    """Token ids of a config: none, one, or a list."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: chat_template.jinja and its folder first, else those in the config."""
    templates: dict[str, str] = {}
    inside = config.get("chat_template")
    if isinstance(inside, str):
        templates["default"] = inside
    elif isinstance(inside, list):
        for entry in inside:
            if isinstance(entry, dict) and "name" in entry and "template" in entry:
                templates[str(entry["name"])] = str(entry["template"])
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        templates = {"default": _decoded(alone)}
        for extra in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
            templates[extra.stem] = _decoded(extra)
    return templates


def _decoded(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error}") from error
