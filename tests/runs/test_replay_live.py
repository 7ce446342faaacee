"""A run that was watched, replayed from its folder."""

import pytest
import torch
from torch import nn

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
