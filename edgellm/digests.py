"""SHA-256 of files and of parts of them, read piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgellm.errors import SourceError, VerificationError

READ_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; raises ``SourceError`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def combined_sha256(digests: Mapping[str, str]) -> str:
    """One digest for files whose digests are given by name, in hexadecimal.

    Of one file it is the file's own, as the Hub shows it; of several it is taken over their digests
    (32 bytes each) in the order of the files' names.
    """
    ordered = [digest for _, digest in sorted(digests.items())]
    if len(ordered) == 1:
        return ordered[0]
    return hashlib.sha256(bytes.fromhex("".join(ordered))).hexdigest()


def ranges_sha256(path: Path, ranges: Iterable[tuple[int, int]]) -> str:
    """SHA-256 over the ``(offset, nbytes)`` ranges of a file, one after the other.

    Raises ``SourceError`` if it cannot be read, ``VerificationError`` if it ends before.
    """
    digest = hashlib.sha256()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            for offset, nbytes in ranges:
                file.seek(offset)
                while nbytes:
                    count = file.readinto(view[: min(nbytes, READ_BYTES)])
                    if not count:
                        raise VerificationError(
                            f"{path} ends before the tensors that it should hold"
                        )
                    digest.update(view[:count])
                    nbytes -= count
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
