"""What many requests ask for is done a few times a second."""

import pytest

from omnirt_tasks.errors import StoreUnavailable
from web.recent import RECENT_S, RecentCheck


class Store:
    """Counts the writes, and refuses them while it is full."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.writes = 0
        self.full = False

    def write(self) -> None:
        self.writes += 1
        if self.full:
            raise StoreUnavailable("The store is full.")


def test_a_check_that_was_passed_is_not_made_again_for_a_moment_and_one_that_failed_is() -> None:
    store = Store()
    check = RecentCheck(store.write, lambda: store.now_s)
    for _ in range(100):
        check()
    assert store.writes == 1

    store.now_s += 2 * RECENT_S
    store.full = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            check()
    assert store.writes == 3

    store.full = False
    check()
    assert store.writes == 4
