"""Dormant units and the effective rank of outputs are those of their definitions, over the whole batch of a step."""

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.ahead import DormantUnits, EffectiveRank
from gradwatch.errors import ConfigError
from gradwatch.testing import check_statistic


@pytest.mark.parametrize("statistic", [DormantUnits(), EffectiveRank()], ids=["dormant", "rank"])
def test_the_laws_of_statistics_hold(statistic):
    check_statistic(statistic)


class Given(nn.Module):
    """Gives what it is told to, and has a weight."""

    def __init__(self):
        super().__init__()
        self.act, self.scale = nn.ReLU(), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.act(x * self.scale)


def on_record(name, *batches):
    """Return what is on record of the activation after one step over some micro-batches."""
    model = Given()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watch(model, optimizer, rules="observe", statistics=[name], on_error="raise") as watch:
        for batch in batches:
            model(batch).sum().backward()
        watch.step()
    column = {"dormant_units": "dormant_fraction"}.get(name, name)
    return watch.history[0][column, "act"]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).abs()


def with_dormant(axis, *shape):
    batch = drawn(*shape)
    batch.movedim(axis, -1)[..., :5] *= 1e-3
    return batch


@pytest.mark.parametrize(
    ("batch", "share"),
    [
        pytest.param(with_dormant(-1, 16, 20), 0.25, id="vectors"),
        pytest.param(with_dormant(-1, 4, 7, 20), 0.25, id="sequences"),
        pytest.param(with_dormant(1, 4, 10, 3, 3), 0.5, id="images"),
        pytest.param(drawn(16, 20), 0.0, id="none"),
        pytest.param(torch.zeros(4, 6), 1.0, id="all-zero"),
    ],
)
def test_the_share_of_dormant_units_is_that_of_the_definition(batch, share):
    assert on_record("dormant_units", batch) == share
    means = batch.movedim(1, -1).flatten(0, -2).mean(0) if batch.dim() > 3 else batch.flatten(0, -2).mean(0)
    assert (means <= 0.025 * means.mean()).float().mean() == share


def test_a_unit_that_speaks_in_one_micro_batch_is_not_dormant():
    silent, speaks = drawn(8, 4), drawn(8, 4)
    silent[:, 0] = 0
    assert on_record("dormant_units", silent) == 0.25
    assert on_record("dormant_units", silent, speaks) == 0.0


def by_decomposition(rows):
    values = torch.linalg.svdvals(rows.double())
    shares = values[values > 1e-10 * values[0]] / values.sum()
    return torch.exp(-(shares * shares.log()).sum()).item()


def test_the_effective_rank_is_that_of_the_singular_values():
    rows = drawn(40, 12)
    assert on_record("effective_rank", rows) == pytest.approx(by_decomposition(rows), rel=1e-5)
    halves = rows.chunk(2)
    assert on_record("effective_rank", *halves) == pytest.approx(by_decomposition(rows), rel=1e-5)


def test_one_direction_has_rank_one_and_equal_ones_their_number():
    assert on_record("effective_rank", torch.outer(drawn(30), drawn(9))) == pytest.approx(1.0, abs=1e-3)
    assert on_record("effective_rank", torch.eye(12)) == pytest.approx(12.0)
    assert np.isnan(on_record("effective_rank", torch.zeros(5, 5)))


def test_of_many_units_a_sample_stands_for_all():
    assert on_record("effective_rank", torch.eye(256)) == pytest.approx(64.0)
    assert on_record("dormant_units", with_dormant(-1, 4, 1000)) == pytest.approx(0.005, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DormantUnits(every=0), "`every` is a whole number of at least 1. Got 0"),
        (lambda: DormantUnits(below=1.0), "`below` is a share of at least 0 and below 1. Got 1.0"),
        (lambda: EffectiveRank(every=0), "`every` is a whole number of at least 1. Got 0"),
    ],
)
def test_a_setting_that_can_not_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
