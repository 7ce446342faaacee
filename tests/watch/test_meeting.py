"""Where ranks meet before they exchange anything: what one process can show of it. `tests/modes` has the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gradwatch.watch import _meeting


class Slow:
    """A store in which it is not yet told that a place is done with: who was to tell so is not that far."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, 0 if key == _meeting._PLACES else amount)


@pytest.fixture
def store() -> Iterator[Any]:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


@pytest.mark.parametrize("is_slow", [False, True])
def test_nobody_meets_twice_at_one_place(store: Any, is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_slow:
        monkeypatch.setattr(_meeting, "_store", lambda: Slow(store))
    for _ in range(3):
        assert _meeting._meet({"a": 1}) == ""


def test_a_rank_that_has_met_nobody_yet_goes_where_the_others_go(store: Any) -> None:
    for _ in range(3):
        assert _meeting._meet({"a": 1}) == ""
    _meeting._next.clear()  # as in a process that has just begun
    assert _meeting._meet({"a": 1}) == ""


def test_what_is_told_unlike_is_told_by_its_name() -> None:
    one, other = {"`every`": 1, "rule 'a'": [["z", 3.0], ["w", float("nan")]]}, {"`every`": 1, "rule 'a'": []}
    assert _meeting._first_difference(one, other) == ("rule 'a' (z=3.0, w=nan)", "rule 'a'")
    assert _meeting._first_difference({"rule 'a'": []}, {}) == ("rule 'a'", "no rule 'a'")
    nan = {"rule 'a'": [["w", float("nan")]]}
    assert _meeting._first_difference({**nan, "`every`": 1}, {**nan, "`every`": 2}) == ("`every` 1", "`every` 2")
