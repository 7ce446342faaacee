"""What two ranks run that do not both take part, or were told different things: the training goes on as without."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.treatments import ClipByGlobalNorm
from gradwatch.watch import _meeting
from tests.modes.lightning_cases import Batches, Module
from tests.modes.ranks import main
from tests.modes.reference import STEPS, Net, batches, loss_of, mine, sgd

SHORT = 1.5


def fit(
    rank: int,
    world: int,
    make: Callable[[Any, Any], Watch | None] = lambda model, optimizer: None,
    *,
    steps_on: Callable[[int], bool] = lambda step: True,
    lasts: int = STEPS,
) -> tuple[Watch | None, list[Tensor], list[str]]:
    """Train under DDP; return the closed watch, the weights, and what was warned of. `Net` is as it is made."""
    model = DistributedDataParallel(Net())
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watch = make(model, optimizer)
        for (pair,) in batches(world, STEPS)[:lasts]:
            loss = loss_of(model, mine(pair, rank))
            loss.backward()
            if watch is None or not steps_on(rank):
                optimizer.step()
            else:
                watch.step(loss=loss)
            optimizer.zero_grad()
        if watch is not None:
            watch.close()
    if watch is not None:
        hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert not [h for h in hooks if getattr(h, "__module__", "").startswith("gradwatch")]
    weights = [p.detach().clone() for p in model.parameters()]
    return watch, weights, [str(w.message) for w in told if issubclass(w.category, GradwatchWarning)]


def same_weights(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def impatient(seconds: float = SHORT) -> Iterator[None]:
    patience, _meeting.PATIENCE = _meeting.PATIENCE, seconds
    try:
        yield
    finally:
        _meeting.PATIENCE = patience


def is_off(watch: Watch | None, told: list[str], why: str) -> None:
    """Assert that one warning says why nothing was measured, that it is on record, and nothing is called healthy."""
    assert watch is not None
    assert len(told) == 1, told
    assert why in told[0], told[0]
    assert not watch.history
    assert any(why in note for note in watch.session.notes), watch.session.notes
    assert watch.verdict().state == "not enough seen", watch.verdict()


def plain(model: Any, optimizer: Any) -> Watch:
    return Watch(model, optimizer, rules="observe")


def clipping(model: Any, optimizer: Any) -> Watch:
    return Watch(model, optimizer, treatments=[ClipByGlobalNorm(1e-3)])


def on_rank_0(make: Callable[[Any, Any], Watch]) -> Callable[[Any, Any], Watch | None]:
    return lambda model, optimizer: make(model, optimizer) if dist.get_rank() == 0 else None


def made_on_rank_0(make: Callable[[Any, Any], Watch], rank: int, world: int) -> None:
    _, bare, _ = fit(rank, world)
    with impatient():
        watch, weights, told = fit(rank, world, on_rank_0(make))
    assert same_weights(weights, bare)
    if rank == 0:
        is_off(watch, told, "rank 1 made no step")
    # Those that all ranks make afterwards find each other, though one rank has been alone before.
    watch, weights, told = fit(rank, world, plain)
    assert not told, told
    assert len(watch.history) == STEPS
    assert same_weights(weights, bare)


def in_rank_0s_folder(rank: int, world: int, folder: Path) -> None:
    """What is written on rank 0 alone, and read there, concerns nobody else."""

    def make(model: Any, optimizer: Any) -> Watch:
        return Watch(model, optimizer, run_dir=folder / "run" if rank == 0 else None, sinks=[], save_batch=rank == 0)

    watch, _, told = fit(rank, world, make)
    assert not told, told
    assert len(watch.history) == STEPS


def called_on_rank_0(rank: int, world: int, folder: Path) -> None:
    _, bare, _ = fit(rank, world)
    with impatient():
        watch, weights, told = fit(rank, world, plain, steps_on=lambda rank: rank == 0)
    assert same_weights(weights, bare)
    if rank == 0:
        is_off(watch, told, "rank 1 made no step")


def late(rank: int, world: int, folder: Path) -> None:
    """A rank that is late is waited for; one that is too late hears that nobody waits any more, and is off, too."""

    def first_step_of(pause: float) -> Callable[[int], bool]:
        once = iter([pause * rank])

        def steps(rank: int) -> bool:
            time.sleep(next(once, 0.0))
            return True

        return steps

    with impatient(5.0):
        watch, _, told = fit(rank, world, plain, steps_on=first_step_of(0.5))
    assert not told, told
    assert len(watch.history) == STEPS
    with impatient(0.5):
        watch, _, told = fit(rank, world, plain, steps_on=first_step_of(2.0))
    is_off(watch, told, "made no step")


def told_unlike(rank: int, world: int, folder: Path, options: dict[str, Any], other: dict[str, Any], why: str) -> None:
    _, bare, _ = fit(rank, world)

    def make(model: Any, optimizer: Any) -> Watch:
        return Watch(model, optimizer, **(other if rank else options))

    watch, weights, told = fit(rank, world, make)
    is_off(watch, told, why)
    assert same_weights(weights, bare)


UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "measured-at-other-steps": ({"every": 1}, {"every": 5}, "`every` "),
    "histograms-on-one": ({"histograms_every": 2}, {"histograms_every": None}, "`histograms_every` "),
    "other-rules": ({"rules": "default"}, {"rules": "observe"}, "rule '"),
    "treated-on-one": ({"treatments": [ClipByGlobalNorm(1e-3)]}, {}, "no treatment 'clip_by_global_norm'"),
    "treated-by-other-limits": (
        {"treatments": [ClipByGlobalNorm(1e-3)]},
        {"treatments": [ClipByGlobalNorm(1.0)]},
        "max_norm=1.0",
    ),
}


def for_unlike_times(model: DistributedDataParallel, rank: int, world: int, why: str) -> None:
    """Train a model for fewer steps on one rank than on the other; assert that gradwatch is off, and says why."""
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as told, plain(model, optimizer) as watch:
        warnings.simplefilter("always")
        for (pair,) in batches(world, STEPS)[: STEPS - 2 * rank]:
            loss = loss_of(model, mine(pair, rank))
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    is_off(watch, [str(w.message) for w in told if issubclass(w.category, GradwatchWarning)], why)


def out_of_batches(rank: int, world: int, folder: Path) -> None:
    """One rank has fewer batches than the other, and `Join` answers for it."""
    model = DistributedDataParallel(Net())
    with Join([model]):
        for_unlike_times(model, rank, world, "run out of batches")


def in_groups_of_their_own(rank: int, world: int, folder: Path) -> None:
    """Ranks train models of their own, for as long as each likes, in groups that are parts of all."""
    groups = [dist.new_group([r]) for r in range(world)]
    model = DistributedDataParallel(Net(), process_group=groups[rank])
    for_unlike_times(model, rank, world, "by 1 of 2 ranks")


def raising(rank: int, world: int, folder: Path) -> None:
    """Who asks for errors gets one, on the rank that is alone."""
    net = Net()
    optimizer = sgd(net)
    raised = ""
    if rank == 0:
        with impatient(0.2), Watch(net, optimizer, rules="observe", on_error="raise") as watch:
            loss_of(net, mine(batches(world)[0][0], rank)).backward()
            try:
                watch.step()
            except ConfigError as error:
                raised = str(error)
        assert "rank 1 made no step" in raised, raised


def lightning_callback_on_rank_0(rank: int, world: int, folder: Path) -> None:
    found = []
    for callbacks in ([], [GradWatch(verbose=False, run_dir=False)] if rank == 0 else []):
        torch.manual_seed(0)
        module = Module(Net(), rank)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=world,
            strategy=DDPStrategy(process_group_backend="gloo"),
            max_epochs=1,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        pairs = [mine(pair, rank) for (pair,) in batches(world, STEPS)]
        with impatient():
            trainer.fit(module, DataLoader(Batches(pairs), batch_size=None))
        found.append([p.detach().clone() for p in module.parameters()])
    assert same_weights(*found)


CASES: dict[str, Callable[[int, int, Path], None]] = {
    "made-on-rank-0": lambda rank, world, folder: made_on_rank_0(plain, rank, world),
    "made-on-rank-0-with-a-treatment": lambda rank, world, folder: made_on_rank_0(clipping, rank, world),
    "written-on-rank-0": in_rank_0s_folder,
    "called-on-rank-0": called_on_rank_0,
    "late": late,
    **{
        f"told-unlike-{name}": lambda rank, world, folder, of=of: told_unlike(rank, world, folder, *of)
        for name, of in UNLIKE.items()
    },
    "out-of-batches": out_of_batches,
    "in-groups-of-their-own": in_groups_of_their_own,
    "raising": raising,
    "lightning-callback-on-rank-0": lightning_callback_on_rank_0,
}

if __name__ == "__main__":
    main(CASES)
