"""Adapters opened from wherever they are: a PEFT folder, a GGUF file, a Hub id."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from edgellm.errors import AdapterError, SourceError
from edgellm.lora.adapter import Adapter, AdapterSpec, Parts, parse_spec
from edgellm.lora.reading.complete import check_lora, check_values, untrained_modules
from edgellm.lora.reading.peft_config import CONFIG, read_config
from edgellm.lora.reading.peft_keys import Place, places
from edgellm.progress import Progress, unwatched
from edgellm.source.matching import listed
from edgellm.source.pickles import PICKLES
from edgellm.source.safetensors_file import SafetensorsFile, read_safetensors
from edgellm.tensors import TensorRef

WEIGHTS = "adapter_model.safetensors"
TOKENS_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of them holds the tokens themselves, so a folder with one brings a tokenizer of its own."""


def open_adapter(
    spec: AdapterSpec | str,
    *,
    ignore_config_keys: Collection[str] = (),
    progress: Progress = unwatched,
) -> Adapter:
    """The adapter that ``spec`` names, checked by itself; what exists on disk goes first.

    A text is read by ``parse_spec``. A Hub id is ``org/name[@revision]``, with ``:file.gguf``
    behind it for a GGUF adapter. All of its values are looked at once, since one NaN would spread
    over whole rows; nothing is applied. ``ignore_config_keys``: unknown keys of its config that
    the user vouches for. Raises ``AdapterError`` for what is missing, damaged or cannot be merged,
    ``HubError`` where the Hub could not give it.
    """
    if isinstance(spec, str):
        spec = parse_spec(spec)
    try:
        path = Path(spec.path).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise AdapterError(f"{spec.path}: {error} Give the folder's whole path") from error
    if path.exists():
        adapter = _open_path(path, ignore_config_keys)
    else:
        adapter = _open_from_hub(spec.path, ignore_config_keys, progress)
    return replace(adapter, weight=spec.weight)


def _open_from_hub(text: str, ignore_config_keys: Collection[str], progress: Progress) -> Adapter:
    from edgellm.hub.download import download
    from edgellm.hub.ids import parse_hub_id
    from edgellm.hub.needed import needed_adapter_files

    wanted = None if text.startswith((".", "~")) else parse_hub_id(text)
    if wanted is None:
        raise AdapterError(
            f"no adapter {text}: there is no such file or folder, and it does not read like a Hub "
            "id (org/name, org/name@revision): check the path"
        )
    found = download(wanted, progress, needed=needed_adapter_files)
    adapter = _open_path(found.path, ignore_config_keys)
    return replace(
        adapter,
        name=wanted.repo,
        revision=found.revision,
        notes=(*found.notes, *adapter.notes),
    )


def _open_path(path: Path, ignore_config_keys: Collection[str]) -> Adapter:
    if path.is_dir():
        return _open_folder(path, ignore_config_keys)
    if path.name.endswith(".gguf"):
        from edgellm.lora.reading.gguf_adapter import open_gguf_adapter

        return open_gguf_adapter(path)
    if path.name.endswith(PICKLES):
        _refuse_pickle(path)
    raise AdapterError(
        f"{path} is neither a folder that PEFT wrote nor a GGUF adapter: give the folder that "
        f"holds {CONFIG} and {WEIGHTS}"
    )


def _open_folder(folder: Path, ignore_config_keys: Collection[str]) -> Adapter:
    if not (folder / CONFIG).exists():
        _refuse_other_folders(folder)
    config, notes = read_config(folder, ignore=ignore_config_keys)
    file = _weights(folder)
    kind = str(config["peft_type"]).lower()
    found = places(file.tensors, kind, config, str(file.path))
    if not found:
        raise AdapterError(f"{file.path} holds no tensors of an adapter: save it again")
    refs = {key: file.ref(key) for key in found}
    for ref in refs.values():
        if ref.size or kind != "adalora":  # which leaves some layers without a rank
            check_values(file.path, ref)
    parts = _by_weight(found, refs)
    if kind == "lora":
        check_lora(parts, config, str(file.path))
    names = [place.name for place in found.values() if place.name]
    has_tokenizer = any((folder / name).exists() for name in TOKENS_FILES)
    return Adapter(
        name=folder.resolve().name,
        path=folder,
        kind=kind,
        config=config,
        parts=parts,
        files=(folder / CONFIG, file.path),
        replaced={place.name: refs[key] for key, place in found.items() if not place.part},
        tokenizer_folder=folder if has_tokenizer else None,
        base_name=str(config.get("base_model_name_or_path") or ""),
        base_revision=str(config.get("revision") or ""),
        notes=(*notes, *untrained_modules(config, names)),
    )


def _by_weight(found: dict[str, Place], refs: dict[str, TensorRef]) -> dict[str, Parts]:
    """Parts by the weight that they change; those that serve all weights are given to each."""
    shared = {place.part: refs[key] for key, place in found.items() if not place.name}
    parts: dict[str, dict[str, TensorRef]] = {}
    for key, place in found.items():
        if place.part and place.name:
            parts.setdefault(place.name, {})[place.part] = refs[key]
    return {name: {**own, **shared} for name, own in parts.items()}


def _weights(folder: Path) -> SafetensorsFile:
    path = folder / WEIGHTS
    if path.exists():
        try:
            return read_safetensors(path)
        except SourceError as error:
            raise AdapterError(str(error)) from error
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickles = [name for name in files if name.endswith(PICKLES) and name.startswith("adapter")]
    if pickles:
        _refuse_pickle(folder / pickles[0])
    others = [name for name in files if name.endswith(".safetensors")]
    there = f"; it holds {listed(others)}, which PEFT does not write" if others else ""
    raise AdapterError(
        f"{folder} has {CONFIG} and no {WEIGHTS}{there}: give the folder that PEFT's "
        "save_pretrained wrote, or fetch that file too"
    )


def _refuse_pickle(path: Path) -> None:
    raise AdapterError(
        f"{path} is a pickle, which can run any code when it is read, so edgellm does not read it. "
        "Where you trust it, save the adapter again with PEFT: PeftModel.from_pretrained(base, "
        "folder).save_pretrained(new_folder, safe_serialization=True)"
    )


def _refuse_other_folders(folder: Path) -> None:
    """Say what a folder without an adapter's config is, where that can be told."""
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if inner:
        raise AdapterError(
            f"{folder} holds {len(inner)} adapters in folders of their own ({listed(inner)}): name "
            f"one, such as {folder / inner[0]}"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        raise AdapterError(
            f"{folder} holds GGUF files: name the adapter by its file, such as {folder / ggufs[0]}"
        )
    if (folder / "config.json").exists():
        raise AdapterError(
            f"{folder} is a model, not an adapter: it has config.json and no {CONFIG}; to convert "
            "it, give it as the base"
        )
