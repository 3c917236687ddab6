from threading import Barrier, Event

import pytest
from traps import PATIENCE

from lipprep.pipeline.ahead import ahead


def test_items_come_in_order_with_what_was_read_of_them():
    assert [(item, future.result()) for item, future in ahead(range(100), lambda n: n * n)] == [
        (n, n * n) for n in range(100)
    ]


def test_an_error_is_its_items_alone():
    found = list(ahead([1, 0, 2], lambda n: 1 / n))
    assert found[0][1].result() == 1 and found[2][1].result() == 0.5
    with pytest.raises(ZeroDivisionError):
        found[1][1].result()


def test_no_more_than_four_items_are_read_beyond_the_one_at_hand_and_these_at_once():
    read, begun = [], Barrier(4)

    def note(n: int) -> None:
        read.append(n)
        if n in (1, 2, 3, 4):
            begun.wait(PATIENCE)

    items = ahead(range(10), note)
    next(items)
    next(items)[1].result()
    assert max(read) <= 5
    items.close()


def test_who_leaves_does_not_wait_for_what_is_being_read():
    begun, release = Event(), Event()

    def hang(_: int) -> None:
        begun.set()
        release.wait(PATIENCE)

    items = ahead(range(3), hang)
    _, future = next(items)
    assert begun.wait(PATIENCE)
    items.close()
    assert not future.done()
    release.set()


def test_a_slow_item_keeps_no_thread_from_the_others():
    first, last = Event(), Event()

    def read(n: int) -> None:
        if n == 0:
            first.wait(PATIENCE)
        if n == 9:
            last.set()

    items = ahead(range(10), read, threads=2, depth=20)
    next(items)
    assert last.wait(PATIENCE)
    first.set()
    assert len(list(items)) == 9
