"""Whether what a recipe names is an encoder, alone or with a decoder, known before the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgellm.architectures.encoders import is_seq2seq
from edgellm.json_file import read_json
from edgellm.progress import Progress, unwatched
from edgellm.recipe import Recipe
from edgellm.source.encoder_folder import holds_encoder, open_encoder_folder
from edgellm.source.encoder_model import EncoderSource, Seq2SeqSource

Found = EncoderSource | Seq2SeqSource


def find_encoder(recipe: Recipe, *, progress: Progress = unwatched) -> Found | None:
    """The encoder, alone or with a decoder, that ``recipe.source`` names; None for others.

    It is a folder, or an id on the Hub. What is no encoder is left to ``open_source``, with all
    that is wrong with it. ``progress`` is told of a download. Raises ``SourceError`` for an encoder
    that is damaged and ``UnsupportedModel`` for one that is not understood.
    """
    try:
        path = Path(recipe.source).expanduser()
    except RuntimeError:  # ~name of nobody
        return None
    if path.exists():
        return _opened(path, recipe)
    from edgellm.hub.download import download
    from edgellm.hub.ids import parse_hub_id

    wanted = None if recipe.source.startswith((".", "~")) else parse_hub_id(recipe.source)
    if wanted is None or wanted.file is not None:
        return None
    from edgellm.plan import resolve

    resolve(recipe)  # before a download, what is wrong with the options
    found = download(wanted, progress)
    source = _opened(found.path, recipe)
    if source is None:
        return None
    return replace(
        source,
        name=wanted.repo,
        revision=found.revision,
        licence=found.licence or source.licence,
        url=wanted.url,
        notes=(*found.notes, *source.notes),
    )


def _opened(path: Path, recipe: Recipe) -> Found | None:
    if not path.is_dir():
        return None
    keys = recipe.ignore_config_keys
    if holds_encoder(path):
        return open_encoder_folder(path, ignore_config_keys=keys)
    config = path / "config.json"
    if not config.is_file() or not is_seq2seq(read_json(config)):
        return None
    from edgellm.source.seq2seq_folder import open_seq2seq_folder

    return open_seq2seq_folder(path, ignore_config_keys=keys)
