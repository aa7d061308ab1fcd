"""Reading the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from edgellm.artifact import GENAI_CONFIG
from edgellm.errors import SourceError
from edgellm.json_file import read_json
from edgellm.tokenization import marian, slow_files
from edgellm.tokenization.added_tokens import add_missing, token_text
from edgellm.tokenization.languages import mark
from edgellm.tokenization.to_hf import files as written
from edgellm.tokenization.tokenizer import (
    SPECIAL_NAMES,
    Settings,
    Tokenizer,
    add_surroundings,
    surroundings,
)

# What travels with a model, beside tokenizer.json.
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE)
# Where a model that also sees may have its template, in the order in which a processor reads them.
_PROCESSORS = ("processor_config.json", "chat_template.json")


def read(
    folder: Path,
    *,
    backend: tokenizers.Tokenizer | None = None,
    said: Mapping[str, Any] | None = None,
    around: tuple[Sequence[int], Sequence[int]] | None = None,
    older: bool = False,
) -> Tokenizer:
    """The tokenizer of ``folder``: see ``Tokenizer.from_hf_folder``.

    Of one whose Python says more: its ``backend`` in place of the files, what it ``said`` of itself
    in the words of its config, the ids ``around`` a text. ``older``: a tokenizer.json is not read.
    """
    config: Mapping[str, Any] = {
        **_json_object(folder / "special_tokens_map.json"),
        **_json_object(folder / "tokenizer_config.json"),
        **(said or {}),
    }
    model = _json_object(folder / "config.json")
    inner = model.get("text_config")
    model = {**(inner if isinstance(inner, dict) else {}), **model}
    ends = _ends(folder, model)
    if backend is None and (folder / marian.PIECES).is_file():
        return marian.read(folder, config, ends, _companions(folder))
    path = folder / "tokenizer.json"
    files: dict[str, bytes] = {}
    if backend is None and path.is_file() and not older:
        files["tokenizer.json"] = _bytes(path)
        backend = parse(files["tokenizer.json"], str(path))
    elif backend is None:
        built = slow_files.read(folder, config, model)
        if built is None:
            raise SourceError(
                f"{folder} has no tokenizer: tokenizer.json is missing. Fetch the model's "
                f"tokenizer files again; from an older kind of tokenizer, {slow_files.WAY_OUT}"
            )
        backend, config = built.backend, built.config
    changed = add_missing(backend, config, folder)
    if (mark(backend, config) or changed) and files:
        files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    special_ids = _special_ids(backend, config, model)
    # The post-processor alone: with a tokenizer.json, transformers 5 reads neither add_bos_token
    # nor add_eos_token of the config.
    backend.no_padding()  # that of its training, which sentence-transformers leaves in
    backend.no_truncation()
    if around is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing("$A", "$A $B", [])
        add_surroundings(backend, *around)
    prefix, suffix = surroundings(backend)
    eos: list[int] = [special_ids["eos"]] if "eos" in special_ids else []
    eos += ends
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
    files |= _companions(folder) | _settled_templates(folder, settings.chat_templates)
    return Tokenizer(backend, settings, source_files=files)


def _companions(folder: Path) -> dict[str, bytes]:
    """What travels with a tokenizer, by its name."""
    paths = [folder / name for name in _COMPANIONS if (folder / name).is_file()]
    found = {path.name: _bytes(path) for path in paths}
    for extra in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[f"{TEMPLATE_FOLDER}/{extra.name}"] = _bytes(extra)
    return found


def _ends(folder: Path, model: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer, by the generation config.

    As transformers: the model's config speaks where there is no generation config. Folders of
    onnxruntime-genai's builder have neither.
    """
    inside = _json_object(folder / GENAI_CONFIG).get("model")
    generation = _json_object(folder / "generation_config.json")
    said = (generation, model, inside if isinstance(inside, dict) else {})
    return tuple(next(filter(None, (_ids(each.get("eos_token_id")) for each in said)), []))


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
    """Templates by name, in transformers' order.

    chat_template.jinja and the folder beside it, alone where either is there; else those in
    tokenizer_config.json; else what a processor reads, processor_config.json before
    chat_template.json.
    """
    extras = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    templates = {extra.stem: _decoded(extra) for extra in extras}
    alone = folder / TEMPLATE_FILE
    if alone.is_file():
        templates["default"] = _decoded(alone)
    if templates:
        return templates
    inside = config.get("chat_template")
    if isinstance(inside, str):
        return {"default": inside}
    if isinstance(inside, list):
        return {
            str(entry["name"]): str(entry["template"])
            for entry in inside
            if isinstance(entry, dict) and "name" in entry and "template" in entry
        }
    for name in _PROCESSORS:
        said = _json_object(folder / name).get("chat_template")
        if isinstance(said, str):
            return {"default": said}
    return {}


def _settled_templates(folder: Path, templates: Mapping[str, str]) -> dict[str, bytes]:
    """The file in which a tokenizer's reader finds ``templates`` that only a processor reads."""
    files = [folder / name for name in _PROCESSORS if (folder / name).is_file()]
    said = [_json_object(path).get("chat_template") for path in files]
    default = templates.get("default")
    if len(templates) != 1 or default not in said or (folder / TEMPLATE_FILE).is_file():
        return {}
    return {TEMPLATE_FILE: default.encode()} if default else {}


def _decoded(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error}") from error
