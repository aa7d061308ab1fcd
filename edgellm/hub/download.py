"""Models from the Hugging Face Hub, through ``huggingface_hub``'s cache: only the files needed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.errors import EdgeError, HubError
from edgellm.hub.bar import bar_for
from edgellm.hub.checksums import check_files, digests_in_cache
from edgellm.hub.circumstances import from_cache
from edgellm.hub.ids import HubId
from edgellm.hub.needed import CARD, SMALL_FILES, Needed, needed_files
from edgellm.hub.translation import fetching, unreachable
from edgellm.progress import Progress
from edgellm.source.checkpoint import licence_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


@dataclass(frozen=True, slots=True)
class Download:
    """What is on disk now: ``path`` is a folder or a GGUF file, ``revision`` the full commit."""

    path: Path
    revision: str
    licence: str = ""
    notes: tuple[str, ...] = ()


def download(wanted: HubId, progress: Progress, *, needed: Needed | None = None) -> Download:
    """The model's files, from the cache where they are there already, by the Hub's own hashes.

    ``needed`` chooses among the names in the repository; None for ``needed_files``, a model's.
    When the Hub cannot be reached, or must not be (``HF_HUB_OFFLINE``), the cached snapshot is
    taken, with a note. Raises ``HubError`` with the next step, ``SourceError`` for a repository
    that holds nothing safe to read.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    choose = needed or needed_files
    try:
        with fetching(wanted):
            info = HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    except HubError as error:
        if not unreachable(error.__cause__):
            raise
        return _cached(wanted, choose, progress, error)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = choose(wanted, files)
    absent = [
        name
        for name in names
        if not isinstance(try_to_load_from_cache(wanted.repo, name, revision=info.sha), str)
    ]
    absent_bytes = sum(files[name].size or 0 for name in absent)
    _check_free(wanted, absent_bytes)
    with fetching(wanted):
        folder = Path(
            snapshot_download(
                wanted.repo,
                revision=wanted.revision,
                allow_patterns=names,
                tqdm_class=bar_for(wanted.repo, absent_bytes, progress),
            )
        )
    if folder.name != info.sha:
        raise HubError(
            f"{wanted.repo} was changed on the Hub while it was being fetched: run the same "
            "command again"
        )
    digests = {name: digest for name in names if (digest := _digest(files[name]))}
    check_files(wanted, folder, digests, progress)
    # The card as it lies here, so that the cache says the same when the Hub is not asked.
    return Download(_path(folder, wanted), folder.name, licence_of(folder / CARD))


def _path(folder: Path, wanted: HubId) -> Path:
    return folder / (wanted.file or "")


def _digest(file: RepoSibling) -> str | None:
    """What the Hub says of a file: SHA-256 where it is stored by LFS, else git's own."""
    return file.blob_id if file.lfs is None else file.lfs.sha256


def _cached(wanted: HubId, choose: Needed, progress: Progress, error: HubError) -> Download:
    """What the cache holds of ``wanted``; raises ``error`` where that is nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True)
        )
    except IncompleteSnapshotError as partial:
        folder = Path(partial.snapshot_path)  # of all files; those not needed were never fetched
    except LocalEntryNotFoundError:
        raise error from error.__cause__
    present = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    try:
        names = choose(wanted, present)
        # A small file of the repository that did not arrive would be missed in silence: the library
        # knows what the repository has.
        hidden = SMALL_FILES if wanted.file is None else SMALL_FILES - {CARD}
        possible = choose(wanted, {*present, *hidden})
        snapshot_download(
            wanted.repo, revision=wanted.revision, local_files_only=True, allow_patterns=possible
        )
    except (EdgeError, IncompleteSnapshotError) as lack:
        raise HubError(
            f"the cache holds only a part of {wanted.repo} ({lack}), and the Hub was not asked for "
            f"the rest: {error}"
        ) from error
    check_files(wanted, folder, digests_in_cache(folder, names), progress)
    note = from_cache(wanted.repo)
    return Download(_path(folder, wanted), folder.name, licence_of(folder / CARD), (note,))


def _check_free(wanted: HubId, nbytes: int) -> None:
    """Raise ``HubError`` when the cache's disk has less than ``nbytes`` free."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise HubError(
            f"{wanted.repo} needs {nbytes / 1e6:.0f} MB more, and the disk of {cache} has "
            f"{free / 1e6:.0f} MB free: make room (`edgellm models` shows what lies there), or set "
            "HF_HOME to a folder on another disk"
        )
