"""Where models come from: Hugging Face folders, GGUF files and Hub ids, opened by one function."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from edgellm.architectures.config import Config
from edgellm.architectures.rope_scaling import parse_scaling, rescaled_config
from edgellm.errors import SourceError, UsageError
from edgellm.progress import Progress, unwatched
from edgellm.source.model import ModelSource
from edgellm.source.pickles import PICKLES, refuse_pickle

__all__ = ["ModelSource", "open_source"]


def open_source(
    text: str,
    *,
    ignore_config_keys: Collection[str] = (),
    context: int | None = None,
    rope_scaling: str | None = None,
    quantized: bool = False,
    text_only: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = unwatched,
) -> ModelSource:
    """The model that ``text`` names: a folder, a GGUF file, or an id on the Hub.

    A Hub id is ``org/name``, with ``@revision`` and, in a repository of GGUF files, ``:file.gguf``
    behind it; what exists on disk goes first. Headers and the tokenizer are read, weights are not.
    ``context``: the context length that the model is wanted for, where its maths depends on it.
    ``rope_scaling``: a rope to describe it with, not its own (``rope_scaling.parse_scaling``).
    ``quantized``: take a folder whose weights are quantized already as the values that they stand
    for (a GGUF file always is). ``text_only``: of a folder whose model also sees, the language
    model (``source.text_part``). ``trust_remote_code``: Python that a folder brings may be run, to
    compare with. ``progress`` is told of a download. Raises ``SourceError``
    (``HubError``, ``TensorError``) for what is missing or damaged and ``UnsupportedModel`` for what
    is not understood.
    """
    if rope_scaling is not None:
        source = open_source(
            text,
            ignore_config_keys=ignore_config_keys,
            context=context,
            quantized=quantized,
            text_only=text_only,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        return _rescaled(source, rope_scaling, ignore_config_keys)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise SourceError(f"{text}: {error} Give the folder's whole path") from error
    if path.exists():
        return _open_path(
            path, ignore_config_keys, context, quantized, text_only, trust_remote_code
        )
    from edgellm.hub.download import download
    from edgellm.hub.ids import parse_hub_id
    from edgellm.hub.needed import needed_files_and_code

    wanted = None if text.startswith((".", "~")) else parse_hub_id(text)
    if wanted is None:
        raise SourceError(
            f"no file or folder {text}, and it does not read like a Hub id (org/name, "
            "org/name@revision, org/name:file.gguf): check the path"
        )
    needed = needed_files_and_code if trust_remote_code else None
    found = download(wanted, progress, needed=needed)
    source = _open_path(
        found.path, ignore_config_keys, context, quantized, text_only, trust_remote_code
    )
    return replace(
        source,
        name=wanted.repo,
        revision=found.revision,
        licence=found.licence or source.licence,
        url=wanted.url,
        notes=(*found.notes, *source.notes),
    )


def _rescaled(
    source: ModelSource, rope_scaling: str, ignore_config_keys: Collection[str]
) -> ModelSource:
    """``source`` with another rope, in its config and in the network that this describes."""
    asked = parse_scaling(rope_scaling)
    config, trained = rescaled_config(source.config, source.decoder, asked, source.name)
    decoder = source.family.describe(
        Config(config, ignore=ignore_config_keys, where=f"{source.name} with --rope-scaling")
    )
    return replace(
        source, config=config, decoder=decoder, notes=(*source.notes, asked.warning(trained))
    )


def _open_path(
    path: Path,
    ignore_config_keys: Collection[str],
    context: int | None,
    quantized: bool,
    text_only: bool,
    trust_remote_code: bool,
) -> ModelSource:
    from edgellm.source.checkpoint import open_folder
    from edgellm.source.gguf_model import open_gguf

    if path.is_dir():
        return open_folder(
            path,
            ignore_config_keys=ignore_config_keys,
            context=context,
            quantized=quantized,
            text_only=text_only,
            trust_remote_code=trust_remote_code,
        )
    if path.name.endswith(PICKLES):
        refuse_pickle(path)
    if path.suffix == ".safetensors" or path.name.endswith(".json"):
        raise SourceError(f"{path} is one file of a model: give its folder, {path.parent}")
    if text_only:
        raise UsageError(f"--text-only is for folders: {path} is a GGUF file, whose model is text")
    return open_gguf(path, ignore_config_keys=ignore_config_keys, context=context)
