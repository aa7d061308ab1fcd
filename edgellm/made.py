"""Which artifacts were made on this machine, and how one is removed.

Artifacts lie wherever ``--out`` said, so each conversion leaves a note of its place in the user's
data folder: one small file for each, so that conversions side by side cannot spoil each other's. A
note is a hint and no more: what is shown is read from the artifact's own manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edgellm.errors import EdgeError, OutputError, SourceError, UsageError
from edgellm.manifest import MANIFEST, AdapterEntry, Base, KeptEntry, Manifest, read_manifest

CARD = "README.md"
"""The model card; no manifest has its digest, because people go on writing it."""

OUR_CARD = "by edgellm"
"""What the model cards of our folders say, and a person's own text hardly does."""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact on this machine: where it lies, and what its manifest says.

    ``adapters`` are merged into it, oldest first. ``fault``: what is wrong at first sight (a file
    that is missing or has another size); ``verify`` reads every byte.
    """

    name: str
    path: Path
    nbytes: int = 0
    sha256: str = ""
    container: str = ""
    quant: str = ""
    base: Base | None = None
    adapters: tuple[AdapterEntry, ...] = ()
    kept_adapters: tuple[KeptEntry, ...] = ()
    created_unix_s: int | None = None
    fault: str = ""


def note_made(out: Path) -> None:
    """Remember that there is an artifact at ``out``.

    A home that cannot be written costs the listing, not the artifact.
    """
    place = _notes_folder()
    if place is None:
        return
    path = out.resolve()
    note = place / _key(path)
    partial = note.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(msgspec.json.encode({"path": str(path)}))
            partial.replace(note)
        except OSError:
            partial.unlink(missing_ok=True)


def made_artifacts(folders: Sequence[Path] = ()) -> tuple[Made, ...]:
    """The artifacts that were made here and still exist, and those in ``folders``, by name.

    A folder may be an artifact or hold some. Raises ``SourceError`` for one that does not exist.
    """
    found = {path: _looked_at(path) for path in _noted()}
    for folder in folders:
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder: give one that holds artifacts")
        for place in (folder, *sorted(folder.iterdir())):
            if (place / MANIFEST).is_file() and _is_ours(place):
                found[place.resolve()] = _looked_at(place.resolve())
    return tuple(sorted(found.values(), key=lambda each: (each.name, each.path)))


def check_removable(path: Path) -> Manifest:
    """The manifest of the artifact at ``path``; raises as ``remove_artifact`` for what is none."""
    if path.is_symlink():
        raise UsageError(f"{path} is a link to {path.resolve()}: name the folder itself")
    if path.resolve() == Path.cwd():
        raise OutputError(f"{path} is the folder that you are in: leave it first")
    return read_manifest(path)


def remove_artifact(path: Path) -> tuple[str, ...]:
    """Delete the artifact at ``path``; names of what lies there too, and stays.

    Only what its manifest names is deleted, the manifest last, and no link is followed. Raises
    ``UsageError`` for a link, ``SourceError`` for what is no artifact, ``VerificationError`` where
    its manifest was changed and ``OutputError`` where a file cannot be deleted.
    """
    manifest = check_removable(path)
    files = [path / entry.path for entry in manifest.artifact.files]
    folders = {parent for file in files for parent in _folders_between(file, path)}
    linked = [folder for folder in folders if folder.is_symlink()]
    if linked:
        raise OutputError(
            f"{linked[0]} is a link to {linked[0].resolve()}, and nothing outside of {path} is "
            "deleted: remove the link, or put the folder in its place"
        )
    if _is_our_card(path / CARD):
        files.append(path / CARD)
    try:
        for file in (*files, path / MANIFEST):
            file.unlink(missing_ok=True)
        for folder in sorted(folders, reverse=True):
            with contextlib.suppress(OSError):  # what is not ours lies in it
                folder.rmdir()
        left = tuple(sorted(each.name for each in path.iterdir()))
        if not left:
            path.rmdir()
    except OSError as error:
        raise OutputError(
            f"cannot delete {error.filename}: {error.strerror}; what is left of {path} can be "
            "removed by the same command once that is solved"
        ) from error
    place = _notes_folder()
    if place is not None:
        with contextlib.suppress(OSError):
            (place / _key(path.resolve())).unlink(missing_ok=True)
    return left


def _folders_between(file: Path, top: Path) -> list[Path]:
    """The folders from below ``top`` down to ``file``."""
    return [parent for parent in file.parents if top in parent.parents]


def _is_our_card(path: Path) -> bool:
    try:
        return not path.is_symlink() and OUR_CARD in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _noted() -> Iterator[Path]:
    """The places that were noted and hold something; notes of what was removed are forgotten."""
    place = _notes_folder()
    if place is None or not place.is_dir():
        return
    for note in place.iterdir():
        try:
            path = Path(msgspec.json.decode(note.read_bytes(), type=dict[str, str])["path"])
        except (OSError, msgspec.DecodeError, KeyError):
            continue  # half-written, or no note
        if (path / MANIFEST).exists():
            yield path
        elif path.parent.exists():  # else it may lie on a disk that is not there now
            with contextlib.suppress(OSError):
                note.unlink()


def _looked_at(path: Path) -> Made:
    try:
        manifest = read_manifest(path)
    except EdgeError as error:
        return Made(name=path.name, path=path, fault=str(error))
    made = manifest.artifact
    merged = made.merge.adapters if made.merge else ()
    sizes = {
        entry.path: (path / entry.path).stat().st_size
        for entry in made.files
        if (path / entry.path).is_file()
    }
    return Made(
        name=path.name,
        path=path,
        nbytes=sum(sizes.values()),
        sha256=manifest.sha256,
        container=made.container,
        quant=str(made.recipe.get("quant") or ""),
        base=made.base,
        adapters=(*made.merged_before, *merged),
        kept_adapters=made.kept_adapters,
        created_unix_s=manifest.measured.get("created_unix_s"),
        fault="; ".join(_faults(manifest, sizes)),
    )


def _faults(manifest: Manifest, sizes: dict[str, int]) -> Iterator[str]:
    for entry in manifest.artifact.files:
        if entry.path not in sizes:
            yield f"{entry.path} is missing"
        elif sizes[entry.path] != entry.nbytes:
            yield f"{entry.path} has {sizes[entry.path]} bytes instead of {entry.nbytes}"


def _is_ours(folder: Path) -> bool:
    """Whether the manifest in ``folder`` is one of edgellm's, damaged or not."""
    try:
        read_manifest(folder)
    except SourceError:
        return False
    except EdgeError:
        return True
    return True


def _notes_folder() -> Path | None:
    """Where the notes lie; None for a user without a home."""
    try:
        root = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    except RuntimeError:
        return None
    return root / "edgellm" / "artifacts"


def _key(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()
