"""Spectral norms and stable ranks are those of a full decomposition."""

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.ahead import WeightSpectra
from gradwatch.errors import ConfigError
from gradwatch.stats import View
from gradwatch.testing import check_statistic


def measured(weight, **options):
    """Return spectral norm and stable rank of one weight."""
    statistic = WeightSpectra(**options)
    view = View(0, ("weight",), {}, tensors={"parameters": lambda: [weight]})
    found = statistic.finish(statistic.sums(view).double().numpy(), None)
    return found["spectral_norm"][0], found["stable_rank"][0]


def exact(weight):
    values = torch.linalg.svdvals(weight.double().flatten(1))
    return values[0].item(), (values.square().sum() / values[0].square()).item()


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


WEIGHTS = {
    "flat-spectrum": lambda: drawn(400, 400),
    "tall": lambda: drawn(300, 20),
    "wide": lambda: drawn(20, 300),
    "convolution": lambda: drawn(32, 16, 3, 3),
    "one-direction": lambda: torch.outer(drawn(9), drawn(7)),
    "two-directions": lambda: torch.outer(drawn(9), drawn(7)) + 0.5 * torch.outer(drawn(2, 9)[1], drawn(2, 7)[1]),
    "close-values": lambda: torch.diag(torch.tensor([1.0, 0.99, 0.98, 0.5])),
    "identity": lambda: torch.eye(50),
    "one-row": lambda: drawn(1, 9),
    "one-column": lambda: drawn(9, 1),
    "huge": lambda: drawn(30, 30) * 1e30,
    "tiny": lambda: drawn(30, 30) * 1e-30,
    "bfloat16": lambda: drawn(64, 64).bfloat16(),
}


def test_the_laws_of_statistics_hold():
    check_statistic(WeightSpectra())


@pytest.mark.parametrize("name", WEIGHTS)
def test_both_are_within_one_per_cent_of_the_exact_ones_and_the_norm_from_below(name):
    norm, rank = measured(WEIGHTS[name]())
    expected = exact(WEIGHTS[name]())
    assert norm == pytest.approx(expected[0], rel=0.01)
    assert norm <= expected[0] * (1 + 1e-5)
    assert rank == pytest.approx(expected[1], rel=0.02)


@pytest.mark.parametrize("name", ["tall", "wide", "one-direction"])
def test_with_as_many_iterations_as_there_are_values_they_are_exact(name):
    weight = WEIGHTS[name]()
    assert measured(weight, iterations=20) == pytest.approx(exact(weight), rel=1e-5)


def test_what_is_not_finite_and_what_has_no_spectrum_is_nan():
    spoilt = drawn(5, 5)
    spoilt[2, 3] = torch.inf
    for weight in (spoilt, drawn(5), torch.zeros(3, 3)):
        assert measured(weight)[1] != measured(weight)[1]
    assert measured(torch.zeros(3, 3))[0] == 0


def test_they_are_on_record_at_the_cadence():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = {}
    with Watch(model, optimizer, rules="observe", statistics=[{"weight_spectra": {"every": 5}}]) as watch:
        for step in range(11):
            model(torch.randn(4, 6)).square().mean().backward()
            expected[step] = exact(model.weight.detach())
            watch.step()
            optimizer.zero_grad()
    for step in (0, 5, 10):
        record = watch.history[step]
        assert record["spectral_norm", "weight"] == pytest.approx(expected[step][0], rel=1e-4)
        assert record["stable_rank", "weight"] == pytest.approx(expected[step][1], rel=1e-4)
    assert "spectral_norm" not in watch.history[7].columns


@pytest.mark.parametrize("setting", ["every", "iterations"])
def test_a_setting_that_can_not_be_is_refused(setting):
    with pytest.raises(ConfigError, match=f"`{setting}` is a whole number of at least 1. Got 0"):
        WeightSpectra(**{setting: 0})
