"""Reading the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.json_file import read_json
from edgellm.manifest import GENAI_CONFIG
from edgellm.tokenization.tokenizer import SPECIAL_NAMES, Settings, Tokenizer, surroundings

# What travels with a model, beside tokenizer.json.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATE_FOLDER = "additional_chat_templates"
# Tokenizers that tokenizer.json replaced, by the file that gives them away.
_OLDER_KINDS = {
    "tokenizer.model": "a SentencePiece model",
    "spiece.model": "a SentencePiece model",
    "tekken.json": "a tekken vocabulary",
    "vocab.json": "GPT-2's vocab.json and merges.txt",
    "vocab.txt": "a WordPiece vocabulary",
    "qwen.tiktoken": "a tiktoken vocabulary",
    "tiktoken.model": "a tiktoken vocabulary",
}


def read(folder: Path) -> Tokenizer:
    """The tokenizer of ``folder``: see ``Tokenizer.from_hf_folder``."""
    path = folder / "tokenizer.json"
    if path.is_file():
        files = {"tokenizer.json": _bytes(path)}
        backend = parse(files["tokenizer.json"], str(path))
    else:
        backend = _from_vocabulary(folder)
        files = {"tokenizer.json": backend.to_str(pretty=True).encode()}
    for name in _COMPANIONS:
        if (folder / name).is_file():
            files[name] = _bytes(folder / name)
    for extra in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        files[f"{TEMPLATE_FOLDER}/{extra.name}"] = _bytes(extra)

    config = {
        **_json_object(folder / "special_tokens_map.json"),
        **_json_object(folder / "tokenizer_config.json"),
    }
    model = _json_object(folder / "config.json")
    inner = model.get("text_config")
    model = {**(inner if isinstance(inner, dict) else {}), **model}
    generation = _json_object(folder / "generation_config.json")

    if _add_missing(backend, config, folder):
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
    built = _json_object(folder / GENAI_CONFIG).get("model")
    said = (generation, model, built if isinstance(built, dict) else {})
    eos += next(filter(None, (_ids(each.get("eos_token_id")) for each in said)), [])
    settings = Settings(
        special_ids=special_ids,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat_templates=_chat_templates(folder, config),
    )
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


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of an older kind that can be built here; raises what ``_missing`` says."""
    from edgellm.tokenization.from_vocab import build, can_build

    if not can_build(folder, _json_object(folder / "config.json")):
        raise _missing(folder)
    return build(folder, _json_object(folder / "tokenizer_config.json"))


def _missing(folder: Path) -> SourceError | UnsupportedTokenizer:
    way_out = (
        "with transformers and sentencepiece installed, "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one"
    )
    for name, kind in _OLDER_KINDS.items():
        if (folder / name).is_file():
            return UnsupportedTokenizer(
                f"{folder} holds its tokenizer as {kind} ({name}) and has no tokenizer.json, "
                f"which edgellm reads: {way_out}"
            )
    return SourceError(
        f"{folder} has no tokenizer: tokenizer.json is missing. Fetch the model's tokenizer files "
        f"again; from an older kind of tokenizer, {way_out}"
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str | None:
    """A token as configs write it: its text, or an object with ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> bool:
    """Add the tokens that only tokenizer_config.json knows, as transformers does; whether any."""
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
        raise SourceError(
            f"{folder}: added_tokens_decoder in tokenizer_config.json is not an object of tokens "
            "by their ids: fetch it again"
        )
    added = False
    for key, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        text = _text(token)
        if text is None:
            continue
        token = token if isinstance(token, Mapping) else {}
        if backend.token_to_id(text) is None:
            backend.add_tokens(
                [
                    tokenizers.AddedToken(
                        text,
                        single_word=bool(token.get("single_word")),
                        lstrip=bool(token.get("lstrip")),
                        rstrip=bool(token.get("rstrip")),
                        normalized=bool(token.get("normalized")),
                        special=bool(token.get("special")),
                    )
                ]
            )
            added = True
        if backend.token_to_id(text) != int(key):
            raise SourceError(
                f"{folder}: tokenizer_config.json gives the token {text!r} the id {key}, "
                f"tokenizer.json gives it {backend.token_to_id(text)}"
            )
    return added


def _special_ids(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, int]:
    """Ids by name, from the tokenizer's config and, failing that, the model's."""
    ids: dict[str, int] = {}
    for name in SPECIAL_NAMES:
        text = _text(config.get(f"{name}_token"))
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
