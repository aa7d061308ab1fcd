"""The hidden states of a whole calibration text: what one layer reads and leaves for the next."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from edgellm.errors import OutputError
from edgellm.tensors import Array

BUDGET_BYTES = 1 << 30
"""Hidden states up to this size stay in memory: 349,525 tokens of a hidden size of 768."""

COPY_BYTES = 8 << 20


class TokenStream:
    """Float32 ``[tokens, hidden]``, in memory or, with a ``folder``, in two files that take turns.

    A layer reads rows and writes those of the next layer in their place; ``turn`` says that all of
    them are written. In files, what the layer read stays whole until the layer after it writes, so
    that a killed run finds it. Safe from several threads on rows that are apart.

    Raises ``OutputError`` when a file cannot be read or written.
    """

    def __init__(self, tokens: int, hidden: int, folder: Path | None = None) -> None:
        self.shape = (tokens, hidden)
        self.folder = folder
        self._side = 0
        self._lock = threading.Lock()
        self._values: Array | None = None
        if folder is None:
            self._values = np.empty(self.shape, np.float32)

    @property
    def file(self) -> Path | None:
        """The file that holds the rows to be read now; None in memory."""
        return None if self.folder is None else self._file(self._side)

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def read(self, start: int, stop: int) -> Array:
        """Rows ``start:stop``, as the layer before left them; a copy."""
        rows = np.empty((stop - start, self.shape[1]), np.float32)
        if self._values is not None:
            rows[...] = self._values[start:stop]
            return rows
        file = self._file(self._side)
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(4 * self.shape[1] * start)
                got = opened.readinto(rows.data.cast("B"))
        except OSError as error:
            raise OutputError(f"cannot read hidden states from {file}: {error.strerror}") from error
        if got != rows.nbytes:
            raise OutputError(f"{file} ends early: delete it and convert again")
        return rows

    def write(self, start: int, rows: Array) -> None:
        """Rows from ``start`` on, for the next layer."""
        if self._values is not None:
            self._values[start : start + len(rows)] = rows
            return
        self._write(self._file(1 - self._side), start, rows)

    def turn(self) -> None:
        """All rows for the next layer are written: they are what is read from now on."""
        if self._values is None:
            self._side = 1 - self._side

    def save(self, file: Path) -> None:
        """Keep the rows to be read now in ``file``, on the disk when this returns.

        Of a stream in files, ``file`` must be the one that holds them.
        """
        if self._values is None:
            assert file == self.file
        else:
            file.unlink(missing_ok=True)
            step = max(1, COPY_BYTES // (4 * self.shape[1]))
            for start in range(0, self.shape[0], step):
                self._write(file, start, self._values[start : start + step])
        try:
            descriptor = os.open(file, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"cannot write {file}: {error.strerror}") from error

    def restore(self, file: Path) -> None:
        """Read on from what was saved in ``file``; raises ``OutputError`` where it is not whole."""
        size = file.stat().st_size if file.exists() else 0
        if size != self.nbytes:
            raise OutputError(f"{file} has {size} bytes instead of {self.nbytes}")
        if self._values is None:
            self._side = next(side for side in (0, 1) if self._file(side) == file)
            return
        step = max(1, COPY_BYTES // (4 * self.shape[1]))
        with file.open("rb") as opened:
            for start in range(0, self.shape[0], step):
                rows = self._values[start : start + step]
                opened.readinto(rows.data.cast("B"))

    def _file(self, side: int) -> Path:
        assert self.folder is not None
        return self.folder / f"stream-{side}"

    def _write(self, file: Path, start: int, rows: Array) -> None:
        try:
            with self._lock:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
            with os.fdopen(descriptor, "r+b", buffering=0) as opened:
                opened.seek(4 * self.shape[1] * start)
                left = np.ascontiguousarray(rows).data.cast("B")
                while left:
                    left = left[opened.write(left) :]
        except OSError as error:
            raise OutputError(
                f"cannot write hidden states to {file}: {error.strerror}; free some space, or "
                "calibrate with fewer tokens (--calibration-tokens)"
            ) from error
