"""Batches are known again, whatever form they have, and nobody else's are taken for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import Watch
from gradwatch.watch._fingerprints import ENTRIES, Fingerprints, sample_of
from gradwatch.watch._model_meter import ModelMeter
from gradwatch.watch._options import MeasureOptions

from .training import network


def fit(loader, epochs: int, **options) -> Watch:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    options = {"rules": {"rules": ["repeated_order"]}, "fingerprints": True, "on_error": "raise", **options}
    with Watch(model, optimizer, **options) as watch:
        for _ in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                watch.step(loss)
                optimizer.zero_grad()
    return watch


def data(num: int = 160) -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(num, 6, generator=made), torch.randint(0, 3, (num,), generator=made))


def test_an_order_that_is_the_same_in_every_epoch_is_noted() -> None:
    watch = fit(DataLoader(data(), 16), 4)
    (incident,) = watch.incidents
    assert (incident.rule, incident.severity, incident.value) == ("repeated_order", "info", 10)
    assert "the same 10 batches came in the same order 2 times" in incident.message


def test_an_order_that_is_drawn_anew_is_none() -> None:
    torch.manual_seed(0)
    assert not fit(DataLoader(data(), 16, shuffle=True), 8).incidents


def test_a_batch_that_is_overfitted_on_purpose_is_a_note() -> None:
    watch = fit(DataLoader(data(16), 16), 30)
    assert [(i.severity, "very same batch" in i.message) for i in watch.incidents] == [("info", True)]


def test_fingerprints_are_whole_numbers_and_of_all_micro_batches() -> None:
    def run(second: torch.Tensor) -> float:
        model = network()
        with Watch(model, torch.optim.SGD(model.parameters()), rules=[], fingerprints=True) as watch:
            model(torch.ones(4, 6)).sum().backward()
            model(second).sum().backward()
            watch.step()
        return watch.history[0].scalars["batch_fingerprint"]

    one, same, other = run(torch.ones(4, 6)), run(torch.ones(4, 6)), run(torch.zeros(4, 6))
    assert one == same != other
    assert one == int(one) < 2**48


def test_nothing_of_the_run_changes_and_nothing_is_seen_when_off() -> None:
    def run(**options):
        torch.manual_seed(1)
        watch = fit(DataLoader(data(), 16, shuffle=True), 2, **options)
        return watch, [*watch.session.model.parameters(), torch.get_rng_state()]

    (on, values), (off, bare) = run(), run(fingerprints=False)
    assert all(torch.equal(a, b) for a, b in zip(values, bare, strict=True))
    assert all("batch_fingerprint" in r.scalars for r in on.history)
    assert not any("batch_fingerprint" in r.scalars for r in off.history)
    assert not on.session.model._forward_pre_hooks


def test_an_evaluation_between_two_steps_is_no_batch() -> None:
    model, x = network(), torch.randn(8, 6)
    with Watch(model, torch.optim.SGD(model.parameters(), 0.0), rules=[], fingerprints=True) as watch:
        for is_evaluated in (False, True):
            model(x).sum().backward()
            if is_evaluated:
                model.eval()(torch.randn(8, 6))
                model.train()
            watch.step()
    first, second = (r.scalars["batch_fingerprint"] for r in watch.history)
    assert first == second


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(0, 3), torch.ones(2, 2).to_sparse(), torch.empty(3, device="meta")],
    ids=["empty", "sparse", "meta"],
)
def test_what_has_no_elements_to_look_at_is_left_out(tensor: torch.Tensor) -> None:
    assert sample_of(tensor) is None


def test_a_batch_with_a_part_that_has_no_elements_is_known_by_the_rest() -> None:
    class Net(nn.Linear):
        def forward(self, extra: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = Net(2, 1)
    found = Fingerprints(
        ModelMeter(model, [torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)], MeasureOptions())
    )
    taken = []
    for x in (torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)):
        model(torch.zeros(0), x)
        taken.append(found.take())
    found.close()
    assert not found.failure
    assert taken[0] == taken[1] != taken[2]


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(3.0), torch.tensor(1.0), torch.arange(5000), torch.randn(64, 3, 40, 40).transpose(1, 3)],
    ids=["few", "one-number", "many", "not-contiguous"],
)
def test_a_sample_holds_entries_of_the_tensor_and_is_small(tensor: torch.Tensor) -> None:
    sample = sample_of(tensor)
    assert 0 < len(sample) <= ENTRIES
    assert torch.isin(sample, tensor).all()


def test_a_module_that_is_given_nothing_is_not_seen() -> None:
    class Dreamer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self):
            return (self.weight * torch.randn(3)).sum()

    model = Dreamer()
    with Watch(model, torch.optim.SGD(model.parameters()), fingerprints=True, on_error="raise") as watch:
        model().backward()
        watch.step()
    assert "batch_fingerprint" not in watch.history[0].scalars
