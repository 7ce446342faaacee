"""Where a training is taken back: who may ask, to which snapshot, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from .._places import anchored
from .._warn import one_line
from ..errors import ConfigError
from ..requests import GoBack, Request, StopTraining
from ..rules import Rule, RuleBook, then_of
from ..torchside import Aside, home, is_host, is_split_by_zero, moved
from ..treatments import Rollback
from ._completion import BLOCK, Completion
from ._guard import Guard
from ._judge import Judge, own_incident
from ._ranks import world_size
from ._snapshots import Plan, Snapshot, Snapshots
from ._training import Training

__all__ = ["Return", "Rollbacks", "rollbacks_of"]


@dataclass(frozen=True)
class Return:
    """One return.

    Attributes:
        rule: that asked for it.
        step: after which it came.
        to: steps taken by the time of the snapshot.
        words: what is said of it.
    """

    rule: str
    step: int
    to: int
    words: str


def rollbacks_of(
    book: RuleBook, model: nn.Module, optimizers: Sequence[Optimizer], run_dir: Path | None, **parts: Any
) -> Rollbacks | None:
    """Return what takes snapshots for the rules of a book; None where no rule asks for any.

    Raises:
        ConfigError: they would not fit.
    """
    behind = [(rule, item) for rule in book.rules for item in then_of(rule) if isinstance(item, Rollback)]
    if not behind:
        return None
    training = Training(model, optimizers)
    if any(map(is_split_by_zero, model.parameters())):
        raise ConfigError(
            "a rollback can't take back what DeepSpeed's ZeRO keeps of a training in pieces of its own. Train without "
            "`zero_optimization`, or let the rule skip the step, or stop."
        )
    reach = {rule.name: rule.reach for rule in book.rules}
    late = _delay(model)
    wanted = [_Wanted(item, _lag(rule, parts["every"]) + late) for rule, item in behind]
    snapshots = Snapshots(training, _plan(wanted, run_dir), parts["guard"])
    return Rollbacks(training, snapshots, reach, **parts)


class _Wanted(NamedTuple):
    """One way back that is asked for, and how many steps after a trouble began it may be."""

    item: Rollback
    lag: int

    @property
    def reach(self) -> int:
        return self.item.steps + self.lag

    @property
    def every(self) -> int:
        return self.item.every or -(-self.reach // max(1, self.item.snapshots - 1))


def _lag(rule: Rule, every: int) -> int:
    """Return how many steps after a trouble began the rule asks for its actions."""
    return (rule.reach + rule.treat_after - 1) * every + max(0, rule.for_steps - 1)


def _delay(model: nn.Module) -> int:
    """Return how many steps later than at once it may be that numbers have come from the device, to all ranks."""
    if all(is_host(p.device) for p in model.parameters()):
        return 0
    return BLOCK if world_size() == 1 else 2 * BLOCK


def _plan(wanted: Sequence[_Wanted], run_dir: Path | None) -> Plan:
    """Return one plan for all: the closest cadence, and as many as the longest way back needs."""
    items = [each.item for each in wanted]
    every, count = min(each.every for each in wanted), max(item.snapshots for item in items)
    if len(wanted) > 1 and count > 1:
        count = max(count, *(-(-each.reach // every) + 1 for each in wanted))
    folder = next((anchored(item.folder) for item in items if item.folder is not None), None)
    return Plan(
        every=every,
        count=count,
        limit_bytes=round(min(item.memory_limit_mb for item in items) * 2**20),
        on_disk=any(item.storage == "disk" for item in items),
        folder=folder or (None if run_dir is None else run_dir / "snapshots"),
    )


class Rollbacks:
    """Takes snapshots between steps, and takes the training back to one of them when a rule has asked for it.

    Args:
        training: what goes back.
        snapshots: of it.
        reach: by rule, how many records before one in which it holds the trouble may have begun.
        every: optimizer steps from one record to the next.
        judge, completion, guard: of the engine.

    Attributes:
        news: returns that nobody has told of yet.
        stale: optimizers whose gradients may be of the weights that were left: they are not to take one step.
    """

    def __init__(
        self,
        training: Training,
        snapshots: Snapshots,
        reach: Mapping[str, int],
        *,
        every: int,
        judge: Judge,
        completion: Completion,
        guard: Guard,
    ) -> None:
        self.training, self.snapshots = training, snapshots
        self._reach, self._every = reach, every
        self._judge, self._completion, self._guard = judge, completion, guard
        self._asked: list[GoBack] = []
        self._settled = -1
        self._used: dict[str, int] = {}
        self._returned_at = -1
        self.news: list[Return] = []
        self.stale: set[int] = set()

    @property
    def is_asked(self) -> bool:
        """Whether the training goes back before the next step."""
        return bool(self._asked)

    def take(self, requests: list[Request]) -> bool:
        """Take what is asked of this out of a list of requests; return whether there was any: on all ranks together."""
        mine = [request for request in requests if isinstance(request, GoBack)]
        if mine:
            requests[:] = [request for request in requests if not isinstance(request, GoBack)]
            self._asked += mine
        return bool(mine)

    def take_stale(self, optimizers: Iterable[Any]) -> bool:
        """Return whether one of these is not to take the step that comes, and let it take those after that."""
        ids = {id(optimizer) for optimizer in optimizers}
        is_stale = not ids.isdisjoint(self.stale)
        self.stale -= ids
        return is_stale

    def settle(self, step: int, stepping: Iterable[Any] = ()) -> None:
        """Go back, or take a snapshot, now that a step is over; once for each step.

        Args:
            step: that is over.
            stepping: the optimizers whose step it was.
        """
        if step == self._settled:
            return
        self._settled = step
        self.take(self._completion.late_requests)
        with Aside():
            if self.is_asked:
                self._go_back(step, stepping)
            elif self.snapshots.is_due(step + 1):
                self._snapshot(step + 1)

    def _snapshot(self, step: int) -> None:
        # While a rule is on its way to fire, the oldest may be the last good one. Ranks can't tell alike, mid-way.
        last = self.snapshots.held[-1].step if self.snapshots.held else step
        if world_size() == 1 and self._judge.is_troubled() and step - last < 2 * self.snapshots.plan.every:
            self.snapshots.put_off()
            return
        taken = self.snapshots.take(step)
        if taken is not None:
            self._completion.when_judged(step, lambda: self._remember_rules(taken))

    def _remember_rules(self, snapshot: Snapshot) -> None:
        snapshot.rules = self._judge.memory()

    def _go_back(self, step: int, stepping: Iterable[Any]) -> None:
        # What is still on its way was measured on the way that is left: it is judged there.
        self._completion.drain(wait=True)
        self._completion.pass_marks()
        self.take(self._completion.late_requests)
        asked, self._asked = self._asked, []
        spent = [request for request in asked if self._used.get(request.name, 0) >= request.max_times]
        if spent:
            self._completion.late_requests.append(_spent(spent[0]))
            return
        try:
            why = self._return(asked, step, stepping)
        except Exception as error:
            reason = f"going back failed half way, and the weights are neither those of now nor of then: {error}"
            self._judge.report(own_incident("rollback_failed", step, one_line(reason)))
            self._completion.late_requests.append(StopTraining(reason=reason, as_error=True))
            return
        if why:
            self._tell_impossible(asked, step, why)
        self._completion.late_requests.extend(then for request in asked for then in request.then)

    def _return(self, asked: Sequence[GoBack], step: int, stepping: Iterable[Any]) -> str:
        """Go back; return why it can't be, and change nothing then."""
        began = min(request.began - self._reach.get(request.name, 0) * self._every for request in asked)
        # What went wrong before the last return is gone with it.
        began = max(began, self._returned_at + 1)
        chosen = self._choose(began, max(request.steps for request in asked))
        if isinstance(chosen, str):
            return chosen
        misfit = self._load(chosen)
        if self._least([not misfit]) == [False]:
            return misfit or "another rank can't go back"
        self._put_back(chosen, asked)
        chosen.unload()
        self._forget_gradients(stepping)
        self._tell(asked, step, chosen)
        return ""

    def _put_back(self, chosen: Snapshot, asked: Sequence[GoBack]) -> None:
        failure: Exception | None = None
        try:
            self.training.put_back(
                chosen.tree,
                schedulers=any(request.schedules for request in asked),
                randomness=any(request.randomness for request in asked),
            )
        except Exception as error:
            failure = error
        # Where it failed on one of them all end there: no rank waits for one that is gone.
        if self._least([failure is None]) != [True]:
            raise failure or RuntimeError("it failed on another rank")

    def _load(self, chosen: Snapshot) -> str:
        """Bring the snapshot; return why it can't be put back, if it can't."""
        try:
            chosen.load()
        except Exception as error:
            return f"the snapshot of step {chosen.step} can't be read: {one_line(error)}"
        return self.training.misfit(chosen.tree)

    def _choose(self, began: int, steps: int) -> Snapshot | str:
        held = self.snapshots.held
        good = self._least([snapshot.is_good() for snapshot in held], [snapshot.step for snapshot in held])
        if good is None:
            return "the ranks hold different snapshots"
        before = [snapshot for snapshot, is_good in zip(held, good, strict=True) if is_good and snapshot.step <= began]
        far = [snapshot for snapshot in before if snapshot.step <= began - steps]
        if before:
            return far[-1] if far else before[0]
        if not held:
            return "there is no snapshot yet"
        if not any(good):
            return "the weights of no snapshot are finite on all ranks"
        return (
            f"the oldest snapshot, of step {held[0].step}, is from after the trouble began, at step {began} or before"
        )

    def _least(self, flags: Sequence[bool], known: Sequence[int] = ()) -> list[bool] | None:
        """Return which flags are set on all ranks; None where ranks know different things. All ranks ask."""
        if world_size() == 1:
            return list(flags)
        device = home([p for p in self.training.model.parameters() if not is_host(p.device)])
        values = [float(len(flags)), -float(len(flags))]
        size = torch.tensor(values, dtype=torch.float64, device="cpu")
        size = moved(size, device)
        dist.all_reduce(size, op=dist.ReduceOp.MIN)
        least, most = (int(v) for v in (size[0], -size[1]))
        if least != most:
            return None
        values = [*map(float, flags), *map(float, known), *(-float(v) for v in known)]
        packed = moved(torch.tensor(values, dtype=torch.float64, device="cpu"), device)
        if len(values):
            dist.all_reduce(packed, op=dist.ReduceOp.MIN)
        found = packed.tolist()
        lows, highs = found[len(flags) : len(flags) + len(known)], found[len(flags) + len(known) :]
        if any(low != -high for low, high in zip(lows, highs, strict=True)):
            return None
        return [bool(value) for value in found[: len(flags)]]

    def _forget_gradients(self, stepping: Iterable[Any]) -> None:
        """Let no gradient of the weights that were left move those that were put back."""
        stepped = {id(optimizer) for optimizer in stepping}
        others = [optimizer for optimizer in self.training.optimizers if id(optimizer) not in stepped]
        self.stale = {id(optimizer) for optimizer in others} if stepped else set()
        if self.stale:
            for optimizer in others:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = None

    def _tell(self, asked: Sequence[GoBack], step: int, chosen: Snapshot) -> None:
        self._returned_at = step
        for request in asked:
            used = self._used[request.name] = self._used.get(request.name, 0) + 1
            words = f"rolled back from {step} to {chosen.step} ({used} of {request.max_times})"
            details = {"rolled_back_from": step, "rolled_back_to": chosen.step, "rollback": words}
            self._judge.note(request.name, ("rollback",), details)
            self.news.append(Return(request.name, step, chosen.step, words))
        self._judge.go_back(chosen.rules or {}, step)
        self._completion.go_back()
        self.snapshots.drop_after(chosen.step)

    def _tell_impossible(self, asked: Sequence[GoBack], step: int, why: str) -> None:
        for request in asked:
            self._judge.note(request.name, (), {"rollback": f"not rolled back: {why}"})
        names = ", ".join(repr(request.name) for request in asked)
        words = f"rule {names} asked for a rollback, and there was none: {why}"
        self._judge.report(own_incident("rollback_failed", step, words, is_harm=False))

    def close(self) -> None:
        """Let go of all snapshots."""
        self.snapshots.close()
        self._asked = []
        self.training.also, self.training.schedulers = dict, tuple

    def state_dict(self) -> dict[str, Any]:
        return {"used": dict(self._used), "returned_at": self._returned_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember how often it went back; the snapshots are of this process, and a new one is taken at once."""
        self._used = {str(name): int(count) for name, count in state.get("used", {}).items()}
        self._returned_at = int(state.get("returned_at", -1))


def _spent(request: GoBack) -> StopTraining:
    return StopTraining(
        reason=f"rule {request.name!r} fired at step {request.step}, and has gone back {request.max_times} times "
        "already: the trouble comes back. Look at the data and the learning rate of these steps; "
        f"Rollback(max_times={request.max_times}) sets how often it is tried.",
        as_error=True,
    )
