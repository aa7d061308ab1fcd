"""Models of the Hub in ``huggingface_hub``'s cache: what is there, and how it is removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgellm.errors import EdgeError, OutputError, UsageError
from edgellm.hub.checksums import BLOB_NAME
from edgellm.hub.ids import HubId
from edgellm.hub.translation import quietly
from edgellm.json_file import read_json
from edgellm.source.checkpoint import licence_of
from edgellm.source.matching import listed
from edgellm.source.quantized import method_of

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

SHORT_COMMIT = 7
"""Characters of a commit that must be given at least, as git shows them."""


class CachedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a snapshot.

    ``digest`` is the one that the Hub gave it, by which the cache names it: SHA-256 of a large
    file, git's SHA-1 of a small one; empty where the cache has no links.
    """

    name: str
    nbytes: int
    digest: str


class CachedRevision(msgspec.Struct, frozen=True, kw_only=True):
    """What is cached of one commit; ``refs`` are the branches and tags that led to it.

    ``base`` and ``quantization`` are what its own files say, empty where they say nothing.
    """

    commit: str
    refs: tuple[str, ...]
    nbytes: int
    path: Path
    base: str
    quantization: str
    licence: str
    files: tuple[CachedFile, ...]


class CachedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A repository in the cache; files that revisions share are counted once."""

    repo: str
    path: Path
    nbytes: int
    revisions: tuple[CachedRevision, ...]


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The cache of the Hub on this machine.

    ``unfinished_bytes``: left of downloads that broke off. ``faults``: what in it cannot be read.
    """

    path: Path
    models: tuple[CachedModel, ...] = ()
    unfinished_bytes: int = 0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removal:
    """What will be deleted, in words, and how much that frees; ``carry_out`` does it."""

    what: str
    nbytes: int
    carry_out: Callable[[], tuple[str, ...]]


def read_cache() -> Cache:
    """What is in the cache; no file is read whole."""
    place, scan = _scan()
    if scan is None:
        return Cache(path=place)
    models = [_model(repo) for repo in scan.repos if repo.repo_type == "model"]
    return Cache(
        path=place,
        models=tuple(sorted(models, key=lambda model: model.repo)),
        unfinished_bytes=sum(file.size_on_disk for file in scan.incomplete_files),
        faults=tuple(_faults(place, scan)),
    )


def removal_of(wanted: HubId) -> Removal | None:
    """How ``wanted`` is deleted from the cache, the whole repository or the revision that it names.

    None where the cache has no such repository. Raises ``UsageError`` for a revision that is not
    there, and ``OutputError`` for one whose files lie outside of the cache.
    """
    place, scan = _scan()
    folder = place / f"models--{wanted.repo.replace('/', '--')}"
    if not folder.is_dir():
        return None
    if folder.is_symlink():
        raise OutputError(
            f"{folder} is a link to {folder.resolve()}, and nothing outside of the cache is "
            "deleted: remove the link and what it leads to yourself"
        )
    assert scan is not None
    repo = next((each for each in scan.repos if each.repo_path == folder), None)
    if wanted.revision is None:
        nbytes = sum(
            file.stat().st_size
            for file in folder.rglob("*")
            if file.is_file() and not file.is_symlink()
        )
        commits = [] if repo is None else [each.commit_hash for each in repo.revisions]
        return Removal(
            f"{wanted.repo} in the Hub's cache",
            nbytes,
            lambda: _delete(scan, commits, folder),
        )
    if repo is None:
        raise UsageError(
            f"{folder} cannot be read, so no revision of it can be told apart: remove "
            f"{wanted.repo} as a whole"
        )
    revision = _revision(repo, wanted.revision)
    strategy = scan.delete_revisions(revision.commit_hash)
    _refuse_outside(strategy.blobs, folder)
    return Removal(
        f"revision {revision.commit_hash} of {wanted.repo} in the Hub's cache",
        strategy.expected_freed_size,
        lambda: _delete(scan, [revision.commit_hash], revision.snapshot_path),
    )


def _scan() -> tuple[Path, HFCacheInfo | None]:
    """The cache's folder, and what ``huggingface_hub`` finds in it; None where there is none."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    place = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    try:
        return place, scan_cache_dir(place)
    except CacheNotFound:
        return place, None
    except ValueError as error:
        raise OutputError(f"{place} should be the Hub's cache, and is a file") from error


def _faults(place: Path, scan: HFCacheInfo) -> Iterator[str]:
    """The models that the library cannot read, each with the reason and what to do.

    A folder without any file of a model is none: looking one up leaves it too.
    """
    known = {repo.repo_path for repo in scan.repos}
    for folder in sorted(place.glob("models--*--*")):
        snapshots = folder / "snapshots"
        if folder in known or not any(not each.is_dir() for each in snapshots.rglob("*")):
            continue
        said = next((str(each) for each in scan.warnings if str(folder) in str(each)), "")
        repo = "/".join(folder.name.split("--")[1:])
        yield (
            f"{repo} is damaged ({' '.join(said.split())}): fetch it again, or "
            f"`edgellm models remove {repo}`"
        )


def _delete(scan: HFCacheInfo, commits: list[str], folder: Path) -> tuple[str, ...]:
    """Delete ``commits``; ``folder`` must be gone afterwards."""
    with quietly():  # of what it could not delete it writes a line; it is looked for below
        scan.delete_revisions(*commits).execute()
    try:
        if folder.exists():  # what is damaged, the library does not know of
            shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(
            f"cannot delete {error.filename}: {error.strerror}; some of it may be gone already, "
            "and the same command goes on once that is solved"
        ) from error
    return ()


def _refuse_outside(blobs: frozenset[Path], folder: Path) -> None:
    outside = [blob for blob in blobs if folder not in blob.parents]
    if outside:
        raise OutputError(
            f"files of it lie outside of {folder} ({listed([str(blob) for blob in outside])}), and "
            "nothing there is deleted: remove the links to them first"
        )


def _revision(repo: CachedRepoInfo, name: str) -> CachedRevisionInfo:
    """The revision of ``repo`` that a branch, a tag or the beginning of a commit names."""
    found = [
        each
        for each in repo.revisions
        if name in each.refs or (len(name) >= SHORT_COMMIT and each.commit_hash.startswith(name))
    ]
    if len(found) != 1:
        there = [
            " ".join([each.commit_hash[:SHORT_COMMIT], *sorted(each.refs)])
            for each in sorted(repo.revisions, key=lambda each: each.commit_hash)
        ]
        raise UsageError(
            f"the cache has no single revision {name} of {repo.repo_id}: it has {listed(there)}"
        )
    return found[0]


def _model(repo: CachedRepoInfo) -> CachedModel:
    revisions = sorted(repo.revisions, key=lambda each: (-each.last_modified, each.commit_hash))
    return CachedModel(
        repo=repo.repo_id,
        path=repo.repo_path,
        nbytes=repo.size_on_disk,
        revisions=tuple(_described(each) for each in revisions),
    )


def _described(revision: CachedRevisionInfo) -> CachedRevision:
    folder = revision.snapshot_path
    config = _json(folder / "config.json")
    adapter = _json(folder / "adapter_config.json")
    settings = config.get("quantization_config") or config.get("quantization")
    files = [
        CachedFile(
            name=file.file_path.relative_to(folder).as_posix(),
            nbytes=file.size_on_disk,
            digest=file.blob_path.name if BLOB_NAME.fullmatch(file.blob_path.name) else "",
        )
        for file in revision.files
    ]
    return CachedRevision(
        commit=revision.commit_hash,
        refs=tuple(sorted(revision.refs)),
        nbytes=revision.size_on_disk,
        path=folder,
        base=str(adapter.get("base_model_name_or_path") or ""),
        quantization=method_of(settings) if settings else "",
        licence=licence_of(folder / "README.md"),
        files=tuple(sorted(files, key=lambda file: file.name)),
    )


def _json(path: Path) -> dict[str, Any]:
    """A small file's content, empty where there is none or it is damaged: a listing goes on."""
    try:
        return read_json(path) if path.is_file() else {}
    except EdgeError:
        return {}
