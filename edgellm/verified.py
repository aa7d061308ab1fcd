"""A memory of files that passed a checksum, so that those unchanged since are not read again.

It lies in the user's cache, one file for each folder. Losing it costs time, not correctness.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

Stamp = list[int | str]
"""Size, modification time in ns and inode of a file, and the digest that it passed."""


def stamp_of(stat: os.stat_result, digest: str) -> Stamp:
    """What is remembered of a file that has ``digest``."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, digest]


def passed_before(folder: Path) -> dict[str, Stamp]:
    """The stamps of the files in ``folder`` that passed, by name."""
    file = _place(folder)
    if file is None:
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Stamp])
    except (OSError, msgspec.DecodeError):
        return {}  # no memory of an earlier pass: everything is read


def remember(folder: Path, stamps: dict[str, Stamp]) -> None:
    """Note that these files of ``folder`` passed, in place of what was noted before."""
    target = _place(folder)
    if target is None:
        return
    partial = target.with_suffix(f".{os.getpid()}")
    # A home that cannot be written costs time, not correctness.
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(msgspec.json.encode(stamps))
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)


def _place(folder: Path) -> Path | None:
    """Where it is remembered; None for a user without a home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return root / "edgellm" / "verified" / key
