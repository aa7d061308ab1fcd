"""Whether what a recipe names is an encoder, known before the rest of it is looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgellm.progress import Progress, unwatched
from edgellm.recipe import Recipe
from edgellm.source.encoder_folder import holds_encoder, open_encoder_folder
from edgellm.source.encoder_model import EncoderSource


def find_encoder(recipe: Recipe, *, progress: Progress = unwatched) -> EncoderSource | None:
    """The encoder that ``recipe.source`` names, a folder or an id on the Hub; None for others.

    What is no encoder is left to ``open_source``, with all that is wrong with it. ``progress`` is
    told of a download. Raises ``SourceError`` for an encoder that is damaged and
    ``UnsupportedModel`` for one that is not understood.
    """
    try:
        path = Path(recipe.source).expanduser()
    except RuntimeError:  # ~name of nobody
        return None
    if path.exists():
        return _opened(path, recipe)
    from edgellm.source.hub import download, parse_hub_id

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


def _opened(path: Path, recipe: Recipe) -> EncoderSource | None:
    if not path.is_dir() or not holds_encoder(path):
        return None
    return open_encoder_folder(path, ignore_config_keys=recipe.ignore_config_keys)
