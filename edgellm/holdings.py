"""The models of this machine: what the Hub's cache holds, and what edgellm made; by name too."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import msgspec

from edgellm.errors import UsageError
from edgellm.hub.cached import Cache, Removal, read_cache, removal_of
from edgellm.hub.ids import parse_hub_id
from edgellm.made import Made, check_removable, made_artifacts, remove_artifact


class Holdings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``edgellm models --json`` shows."""

    cache: Cache
    artifacts: tuple[Made, ...]


def holdings(folders: Sequence[Path] = ()) -> Holdings:
    """All models of this machine that are known of, and the artifacts in ``folders``."""
    return Holdings(cache=read_cache(), artifacts=made_artifacts(folders))


def find_removal(name: str, folders: Sequence[Path] = ()) -> Removal:
    """How the model ``name`` is deleted: an artifact by its path or folder's name, or one of the
    Hub's cache by ``org/name`` or ``org/name@revision``.

    Raises ``UsageError`` where nothing or more than one has that name, and what ``remove_artifact``
    and ``removal_of`` raise.
    """
    path = Path(name).expanduser()
    hub_id = None if name.startswith((".", "~", "/")) else parse_hub_id(name)
    if hub_id is not None and hub_id.file is not None:
        raise UsageError(
            f"{name} is one file of a model, and models are removed whole: name {hub_id.repo}"
        )
    cached = removal_of(hub_id) if hub_id is not None else None
    here = [path] if path.is_dir() or path.is_symlink() else []
    if not here and cached is None:
        here = [made.path for made in made_artifacts(folders) if made.name == name]
    if cached is not None and here:
        raise UsageError(
            f"{name} is in the Hub's cache and a folder here: ./{name} names the folder; the one "
            "in the cache can be named from another folder"
        )
    if len(here) > 1:
        paths = " or ".join(str(each) for each in here)
        raise UsageError(f"there are {len(here)} artifacts of the name {name}: name {paths}")
    if cached is not None:
        return cached
    if not here:
        raise UsageError(_nothing(name, folders))
    return _artifact(here[0])


def _artifact(path: Path) -> Removal:
    manifest = check_removable(path)
    nbytes = sum(entry.nbytes for entry in manifest.artifact.files)
    return Removal(f"the artifact {path}", nbytes, lambda: remove_artifact(path))


def _nothing(name: str, folders: Sequence[Path]) -> str:
    known = holdings(folders)
    names = [*(model.repo for model in known.cache.models), *(a.name for a in known.artifacts)]
    near = get_close_matches(name, names)
    meant = f"did you mean {shlex.join(near)}?" if near else "`edgellm models` lists them"
    return f"no model {name}, neither in the Hub's cache nor made here: {meant}"
