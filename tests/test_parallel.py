"""Every item once, few at a time, and the first failure ends the work."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Lock, get_ident

import pytest

from onnxq.parallel import for_each


@pytest.mark.parametrize("threads", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_every_item_is_taken_once(threads: int, count: int) -> None:
    seen: list[int] = []
    for_each(seen.append, range(count), threads)
    assert sorted(seen) == list(range(count))


def test_threads_work_at_the_same_time() -> None:
    together, names = Barrier(2, timeout=30), set()

    def meet(_: int) -> None:
        together.wait()  # one thread alone would wait for ever
        names.add(get_ident())

    for_each(meet, range(4), 2)
    assert len(names) == 2


def test_few_items_are_held_at_once() -> None:
    lock, held, most = Lock(), 0, 0

    def items() -> Iterator[int]:
        nonlocal held, most
        for item in range(50):
            with lock:
                held += 1
                most = max(most, held)
            yield item

    def drop(_: int) -> None:
        nonlocal held
        with lock:
            held -= 1

    for_each(drop, items(), 2)
    assert most <= 3  # one with each thread, one just taken


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_the_first_failure_ends_the_work(threads: int, error: BaseException) -> None:
    seen: list[int] = []

    def fail(item: int) -> None:
        seen.append(item)
        if item == 5:
            raise error

    with pytest.raises(type(error)):
        for_each(fail, range(100_000), threads)
    assert 5 in seen
    assert len(seen) < 100_000


def test_a_failure_of_the_source_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        for_each(lambda item: None, items(), 2)
