"""A folder that appears whole or not at all.

Everything is written in a sibling folder, synced, and renamed into place at the end, so that an
existing artifact stays until the new one is complete and a killed run leaves nothing that could be
taken for an artifact.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import psutil

from edgellm.errors import OutputError, UsageError
from edgellm.export.journal import Journal
from edgellm.manifest import MANIFEST

WRITEBACK_BYTES = 512 << 20
"""How far behind what is being written all is taken to be on the disk: some seconds' worth."""


class StagedFolder:
    """The output folder while it is being made; use as a context manager, then ``commit``.

    Leaving the ``with`` block without a commit removes what was written. Raises ``OutputError``
    when the output exists (unless ``force`` and it holds an artifact or nothing), cannot be
    written, or the disk fills up.

    With a ``resume_key``, what a killed run with the same key wrote is taken over (``resumed``),
    and what stands in the ``journal`` is kept when the user stops this one.
    """

    def __init__(self, out: Path, *, force: bool = False, resume_key: str = "") -> None:
        # A link stays, and what it leads to is replaced.
        self.out = out.resolve() if out.is_symlink() else out
        self.force = force
        self.path = _beside(self.out, f"{os.getpid()}.partial")
        self.resume_key = resume_key
        self.resumed = False
        self.journal = Journal(self.path)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._writeback = ThreadPoolExecutor(1, thread_name_prefix="edgellm-writeback")

    def __enter__(self) -> Self:
        with _translated(self.out):
            begun = _remove_abandoned(self.out, self.resume_key)
        check_output(self.out, force=self.force)
        with _translated(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if begun is None:
                self.path.mkdir()
            else:
                begun.rename(self.path)
                self.resumed = True
                self.journal.repair()
            if self.resume_key and not self.resumed:
                self.journal.begin(self.resume_key)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writeback.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        if kind is KeyboardInterrupt and self.journal.entries():
            return
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
        """Make a data file of its final size, its blocks reserved: a full disk shows now.

        One that was taken over is opened as it is.
        """
        with _translated(self.out):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            flags |= 0 if self.resumed else os.O_EXCL
            descriptor = os.open(target, flags, 0o666)
            self._descriptors[name] = descriptor
            _reserve(descriptor, nbytes)

    def write_at(self, name: str, offset: int, content: bytes | npt.NDArray[np.uint8]) -> None:
        """Write bytes into a data file; safe from several threads at once."""
        view = memoryview(content) if isinstance(content, bytes) else content.data
        flat = view.cast("B")
        with _translated(self.out):
            done = 0
            while done < len(flat):
                done += self._write(self._descriptors[name], flat[done:], offset + done)

    def _write(self, descriptor: int, view: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(descriptor, view, offset)
        with self._lock:  # Windows has no positioned write
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, view[: 1 << 24])

    def start_writeback(self, name: str, offset: int, nbytes: int) -> None:
        """Ask the system to bring these bytes to the disk now, and not to keep them in memory.

        Without it, Linux begins when a tenth of the memory waits to be written, and ``sync`` has so
        much more to wait for. Elsewhere it is left to the system. Asking waits for a place in the
        disk's queue, so a thread of its own does it.
        """
        if hasattr(os, "posix_fadvise"):
            self._writeback.submit(self._write_back, self._descriptors[name], offset, nbytes)

    def _write_back(self, descriptor: int, offset: int, nbytes: int) -> None:
        # The first time starts the writing; what is being written cannot leave memory yet, so what
        # lies a good way behind is asked for again. It would push out what is still to be read.
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        behind = offset - WRITEBACK_BYTES
        if behind >= 0:
            os.posix_fadvise(descriptor, behind, nbytes, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Bring what was written to the data files so far to the disk."""
        with _translated(self.out):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)

    def note(self, entry: dict[str, Any]) -> None:
        """Write a line of the journal."""
        with _translated(self.out):
            self.journal.append(entry)

    def _forget(self) -> None:
        """Remove the journal and what lies with it: all is done that it was for."""
        if self.journal.folder.exists():
            with _translated(self.out):
                shutil.rmtree(self.journal.folder)

    def sync(self) -> None:
        """Bring every data file to the disk and close it."""
        self._writeback.shutdown()
        with _translated(self.out):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
                os.close(descriptor)
            self._descriptors.clear()

    def commit(self) -> None:
        """Put the folder in place, in the stead of an older artifact when forced."""
        self._forget()
        retired = _beside(self.out, f"{os.getpid()}.retired")
        with _translated(self.out):
            if self.out.exists():
                check_output(self.out, force=self.force)
                self.out.rename(retired)
            try:
                self.path.rename(self.out)
            except OSError:
                if retired.exists():
                    retired.rename(self.out)
                raise
            _sync_folder(self.out.parent)
            if retired.exists():
                shutil.rmtree(retired)

    def put_aside(self) -> Path:
        """Put the folder beside its place, which stays as it is; where it is now.

        An artifact that was put aside earlier makes way.
        """
        self._forget()
        aside = aside_of(self.out)
        check_output(aside, force=True)
        with _translated(aside):
            if aside.exists():
                shutil.rmtree(aside)
            self.path.rename(aside)
            _sync_folder(aside.parent)
        return aside


def aside_of(out: Path) -> Path:
    """Where what was made for ``out`` is kept when it is rejected."""
    return out.with_name(f"{out.name}.rejected")


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
    if out.resolve() == Path.cwd():
        raise OutputError(
            f"--out {out} is the folder that you are in, and would be replaced under your feet: "
            "name a new folder in it"
        )
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


def check_free(out: Path, nbytes: int) -> None:
    """Raise ``OutputError`` when the disk of ``out`` has less than ``nbytes`` free.

    What killed runs with the same output left counts as free: it is removed, or gone on with.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free + sum(_occupied(each) for each, _ in _abandoned(out))
    if free < nbytes:
        raise OutputError(
            f"{out} needs {nbytes / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free: free some "
            "space, choose another --out, or a smaller grid"
        )


def check_no_overlap(source: Path, out: Path) -> None:
    """Raise ``UsageError`` when ``out`` is the source, lies in it, or holds it."""
    ours, theirs = out.resolve(), source.resolve()
    if ours == theirs or theirs in ours.parents or ours in theirs.parents:
        raise UsageError(f"--out {out} and the source {source} overlap: choose an --out elsewhere")


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f".{out.name}.{ending}")


def begun_before(out: Path, resume_key: str) -> list[dict[str, Any]]:
    """The journal of the furthest run with ``resume_key`` that was stopped; empty without."""
    with _translated(out):
        journals = [Journal(each) for each, kind in _abandoned(out) if kind == "partial"]
        found = [each.entries() for each in journals if each.key() == resume_key]
        return max(found, key=len, default=[])


def _abandoned(out: Path) -> Iterator[tuple[Path, str]]:
    """What killed runs with the same output left beside it: ``partial`` or ``retired``."""
    if not out.parent.is_dir():
        return
    for leftover in list(out.parent.iterdir()):
        stem, _, kind = leftover.name.rpartition(".")
        name, _, process = stem.rpartition(".")
        if name != f".{out.name}" or kind not in ("partial", "retired") or not process.isdecimal():
            continue
        if int(process) == os.getpid() or not psutil.pid_exists(int(process)):
            yield leftover, kind


def _remove_abandoned(out: Path, resume_key: str = "") -> Path | None:
    """Clear up what killed runs with the same output left beside it.

    One that was killed between its two renames has put the older artifact aside: it goes back. Of
    those whose journal has ``resume_key``, the one that had come furthest stays and is returned.
    """
    furthest, progress = None, 0
    for leftover, kind in _abandoned(out):
        journal = Journal(leftover)
        if kind == "retired" and not out.exists():
            leftover.rename(out)
        elif resume_key and journal.key() == resume_key and len(journal.entries()) > progress:
            if furthest is not None:
                shutil.rmtree(furthest)
            furthest, progress = leftover, len(journal.entries())
        else:
            shutil.rmtree(leftover)
    return furthest


def _occupied(folder: Path) -> int:
    """Bytes of the files in ``folder``, at any depth."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its size, and its blocks where the system can reserve them."""
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # of these three, each says that this file system reserves nothing
    os.truncate(descriptor, nbytes)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk; Windows opens no folders, and needs none opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
