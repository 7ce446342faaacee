"""What ranks run whose models change in mid run: on all of them alike, or on one alone; plain gloo, by no wrapper."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.errors import GradwatchWarning
from gradwatch.stats import Statistic
from gradwatch.treatments import ClipByGlobalNorm
from gradwatch.watch._measuring import Measuring
from tests.modes.ranks import equal_on_all_ranks, main
from tests.modes.reference import EVERYTHING, Net, batches, loss_of, mine, same

STEPS, AT = 10, 3
Change = Callable[[nn.Module, torch.optim.Optimizer], None]


class Calls(Statistic):
    """How often each module was called on all ranks: a table as long as the list of modules."""

    needs = frozenset({"outputs"})

    def sums(self, view: Any) -> Tensor:
        return torch.ones(1, 1, dtype=torch.float64)

    def finish(self, sums: Any, maxima: Any) -> Any:
        return sums[:, 0]


def train(net: Any, rank: int, world: int, step: int, *, is_alike: bool) -> tuple[Tensor, Tensor]:
    """Run one backward; return the loss and its batch. What all ranks hold is averaged over them, no more."""
    x, y = mine(batches(world, STEPS)[step][0], rank)
    loss = loss_of(net, (x, y))
    loss.backward()
    shared = [p for layer in (net.first, *net.body[:2]) for p in layer.parameters()]
    for p in net.parameters() if is_alike else shared:
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad.div_(world)
    return loss.detach(), x


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01)


def fit(
    rank: int, world: int, changes: dict[int, Change], *, is_alike: bool = False, **options: Any
) -> tuple[Watch, list[str]]:
    """Train, with changes at the beginning of some steps; return the watch, and what was warned of."""
    net = Net()
    net.last.requires_grad_(False)  # nobody reduces it: another layer may stand there on one rank
    optimizer = sgd(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Watch(net, optimizer, **{"rules": "observe", **EVERYTHING, **options}) as watch:
            for step in range(STEPS):
                if step in changes:
                    changes[step](net, optimizer)
                loss, x = train(net, rank, world, step, is_alike=is_alike)
                watch.step(loss=loss, batch=x)
                optimizer.zero_grad()
    equal_on_all_ranks([[r.step, r.skipped] for r in watch.history])
    return watch, [str(w.message) for w in told if issubclass(w.category, GradwatchWarning)]


def add(net: Any, optimizer: torch.optim.Optimizer) -> None:
    """A layer more, with parameters that are trained."""
    torch.manual_seed(len(net.body))
    more = nn.Linear(16, 16)
    net.body.append(more)
    optimizer.add_param_group({"params": list(more.parameters())})


def grow(net: Any, optimizer: torch.optim.Optimizer) -> None:
    """Two layers in the place of one: parameters and modules of other names and shapes."""
    torch.manual_seed(9)
    net.last = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer.add_param_group({"params": list(net.last.parameters())})


def replace(net: Any, optimizer: torch.optim.Optimizer) -> None:
    """Another module of the same name and shapes."""
    torch.manual_seed(8)
    net.last = nn.Linear(16, 1)
    optimizer.add_param_group({"params": list(net.last.parameters())})


def unfreeze(net: Any, optimizer: torch.optim.Optimizer) -> None:
    net.last.requires_grad_(True)


def mark(net: Any, optimizer: torch.optim.Optimizer) -> None:
    """A parameter that this rank takes for its own from here on; another list of modules makes it look again."""
    net.last.weight.allreduce = False
    net.idle = nn.Identity()


def on_one_alone(change: Change, *, has_treatment: bool = False, **options: Any) -> Callable[[int, int, Path], None]:
    """All ranks say once that nothing is seen from there on; the training goes on, and nothing acts."""

    def case(rank: int, world: int, folder: Path) -> None:
        if has_treatment:
            options["treatments"] = ClipByGlobalNorm(1e-3)
        changes = {AT: change} if rank == world - 1 else {}
        watch, told = fit(rank, world, changes, statistics=[Calls()], **options)
        told = [
            text for text in told if "gives the same gradient twice" not in text
        ]  # of what can't be seen nor run again
        assert [step for step in told if "do not hold the same" in step] == told, told
        assert len(told) == 1, told
        for record in watch.history:
            assert record.measured("grad_norm").any() == (record.step < AT), record.step
            assert any(t.applied for t in record.treatments) == (has_treatment and record.step < AT), record.step
            assert math.isfinite(record.loss)
        equal_on_all_ranks([[r.step, r.loss, r.global_norm if r.step < AT else 0.0] for r in watch.history])
        assert not watch.incidents, watch.incidents

    return case


def on_all_alike(change: Change) -> Callable[[int, int, Path], None]:
    """Nothing is lost of the gradients; modules and copies are looked at again from the next step on."""

    def case(rank: int, world: int, folder: Path) -> None:
        options = {"statistics": [Calls()], "on_error": "raise", "activations_every": 3}
        watch, told = fit(rank, world, {AT: change}, is_alike=True, **options)
        assert not told, told
        equal_on_all_ranks(same(watch.history))
        assert all(r.measured("grad_norm").any() for r in watch.history)
        assert not watch.history[0].unseen
        last = watch.history[-1]
        assert last.measured("output_rms").any()
        assert last.scalars["replicas_differ"] == 0
        assert len(last.index.paths) == len(watch.session.engine.meter.watched.index.paths)
        assert not watch.incidents, watch.incidents

    return case


def of_equal_shape(rank: int, world: int, folder: Path) -> None:
    """A layer of the same name and shapes in another's place, on one rank: its modules are looked at again on all."""
    watch, told = fit(rank, world, {AT: replace} if rank else {}, activations_every=3)
    assert not told, told
    equal_on_all_ranks([sorted(r.columns) for r in watch.history])
    assert all(r.measured("grad_norm").any() for r in watch.history)


def unfrozen(rank: int, world: int, folder: Path) -> None:
    """What is trained on one rank alone makes its norms others: that is told, and nothing ends."""
    watch, told = fit(rank, world, {AT: unfreeze} if rank else {}, rules="default")
    assert not told, told
    assert all(("rank_spread" in r.scalars) and (r.scalars["rank_spread"] > 0) == (r.step >= AT) for r in watch.history)
    equal_on_all_ranks([i.rule for i in watch.incidents])


def one_after_the_other(rank: int, world: int, folder: Path) -> None:
    """Ranks that change alike, but not at the same step."""
    watch, told = fit(rank, world, {AT + 2 * rank: add})
    assert len(told) == 1, told
    assert not any(r.measured("grad_norm").any() for r in watch.history if r.step >= AT)


def to_and_fro(rank: int, world: int, folder: Path) -> None:
    """Changed at several steps in turn, and alike each time."""
    changes: dict[int, Change] = {2: add, 3: grow, 4: add, 7: replace}
    watch, told = fit(rank, world, changes, is_alike=True, statistics=[Calls()], on_error="raise")
    assert not told, told
    equal_on_all_ranks(same(watch.history))
    assert all(r.measured("grad_norm").any() for r in watch.history)


def beside_a_failure(*, treats: bool, alone: bool) -> Callable[[int, int, Path], None]:
    """The first rank's measuring fails at the step of the change, for once or for good."""

    def case(rank: int, world: int, folder: Path) -> None:
        calls, real = itertools.count(), Measuring._take_gradients

        def broken(*args: Any) -> Any:
            if next(calls) == AT and rank == 0:
                raise MemoryError("a fault on this rank")
            return real(*args)

        options = {"treatments": ClipByGlobalNorm(1e-3)} if treats else {}
        changes = {AT: add} if rank or not alone else {}
        with patch.object(Measuring, "_take_gradients", broken):
            watch, told = fit(rank, world, changes, **options)
        measured = [r.step for r in watch.history if not math.isnan(r.global_norm) and r.measured("grad_norm").any()]
        assert measured == [s for s in range(STEPS) if s < AT or (s > AT and treats and not alone)], measured
        assert len(told) == 1 + (treats and alone), told

    return case


CASES = {
    **{f"{change.__name__}-on-one-rank": on_one_alone(change) for change in (add, grow, mark)},
    **{f"{c.__name__}-on-one-rank-treated": on_one_alone(c, has_treatment=True) for c in (add, grow)},
    "add-on-one-rank-sampled-now-and-then": on_one_alone(add, activations_every=4, replicas_every=5, updates_every=2),
    "add-on-one-rank-run-again": on_one_alone(add, recompute_every=1, fingerprints=True),
    **{f"{change.__name__}-on-all-ranks": on_all_alike(change) for change in (add, grow, replace, unfreeze)},
    "replace-on-one-rank": of_equal_shape,
    "unfreeze-on-one-rank": unfrozen,
    "add-on-one-rank-after-the-other": one_after_the_other,
    "change-and-change-again": to_and_fro,
    **{
        f"add-on-{'one' if alone else 'all'}-where-another-{'stumbles' if treats else 'fails'}": beside_a_failure(
            treats=treats, alone=alone
        )
        for treats in (False, True)
        for alone in (False, True)
    },
}

if __name__ == "__main__":
    main(CASES)
