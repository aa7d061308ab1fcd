"""A folder that appears whole or not at all.

Everything is written in a sibling folder, synced, and renamed into place at the end, so that an
existing artifact stays until the new one is complete and a killed run leaves nothing that could be
taken for an artifact.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import psutil

from edgellm.errors import OutputError
from edgellm.manifest import MANIFEST


class StagedFolder:
    """The output folder while it is being made; use as a context manager, then ``commit``.

    Leaving the ``with`` block without a commit removes what was written. Raises ``OutputError``
    when the output exists (unless ``force`` and it holds an artifact or nothing), cannot be
    written, or the disk fills up.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        # A link stays, and what it leads to is replaced; "." needs its name to be renamed.
        self.out = out.resolve() if out.is_symlink() or not out.name else out
        self.force = force
        self.path = self.out.parent / f".{self.out.name}.{os.getpid()}.partial"
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        check_output(self.out, force=self.force)
        with _translated(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.out)
            self.path.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        if self.path.exists():
            shutil.rmtree(self.path)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file whole, with its folders."""
        with _translated(self.out):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def create_data_file(self, name: str, nbytes: int) -> None:
        """Make a data file of its final size, its blocks reserved: a full disk shows now."""
        with _translated(self.out):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors[name] = descriptor
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, nbytes)
            else:
                os.truncate(descriptor, nbytes)

    def write_at(self, name: str, offset: int, content: bytes | npt.NDArray[np.uint8]) -> None:
        """Write bytes into a data file; safe from several threads at once."""
        view = memoryview(content) if isinstance(content, bytes) else content.data
        flat = view.cast("B")
        with _translated(self.out):
            done = 0
            while done < len(flat):
                done += os.pwrite(self._descriptors[name], flat[done:], offset + done)

    def sync(self) -> None:
        """Bring every data file to the disk and close it."""
        with _translated(self.out):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
                os.close(descriptor)
            self._descriptors.clear()

    def commit(self) -> None:
        """Put the folder in place, in the stead of an older artifact when forced."""
        retired = self.out.parent / f".{self.out.name}.{os.getpid()}.retired"
        with _translated(self.out):
            if self.out.exists():
                check_output(self.out, force=self.force)
                self.out.rename(retired)
            self.path.rename(self.out)
            parent = os.open(self.out.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
            if retired.exists():
                shutil.rmtree(retired)


def check_output(out: Path, *, force: bool) -> None:
    """Raise ``OutputError`` unless ``out`` is free, or may be replaced because of ``force``."""
    if not out.exists():
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not os.access(parent, os.W_OK):
            raise OutputError(
                f"cannot write {out}: {parent} is not writable by this user; choose another --out"
            )
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file, and an artifact is a folder: choose another --out")
    empty = next(out.iterdir(), None) is None
    if empty:
        return
    if not force:
        raise OutputError(f"{out} exists already: choose another --out, or replace it with --force")
    if not (out / MANIFEST).is_file():
        raise OutputError(
            f"{out} holds files that edgellm did not write (it has no {MANIFEST}), "
            "so --force will not replace it: choose another --out, or empty it yourself"
        )


def _remove_abandoned(out: Path) -> None:
    """Remove what killed runs with the same output left beside it."""
    for leftover in out.parent.glob(f".{out.name}.*.partial"):
        process = leftover.name.removesuffix(".partial").rpartition(".")[2]
        if process.isdecimal() and (
            int(process) == os.getpid() or not psutil.pid_exists(int(process))
        ):
            shutil.rmtree(leftover)


@contextmanager
def _translated(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"the disk filled up while writing {out} ({error.strerror}); nothing was kept. "
                "Free some space, or choose another --out"
            ) from error
        raise OutputError(f"cannot write {out}: {error.strerror}; nothing was kept") from error
