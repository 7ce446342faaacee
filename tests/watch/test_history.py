"""The records that are kept take no more memory than was allowed, and tell the latest whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.records import StepRecord
from gradwatch.watch._columns import as_float32


def watched_for(steps: int, **options: object) -> Watch:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(10)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch = Watch(model, optimizer, rules="observe", activations_every=None, updates_every=None, **options)
    with watch:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3)).square().mean()
            loss.backward()
            watch.step(loss=loss)
    return watch


def taken(record: StepRecord) -> int:
    arrays = [*record.columns.values(), *record.masks.values(), *(h.counts for h in record.histograms.values())]
    return sum(np.asarray(array).nbytes for array in arrays)


@pytest.mark.parametrize(("limit_mb", "fewest"), [(1.0, 50), (0.05, 16)])
def test_records_and_histograms_fit_in_a_fourth_of_the_memory_limit(limit_mb: float, fewest: int) -> None:
    history = watched_for(90, histograms_every=1, memory_limit_mb=limit_mb).history
    assert len(history) >= fewest
    assert [record.step for record in history] == list(range(90 - len(history), 90))
    # Sixteen are kept whatever they take, and the newest is whole.
    most = max(limit_mb * 2**20 / 4, sum(taken(record) for record in history[-17:-1] if not record.histograms))
    assert sum(taken(record) for record in history[:-1]) <= most
    assert len(history[-1].histograms) == 20
    held = [bool(record.histograms) for record in history]
    assert held == sorted(held)


def test_what_fits_is_kept_whole_as_many_as_were_asked_for() -> None:
    history = watched_for(40, histograms_every=1, history=30).history
    assert [record.step for record in history] == list(range(10, 40))
    assert all(len(record.histograms) == 20 for record in history)


@pytest.mark.parametrize("size", [1.5e-38, 0.1, 3e38])
def test_what_a_float32_can_hold_is_kept_as_one_and_what_it_can_not_keeps_its_digits(size: float) -> None:
    assert as_float32(np.array([size]))[0] == float(np.float32(size)) != size
    assert as_float32(np.array([1e-41, 1e39])).tolist() == [1e-41, 1e39]
