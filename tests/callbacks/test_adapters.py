"""Every adapter shows the same run, changes nothing by watching, and acts alike."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gradwatch.records import StepRecord

from .loops import ADAPTERS, SIZE, Batches, Job, Net, adam

DENSE = {"activations_every": 10, "updates_every": 10, "histograms_every": 10}

every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


def assert_same(mine: StepRecord, other: StepRecord) -> None:
    assert mine.step == other.step
    assert mine.index.paths == other.index.paths
    assert mine.skipped == other.skipped
    assert mine.num_samples == other.num_samples
    for name in ("loss", "lr", "global_norm", "global_norm_after"):
        assert getattr(mine, name) == pytest.approx(getattr(other, name), rel=1e-6, nan_ok=True), name
    assert set(mine.columns) == set(other.columns)
    for name, column in mine.columns.items():
        assert np.array_equal(mine.measured(name), other.measured(name)), name
        np.testing.assert_allclose(column, other.columns[name], rtol=1e-6, atol=1e-12, err_msg=name)
    scalars, others = ({k: v for k, v in r.scalars.items() if not k.endswith("seconds")} for r in (mine, other))
    assert scalars == pytest.approx(others, rel=1e-6, abs=1e-9, nan_ok=True)
    assert {k: h.counts.tolist() for k, h in mine.histograms.items()} == {
        k: h.counts.tolist() for k, h in other.histograms.items()
    }
    assert [(t.name, t.rule, t.applied) for t in mine.treatments] == [
        (t.name, t.rule, t.applied) for t in other.treatments
    ]


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_training_gives_the_same_records_and_incidents_by_every_trainer(
    tmp_path: Path, accumulate: int
) -> None:
    data = Batches(80 * accumulate, spikes=(70 * accumulate,), bad=(5 * accumulate,))
    runs = {}
    for name, train in ADAPTERS.items():
        folder = tmp_path / name
        folder.mkdir()
        runs[name] = train(Job(folder, data, accumulate=accumulate, watched={"rules": "autoclip", **DENSE}))
    first = runs["plain"].watch
    assert len(first.history) == len(data) // SIZE // accumulate
    assert {i.rule for i in first.incidents} >= {"non_finite", "exploding"}
    for name, run in runs.items():
        if name == "plain":
            continue
        for mine, other in zip(run.watch.history, first.history, strict=True):
            assert_same(mine, other)
        told = [
            [(i.rule, i.first_step, i.last_step, i.paths, i.treatments) for i in w.incidents]
            for w in (run.watch, first)
        ]
        assert told[0] == told[1], name
        for mine, other in zip(run.everything(), runs["plain"].everything(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@every_adapter
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_observing_is_bitwise_neutral(tmp_path: Path, adapter: str, accumulate: int) -> None:
    def train(watched: dict | None) -> list[torch.Tensor]:
        job = Job(tmp_path, Batches(12), accumulate=accumulate, watched=watched, dropout=0.2)
        done = ADAPTERS[adapter](job)
        return [*done.everything(), torch.get_rng_state()]

    dense = {"activations_every": 1, "updates_every": 1, "histograms_every": 1}
    bare, watched = train(None), train(dense)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


@every_adapter
def test_a_nan_batch_is_skipped_as_in_a_loop_that_drops_it(tmp_path: Path, adapter: str) -> None:
    done = ADAPTERS[adapter](Job(tmp_path, Batches(12, bad=(4,)), watched={"rules": "autoclip"}))
    twin = Net()
    optimizer = adam(twin)
    for i, batch in enumerate(Job(tmp_path, Batches(12)).loader()):
        if i != 4:
            twin(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(done.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert [r.step for r in done.watch.history if r.skipped] == [4]
    (incident,) = [i for i in done.watch.incidents if i.rule == "non_finite"]
    assert incident.treatments == ("skip_step",)


@every_adapter
@pytest.mark.slow
def test_state_resumes(tmp_path: Path, adapter: str) -> None:
    data, options = Batches(40, bad=(30,)), {"rules": "autoclip"}
    (tmp_path / "half").mkdir()
    half = ADAPTERS[adapter](Job(tmp_path / "half", data, watched=options))
    resumed = ADAPTERS[adapter](Job(tmp_path / "half", data, epochs=2, watched=options, resume=half.saved))
    (tmp_path / "whole").mkdir()
    whole = ADAPTERS[adapter](Job(tmp_path / "whole", data, epochs=2, watched=options))
    assert [r.step for r in resumed.watch.history] == list(range(40, 80))
    facts = [[(i.rule, i.first_step, i.last_step, i.count) for i in d.watch.incidents] for d in (resumed, whole)]
    assert facts[0] == facts[1]
    mine, other = ([r.scalars.get("limit", math.nan) for r in d.watch.history[-40:]] for d in (resumed, whole))
    assert mine == pytest.approx(other, rel=1e-5, nan_ok=True)


@every_adapter
def test_nothing_is_left_on_the_model_or_the_optimizer(tmp_path: Path, adapter: str) -> None:
    done = ADAPTERS[adapter](Job(tmp_path, Batches(6), watched=DENSE))
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in done.model.modules())
    assert not any(p._backward_hooks for p in done.model.parameters())
    raw = done.optimizer
    while not type(raw).__module__.startswith("torch."):
        raw = raw.optimizer
    assert not raw._optimizer_step_pre_hooks
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    assert not _global_optimizer_pre_hooks
