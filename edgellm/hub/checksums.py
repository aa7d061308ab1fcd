"""Files of the Hub against the Hub's own hashes: SHA-256 of LFS files, git's SHA-1 of the others.

``huggingface_hub`` compares sizes, and takes what is in its cache as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgellm import verified
from edgellm.digests import file_sha256
from edgellm.errors import HubError, SourceError
from edgellm.hub.ids import HubId
from edgellm.progress import Progress, ProgressEvent

BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256_LENGTH = 64
SHOWN_DIGITS = 12


def check_files(
    wanted: HubId, folder: Path, digests: Mapping[str, str], progress: Progress
) -> None:
    """Compare files in ``folder``, a snapshot in the cache, with ``digests`` by name.

    One that passed before and is unchanged since is not read again. Raises ``HubError`` naming
    every file that differs, where it lies, and what to do.
    """
    known = verified.passed_before(folder)
    stamps = {name: verified.stamp_of((folder / name).stat(), digests[name]) for name in digests}
    unread = [name for name in digests if known.get(name) != stamps[name]]
    if not unread:
        return
    total, done = sum(int(stamps[name][0]) for name in unread), 0
    damaged = {}
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: hub_digest(folder / name, digests[name]), unread)
        for name, digest in zip(unread, found, strict=True):
            if digest != digests[name]:
                damaged[name] = digest
            done += int(stamps[name][0])
            progress(ProgressEvent("checksum", f"{wanted.repo}/{name}", done, total))
    passed = {name: stamp for name, stamp in stamps.items() if name not in damaged}
    verified.remember(folder, {**known, **passed})
    if damaged:
        raise HubError(_damage(wanted, folder, digests, damaged))


def hub_digest(path: Path, like: str) -> str:
    """The digest of ``path`` of the kind that ``like`` is: SHA-256, or git's SHA-1 of a blob.

    Raises ``SourceError`` if it cannot be read.
    """
    if len(like) == SHA256_LENGTH:
        return file_sha256(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    head = f"blob {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def digests_in_cache(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The digests by which the cache itself names files of the snapshot ``folder``.

    A file there is a link to a blob, named by its digest. Where links are not to be had (Windows
    often), the file is left out: nothing on the disk says what it should be.
    """
    digests = {}
    for name in names:
        file = folder / name
        if file.is_symlink():
            blob = file.readlink().name
            if BLOB_NAME.fullmatch(blob):
                digests[name] = blob
    return digests


def _damage(
    wanted: HubId, folder: Path, digests: Mapping[str, str], damaged: Mapping[str, str]
) -> str:
    def short(digest: str) -> str:
        kind = "sha256" if len(digest) == SHA256_LENGTH else "git's sha1"
        return f"{kind} {digest[:SHOWN_DIGITS]}"

    faults = "; ".join(
        f"{name} has {short(found)} instead of {digests[name][:SHOWN_DIGITS]}"
        for name, found in damaged.items()
    )
    files = " and ".join(str((folder / name).resolve()) for name in damaged)
    it = "that file" if len(damaged) == 1 else "those files"
    return (
        f"{wanted.repo} in the cache is not what the Hub has: {faults}. Delete {files} and run "
        f"the same command again, which fetches {it} anew (edgellm models remove {wanted.repo} "
        f"deletes the whole model); where it happens again, something in between changes them"
    )
