"""Trainings that step in turns know of each other."""

import torch
from torch import nn

from gradwatch import Watch


def test_a_training_counts_the_others_that_have_stepped_since_its_last_step() -> None:
    parts = [nn.Linear(3, 1) for _ in range(3)]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in parts]
    watches = [Watch(p, o, rules="observe", on_error="raise") for p, o in zip(parts, optimizers, strict=True)]
    # A second one that watches the first training is no company.
    twin = Watch(parts[0], optimizers[0], rules="observe", on_error="raise")

    def step(which: int, *also: Watch) -> None:
        parts[which](torch.ones(2, 3)).sum().backward()
        for watch in also:
            watch.after_backward()
        watches[which].step()
        for watch in also:
            watch.after_step()
        optimizers[which].zero_grad()

    for which in (0, 1, 0, 1, 2, 0, 2, 0, 1, 2, 0, 0):
        step(which, *([twin] if which == 0 else []))
    company = [record.scalars.get("others_step", 0.0) for record in watches[0].history]
    for watch in (*watches, twin):
        watch.close()
    # Those that it meets for the first time have no last time yet: all have met before the fourth step.
    assert company[3:] == [1.0, 2.0, 0.0]


def test_each_optimizer_that_steps_on_its_own_is_told_the_last_loss_of_another() -> None:
    parts = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in parts]
    given, told = [], []
    with Watch(parts, optimizers, rules="observe", on_error="raise") as watch:
        for step in range(6):
            which = step % 2
            loss = parts[which](torch.ones(2, 3)).mean() + step
            loss.backward()
            given.append(float(loss.detach()))
            told.append(watch.step(loss=loss, optimizer=optimizers[which]).record.scalars.get("others_loss"))
            optimizers[which].zero_grad()
    assert told[0] is None
    assert told[1:] == given[:-1]
