"""A run that was watched, replayed from its folder."""

import pytest
import torch
from torch import nn

from gradwatch.rules import Expression
from gradwatch.runs import read_run, replay
from gradwatch.watch import Watch


def watched(run_dir, *, rules, spike=None, nan=None, steps=120):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    batches = torch.Generator().manual_seed(1)
    options = {"updates_every": 10, "activations_every": 10, "histograms_every": 20}
    with Watch(model, optimizer, rules=rules, run_dir=run_dir, **options) as watch:
        for step in range(steps):
            x = torch.randn(16, 8, generator=batches)
            loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss = loss * 1e4 if step == spike else loss * float("nan") if step == nan else loss
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
        watch.annotate("the end is near", silence=5)
    return watch


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["default", "autoclip"])
@pytest.mark.parametrize("fault", [{}, {"spike": 80}, {"nan": 60}, {"spike": 60, "nan": 100}], ids=str)
def test_replay_of_a_watched_run_equals_its_incidents_exactly(tmp_path, rules, fault):
    watch = watched(tmp_path, rules=rules, **fault)
    run = read_run(tmp_path)
    assert len(run) == 120
    assert bool(fault) <= bool(watch.incidents)
    assert replay(run, rules).differences(watch.incidents) == []
    assert {(i.rule, i.first_step) for i in run.incidents} == {(i.rule, i.first_step) for i in watch.incidents}


def test_a_validation_after_the_last_step_is_heard_live_and_in_a_replay(tmp_path):
    rules = [Expression("val_loss > 5", name="bad_validation")]
    model = nn.Linear(4, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01), rules=rules, run_dir=tmp_path) as watch:
        for _ in range(3):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            watch.step(loss=loss)
            model.zero_grad()
        watch.validation(loss=9.0)
    (incident,) = watch.incidents
    assert (incident.name, incident.value, incident.first_step) == ("bad_validation", 9.0, 2)
    assert replay(read_run(tmp_path), rules).differences(watch.incidents) == []
    assert len(replay(read_run(tmp_path), rules)) == 1
