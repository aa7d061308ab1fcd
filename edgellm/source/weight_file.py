"""Bytes of a weight file, read where they are wanted and nowhere else.

Plain positioned reads, not a mapping: mapped pages count as resident memory until the system takes
them back, and a conversion promises to stay small.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.errors import SourceError

Bytes = npt.NDArray[np.uint8]


class WeightFile:
    """A file opened for reading by any number of threads; closed when nothing refers to it.

    Raises ``SourceError`` when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise SourceError(f"cannot open {path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        self.size_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, nbytes: int) -> Bytes:
        """Bytes ``offset:offset + nbytes`` as uint8 ``[nbytes]``, writable.

        Raises ``SourceError`` when the file ends before, or the disk fails.
        """
        result = np.empty(nbytes, dtype=np.uint8)
        self.read_into(result.data, offset)
        return result

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` (of bytes) from ``offset`` on; raises as ``read`` does."""
        nbytes = len(view)
        done = 0
        while done < nbytes:
            try:
                count = self._read_into(offset + done, view[done:])
            except OSError as error:
                raise SourceError(f"cannot read {self.path}: {error.strerror}") from error
            if not count:
                raise SourceError(
                    f"{self.path} ends at byte {offset + done} where {offset + nbytes} were "
                    "expected: it is cut short or changed while it was read; fetch it again"
                )
            done += count

    def _read_into(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            piece = os.read(self._descriptor, min(len(view), 1 << 24))
        view[: len(piece)] = piece
        return len(piece)
