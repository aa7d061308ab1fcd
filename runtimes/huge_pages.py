"""Large pages for memory that is read whole for every token.

Decoding streams all weights once a token. In pages of 4 KiB a good part of that time goes into
address translation; in pages of 2 MiB it does not (SmolLM2-135M int4 in onnxruntime, one core of a
2023 server: 1.2 times the tokens a second). Where Linux leaves the choice to programs
(``transparent_hugepage`` is ``madvise``, as most distributions set it), somebody has to ask.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20

PIECE_BYTES = 8 * HUGE_PAGE_BYTES
"""What is gathered between two looks at whether to stop: some ten milliseconds of copying."""

MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25
"""Linux 6.1: gather a range into huge pages now. Older kernels refuse it and do so by and by."""

Ranges = frozenset[tuple[int, int]]
"""Memory from an address up to, not including, another."""


class HugePages:
    """Gathers what a model was loaded into, in a thread of its own.

    The copying (a tenth of a second for 150 MB) would otherwise stand between opening a model and
    its first token. Nothing fails where it cannot be done: it is speed alone, and so is advice to
    the kernel. Memory that is mapped later stays out of it: a cache must grow as it is filled.
    """

    def __init__(self, already: Ranges) -> None:
        """``already``: ``anonymous_ranges`` from before loading, to be left alone."""
        self._ranges = without(anonymous_ranges(), already)
        self._stopped = threading.Event()
        self.advised_bytes = 0
        self._thread = threading.Thread(target=self._gather, name="edgellm huge pages")
        self._thread.start()

    def wait(self) -> None:
        """Return when all is gathered, or gathering was stopped."""
        self._thread.join()

    def stop(self) -> None:
        """Gather nothing more. Call it before memory is freed that others may then map."""
        self._stopped.set()
        self._thread.join()

    def _gather(self) -> None:
        if not sys.platform.startswith("linux"):
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, nbytes in _pieces(self._ranges):
            if self._stopped.is_set():
                return
            if madvise(start, nbytes, MADV_HUGEPAGE) == 0:
                madvise(start, nbytes, MADV_COLLAPSE)
                self.advised_bytes += nbytes


def anonymous_ranges() -> Ranges:
    """Private writable memory of this process that no file backs, stacks left out; Linux only."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return frozenset()
    return frozenset(_ranges(maps.read_text(errors="replace")))  # names of files in any encoding


def without(ranges: Ranges, others: Ranges) -> list[tuple[int, int]]:
    """What of ``ranges`` lies in none of ``others``, in order.

    The kernel joins neighbours, so what was there before may be part of a larger range now.
    """
    left: list[tuple[int, int]] = []
    apart = sorted(others)
    for start, stop in sorted(ranges):
        for other_start, other_stop in apart:
            if other_stop <= start or other_start >= stop:
                continue
            if start < other_start:
                left.append((start, other_start))
            start = min(other_stop, stop)
        if start < stop:
            left.append((start, stop))
    return left


def _pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Start and bytes of whole huge pages within ``ranges``, ``PIECE_BYTES`` at most each."""
    for start, stop in ranges:
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        last = stop // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        for place in range(first, last, PIECE_BYTES):
            yield place, min(PIECE_BYTES, last - place)


def _ranges(maps: str) -> Iterator[tuple[int, int]]:
    for line in maps.splitlines():
        # "start-stop permissions offset device inode name"; a name only where there is one.
        place, permissions, _, _, inode, *name = line.split()
        named = name and not name[0].startswith(("[heap", "[anon"))
        if permissions == "rw-p" and inode == "0" and not named:
            start, stop = (int(part, 16) for part in place.split("-"))
            yield start, stop
