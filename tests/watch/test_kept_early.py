"""Every step is on record when it is over, whatever ends the process, though steps are judged in blocks."""

import torch
from torch import nn

from gradwatch import Watch
from gradwatch.runs import read_run
from gradwatch.watch._completion import BLOCK

from ..sinks.made import same


def trained(run_dir, num, each=lambda watch, step: None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    watch = Watch(model, optimizer, run_dir=run_dir, **options)
    for step in range(num):
        loss = model(torch.ones(2, 4) + step % 3).square().mean()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()
        each(watch, step)
    watch.close()


def test_every_step_is_on_disk_as_soon_as_it_is_over(tmp_path):
    found = []
    trained(tmp_path, 3 * BLOCK + 5, lambda _, step: found.append(read_run(tmp_path).steps().tolist()), rules="default")
    assert found == [list(range(step + 1)) for step in range(3 * BLOCK + 5)]
    assert len(read_run(tmp_path)) == 3 * BLOCK + 5


def test_what_stood_on_disk_before_it_was_judged_is_what_stands_there_after(tmp_path):
    early = []
    options = {"rules": "autoclip", "activations_every": 7}
    trained(tmp_path, 2 * BLOCK, lambda *_: early.append(list(read_run(tmp_path).records())[-1]), **options)
    for before, record in zip(early, read_run(tmp_path).records(), strict=True):
        if "output_rms" not in record.columns and "update_ratio" not in record.columns:
            assert same(before, record)


def test_a_step_that_waits_for_its_block_is_judged_when_somebody_asks(tmp_path):
    def ask(watch, step):
        assert watch.history[-1].step == step
        assert len(watch.session.engine.completion._pending) == 0

    trained(tmp_path, 4, ask)
