"""When something with a cadence is measured, and what a flight recorder's file holds."""

import json
import math
from itertools import count

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.rules import NonFinite
from gradwatch.stats import is_due, next_due


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (None, []),
        (1, [*range(40)]),
        (3, [0, 1, 2, 3, *range(6, 40, 3)]),
        (16, [0, 1, 2, 4, 8, 16, 32]),
        (20, [0, 1, 2, 4, 8, 16, 20]),
        (100, [0, 1, 2, 4, 8, 16, 32]),
    ],
)
def test_multiples_and_below_the_first_the_powers_of_two_are_due(every: int | None, due: list[int]) -> None:
    assert [step for step in range(40) if is_due(step, every)] == due


@pytest.mark.parametrize("every", [1, 3, 16, 20, 100])
def test_nothing_is_due_between_a_step_and_the_next_at_which_something_may_be(every: int) -> None:
    for step in range(250):
        assert step < next_due(step, every) <= next(s for s in count(step + 1) if is_due(s, every))


def test_a_flight_recorders_file_holds_the_numbers_as_they_were_and_what_is_not_finite_by_name(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01), rules=[NonFinite()], run_dir=tmp_path) as watch:
        for step in range(6):
            loss = model(torch.ones(4, 3)).square().mean() * (math.nan if step == 3 else 1.0)
            loss.backward()
            watch.step(loss=loss)
            model.zero_grad()
            if step == 3:
                with torch.no_grad():
                    [p.nan_to_num_() for p in model.parameters()]
        norms = [r.global_norm for r in watch.history]
    (file,) = tmp_path.rglob("flight-000003-*.json")
    found = json.loads(file.read_text())["scalars"]["global_norm"]
    assert found[:3] == norms[:3]
    assert found[3] == "nan"
