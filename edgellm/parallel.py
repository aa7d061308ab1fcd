"""Work shared out to threads, in order, with one thread of BLAS for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    *,
    on_end: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Results of ``work`` as they come; items are begun in order.

    The first exception stops what has not begun. ``on_end`` is called when no more results will be
    taken, before what is still running is waited for.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="edgellm") as pool:
        waiting: set[Future[Result]] = {pool.submit(work, item) for item in items}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            if on_end is not None:
                on_end()
            pool.shutdown(wait=True, cancel_futures=True)


def one_blas_thread() -> AbstractContextManager[object]:
    """Keeps numpy's products on the thread that asks for them while workers run side by side.

    More threads would fight for the same cores, and add up in another order.
    """
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits
