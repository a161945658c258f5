"""Items that are read one after another and worked on side by side; what comes of them comes in
their order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

from qlab.process.surroundings import by_itself

MOST_WORKERS = 4  # one thread reads and hashes about as fast as these round
AT_ONCE = 1 << 28  # bytes of the items that are worked on at once
Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")


class Ahead:
    """Threads that work beside the caller's while the context lasts, as many as torch has. None of
    them goes on behind it."""

    def __enter__(self) -> Self:
        self._workers = min(torch.get_num_threads(), MOST_WORKERS)
        self._pool = ThreadPoolExecutor(self._workers, initializer=by_itself)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, fn: Callable[..., Made], *args: Any) -> Future[Made]:
        """What fn(*args) returns, once a thread is free for it."""
        return self._pool.submit(fn, *args)

    def in_order(
        self,
        items: Iterable[Item],
        nbytes: Callable[[Item], int],
        read: Callable[[Item], Read],
        make: Callable[[Item, Read], Made],
    ) -> Iterator[Made]:
        """make(item, read(item)) of every item.

        The caller's thread reads, whenever it asks for the next result; the others make. Items of
        AT_ONCE bytes together are in memory at a time, or a single larger one.
        """
        waiting: deque[tuple[int, Future[Made]]] = deque()
        failure: Exception | None = None
        for item in items:
            size = nbytes(item)
            while waiting and (
                len(waiting) > self._workers or size + sum(each for each, _ in waiting) > AT_ONCE
            ):
                yield waiting.popleft()[1].result()
            try:
                waiting.append((size, self.begin(make, item, read(item))))
            except Exception as error:  # it comes behind what was read before
                failure = error
                break
        while waiting:
            yield waiting.popleft()[1].result()
        if failure is not None:
            raise failure
