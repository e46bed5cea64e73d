"""Work on many arrays in several threads: numpy computes without holding Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

Item = TypeVar("Item")

MOST = 8  # threads; beyond, those that wait for Python's lock outnumber those that compute


def for_each(function: Callable[[Item], None], items: Iterable[Item], threads: int = 0) -> None:
    """Call a function on each item; the order of the calls is open.

    Items are taken as threads get to them, so that few of them are held at once.

    Args:
        threads: 0 for one per core.

    Raises:
        Exception: whatever the first failing call raised; no item is taken after it.
    """
    count = min(threads or os.cpu_count() or 1, MOST)
    if count == 1:
        for item in items:
            function(item)
        return
    source = _Shared(items)
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(_work, function, source) for _ in range(count)]
        try:
            for done in running:
                done.result()
        finally:
            source.close()  # an interrupt comes to this thread alone


class _Shared(Iterator[Item]):
    """An iterator that threads can take from, until it is closed."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items, self._lock, self._is_closed = iter(items), Lock(), False

    def __next__(self) -> Item:
        with self._lock:
            if self._is_closed:
                raise StopIteration
            return next(self._items)

    def close(self) -> None:
        """Give no more items."""
        self._is_closed = True


def _work(function: Callable[[Item], None], source: _Shared[Item]) -> None:
    try:
        for item in source:
            function(item)
    except BaseException:
        source.close()
        raise
