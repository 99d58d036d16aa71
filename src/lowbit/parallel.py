"""Independent pieces of work on several threads, each with torch products of its own.

torch divides every product among its threads and waits for the last of them. Beside another busy process that wait is long,
thousands of times a second. Here each thread computes a piece alone, such as one window of calibration text through one
block, and waits for nobody before its end. A piece is computed in the same order of operations on any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch


def each(count: int, work: Callable[[int], None], done: Callable[[], None] = lambda: None) -> None:
    """Runs ``work(i)`` for i below ``count``, in rising order on as many threads as torch has, and ``done()`` behind each.

    The caller's thread runs ``done``. With one thread, or one piece, it runs everything. ``work`` sees the caller's settings
    of gradients; other settings of torch that belong to a thread are as in :func:`lowbit.surroundings.own_settings`.

    Raises:
        BaseException: the first that ``work`` or ``done`` raises; pieces that have not begun are left out.
    """
    threads = torch.get_num_threads()
    workers = min(threads, count)
    if workers <= 1:
        for i in range(count):
            work(i)
            done()
        return
    gradients, prepared, go = torch.is_grad_enabled(), threading.Semaphore(0), threading.Event()

    def prepare() -> None:
        torch.set_num_threads(threads // workers)
        torch.get_num_threads()  # a thread takes its number at the first look, and the last call of all threads counts then
        prepared.release()
        go.wait()

    def piece(i: int) -> None:
        with torch.set_grad_enabled(gradients):
            work(i)

    pool = ThreadPoolExecutor(workers, "lowbit", prepare)
    try:
        waiting: set[Future[None]] = {pool.submit(piece, i) for i in range(workers)}
        for _ in range(workers):
            prepared.acquire()
        torch.set_num_threads(threads)  # for threads that are yet to begin, such as autograd's
        go.set()
        begun = workers
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                if begun < count:
                    waiting.add(pool.submit(piece, begun))
                    begun += 1
                done()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        go.set()  # an interrupt may have come before: threads that wait would never end
        pool.shutdown()
        torch.set_num_threads(threads)


class Turns:
    """Lets pieces that run side by side change what they share in the order of their numbers.

    Piece 0 has the first turn at every name. A piece that ends must :meth:`leave`, or :meth:`fail`.

    Args:
        names: of what is shared.
    """

    def __init__(self, names: Iterable[str]):
        self._next = dict.fromkeys(names, 0)
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @contextmanager
    def at(self, name: str, piece: int) -> Iterator[None]:
        """Waits for the turn of ``piece`` at ``name``, which passes to the next piece when this closes.

        Raises:
            TakenTwice: the piece had its turn.
            BaseException: with which another piece failed, so that the turn may never come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._next[name] >= piece or self._error is not None)
            if self._error is not None:
                raise self._error
            if self._next[name] > piece:
                raise TakenTwice(name)
        yield
        with self._changed:
            self._next[name] += 1
            self._changed.notify_all()

    def leave(self, piece: int) -> None:
        """Passes on every turn that ``piece`` has not taken."""
        for name, turn in self._next.items():
            if turn <= piece:
                with self.at(name, piece):
                    pass

    def fail(self, error: BaseException) -> None:
        """Ends all waiting, with ``error``."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class TakenTwice(Exception):
    """A piece asked for a second turn at one name."""
