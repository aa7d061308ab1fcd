"""SHA-256 of a file whose pieces come in any order: each is hashed while it is at hand."""

from __future__ import annotations

import hashlib
from threading import Condition

from edgellm.source.weight_file import Bytes

MOST_WAITING = 4
"""Pieces that may wait for an earlier one before whoever brings more has to wait as well."""


class OrderedDigest:
    """Hashes bytes in the order of their offsets, whoever brings them and when.

    Pieces must be begun in order: who brings the next one never waits, so all others go on.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._next = 0
        self._waiting: dict[int, Bytes] = {}
        self._busy = False
        self._stopped = False
        self._changed = Condition()

    def add(self, offset: int, content: Bytes) -> None:
        """Take bytes ``offset:offset + len(content)``, which must not be changed any more."""
        with self._changed:
            self._waiting[offset] = content
            while (self._busy or self._next not in self._waiting) and len(
                self._waiting
            ) > MOST_WAITING:
                if self._stopped:
                    return
                self._changed.wait()
            if self._busy:
                return
            self._busy = True
        while True:
            with self._changed:
                piece = self._waiting.pop(self._next, None)
                if piece is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
            self._digest.update(piece.data)
            with self._changed:
                self._next += len(piece)
                self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any more: the piece that comes next never will."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def hexdigest(self, nbytes: int) -> str:
        """The digest, in hexadecimal, of the ``nbytes`` that must have been brought."""
        if self._next != nbytes:
            raise AssertionError(f"{self._next} of {nbytes} bytes were hashed")
        return self._digest.hexdigest()
