"""Work shared out to threads, in order, with one thread of BLAS for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Results of ``work`` as they come; items are begun in order, and the first exception stops
    what has not begun.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="edgellm") as pool:
        waiting: set[Future[Result]] = {pool.submit(work, item) for item in items}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
