"""Snapshots of a training: taken at a cadence without a wait, a bounded number of them, on the host or on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..torchside import Mark, all_finite, home, is_host, kept, kept_tensors, mark, moved, size_of
from ._guard import Guard
from ._ranks import rank_of_this, world_size
from ._training import Training
from ._transfer import Transfer

__all__ = ["Plan", "Snapshot", "Snapshots"]

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How snapshots are taken.

    Attributes:
        every: optimizer steps from one to the next.
        count: how many are held.
        limit_bytes: for what is held in the host's memory, on this rank.
        on_disk: they lie in files; the host holds one on its way there.
        folder: for these; None: a temporary one.
    """

    every: int
    count: int
    limit_bytes: int
    on_disk: bool = False
    folder: Path | None = None


@dataclass
class Snapshot:
    """A training as it was between two steps.

    Attributes:
        step: optimizer steps taken by then.
        tree: what `Training.tree` gave, copied.
        flag: whether its weights are finite; where they lie.
        finite: the same of all ranks, on its way to the host.
        marks: after which the copies are made.
        rules: what the rules remembered then; None until they have judged all steps before.
        file: where the copies lie; None: in memory.
        written: when they do.
    """

    step: int
    tree: dict[str, Any]
    flag: Tensor | None
    finite: Transfer = field(init=False, repr=False)
    marks: list[Mark] = field(default_factory=list)
    rules: Any = None
    file: Path | None = None
    written: Future[None] | None = field(default=None, repr=False)

    def agree(self, device: torch.device) -> None:
        """Let the ranks know whether it is finite on all of them; nobody waits for that."""
        assert self.flag is not None
        flag, self.flag = moved(self.flag.to(torch.float32), device), None
        if world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        self.finite = Transfer({"finite": flag})

    def is_not_finite(self) -> bool:
        """Whether some weight is not, on some rank. May wait for what is on its way."""
        return not bool(self.finite.result()["finite"])

    def is_good(self) -> bool:
        """Whether its weights are finite, and it lies where it should. May wait for what is on its way."""
        return not self.is_not_finite() and (self.written is None or self.written.exception() is None)

    def is_known_bad(self) -> bool:
        """Whether it is known not to be good, without a wait."""
        if self.finite.ready and self.is_not_finite():
            return True
        return self.written is not None and self.written.done() and self.written.exception() is not None

    def load(self) -> None:
        """Bring a snapshot from its file, tensor by tensor as they are asked for."""
        for each in self.marks:
            each.synchronize()
        self.marks = []
        if self.file is None:
            return
        hosts = torch.load(self.file, mmap=True, weights_only=True)
        for copy, host in zip(kept_tensors(self.tree), hosts, strict=True):
            copy.host = host

    def unload(self) -> None:
        """Let go of what `load` brought."""
        if self.file is not None:
            for copy in kept_tensors(self.tree):
                copy.host = None

    def forget(self) -> None:
        """Let go of the file, where there is one."""
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)


class Snapshots:
    """Holds the last snapshots of one training.

    Args:
        training: what they are of.
        plan: how they are taken.
        guard: told of what can't be done.

    Attributes:
        held: oldest first.
        num_bytes: of each, as measured at the last one, or as expected before there is any.

    Raises:
        ConfigError: they would not fit.
    """

    def __init__(self, training: Training, plan: Plan, guard: Guard) -> None:
        self.training, self.plan, self._guard = training, plan, guard
        self.held: list[Snapshot] = []
        self._count = plan.count
        self._is_off = False
        self._is_late = False
        self._last: int | None = None
        self._num_taken = 0
        self._spare: list[Tensor | None] = []
        self._folder: Path | None = None
        self._writer: ThreadPoolExecutor | None = None
        self.num_bytes = expected_bytes(training)
        if plan.on_disk:
            self._check_disk()
        elif self._room() < plan.count:
            raise ConfigError(
                f"Rollback: {plan.count} snapshots of {_mib(self.num_bytes)} each don't fit into `memory_limit_mb` = "
                f"{_mib(plan.limit_bytes, unit='')}, which {_mib(plan.count * self.num_bytes)} would do. Raise it, "
                "take fewer snapshots, or let them lie in files: storage='disk'."
            )

    @property
    def note(self) -> str:
        """What they cost, in a sentence."""
        where = f"in files ({self._folder})" if self.plan.on_disk else "in the host's memory"
        held = self.num_bytes if self.plan.on_disk else self._count * self.num_bytes
        if self._is_off:
            return "rollback is off: not one snapshot fits into its memory limit"
        return (
            f"rollback: a snapshot every {self.plan.every} steps, {self._count} of {_mib(self.num_bytes)} held {where}"
            f"; the host holds {_mib(held)} of at most {_mib(self.plan.limit_bytes)}"
        )

    def is_due(self, step: int) -> bool:
        """Return whether one is to be taken now that so many steps have been taken: the first at once."""
        if self._last is None:
            return True
        if self._last == step or (self._is_off and world_size() == 1):
            return False  # of several ranks, those that can't take part in saying so
        return self._is_late or step % self.plan.every == 0 or step - self._last > self.plan.every

    def take(self, step: int) -> Snapshot | None:
        """Take one, in place of the oldest, or of one whose weights are not finite; None where that can't be now.

        Several ranks take theirs together: one that is bad on one of them is bad on all, also where it could not be
        taken there.
        """
        made = None
        self._measure()
        with self._guard("snapshots", self._switch_off):
            if not self._is_off and self._fits() and self._writer_is_free():
                self._make_room()
                made = self._made(step)
        if made is None and world_size() > 1:
            self._make_room()
            made = Snapshot(step, {}, torch.zeros((), dtype=torch.bool, device="cpu"))
        if made is None:
            return None
        made.agree(self._device)
        self.held.append(made)
        self._last, self._is_late = step, False
        return made

    def _made(self, step: int) -> Snapshot:
        tree = self.training.tree()
        devices = {p.device for p in _live_tensors(tree) if not is_host(p.device)}
        made = Snapshot(step, kept(tree, self._spare), all_finite(self.training.weights()))
        made.marks = [found for found in map(mark, devices) if found is not None]
        self._spare = []
        if self.plan.on_disk:
            self._send_to_disk(made)
        return made

    def _switch_off(self) -> None:
        self._is_off = True

    @property
    def _device(self) -> torch.device:
        return home(list(self.training.model.parameters()))

    def put_off(self) -> None:
        """Say that the one that is due is to be taken later."""
        self._is_late = True

    def drop_after(self, step: int) -> None:
        """Let go of those that are younger than this: they are of a way that was left."""
        for snapshot in [s for s in self.held if s.step > step]:
            self._let_go(snapshot)

    def close(self) -> None:
        """Let go of all of them, and of their files."""
        for snapshot in list(self.held):
            self._let_go(snapshot)
        self._spare = []
        try:
            if self._writer is not None:
                self._writer.shutdown(wait=True)
        finally:  # nobody waits twice for a disk that hangs
            self._writer = None
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    def _let_go(self, snapshot: Snapshot) -> None:
        self.held.remove(snapshot)
        if self._writer is not None:
            self._writer.submit(snapshot.forget)  # after it was written
        elif not self.plan.on_disk:
            self._spare = [copy.host for copy in kept_tensors(snapshot.tree)]

    def _make_room(self) -> None:
        # Of several ranks all have the same flags; files that one could not write are its own affair.
        is_bad = Snapshot.is_known_bad if world_size() == 1 else Snapshot.is_not_finite
        while len(self.held) >= self._count:
            bad = [s for s in self.held if is_bad(s)]
            self._let_go((bad or self.held)[0])

    def _room(self) -> int:
        return int(self.plan.limit_bytes // max(self.num_bytes, 1))

    def _fits(self) -> bool:
        """See to it that the bound holds, now that it is known how large they are."""
        room = self._room()
        if self.plan.on_disk:
            self._is_off = room < 1
        elif room < self._count:
            self._count, self._is_off = max(room, 1), room < 1
            if room >= 1:
                self._guard.limit(
                    f"rollback: {room} instead of {self.plan.count} snapshots are held: each takes "
                    f"{_mib(self.num_bytes)}, and `memory_limit_mb` is {_mib(self.plan.limit_bytes, unit='')}",
                    aloud=True,
                )
        if self._is_off:
            self._guard.limit(
                f"rollback is off: a snapshot takes {_mib(self.num_bytes)}, and `memory_limit_mb` is "
                f"{_mib(self.plan.limit_bytes, unit='')}",
                aloud=True,
            )
            self._spare = []
        return not self._is_off

    def _measure(self) -> None:
        """Find out how large they are, now that optimizers may have states."""
        with self._guard("snapshots", self._switch_off):
            self.num_bytes = 0 if self._is_off else size_of(self.training.tree())
        if world_size() > 1 and self._num_taken < 2:
            # Ranks that hold pieces of several sizes hold as many snapshots. States are there from the second on.
            self._num_taken += 1
            largest = moved(torch.tensor(float(self.num_bytes), dtype=torch.float32, device="cpu"), self._device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            self.num_bytes = int(largest)

    # Files

    def _check_disk(self) -> None:
        if self._room() < 1:
            raise ConfigError(
                f"Rollback: one snapshot on its way to a file takes {_mib(self.num_bytes)} of the host's memory, and "
                f"`memory_limit_mb` is {_mib(self.plan.limit_bytes, unit='')}."
            )
        place = self.plan.folder or Path(tempfile.gettempdir())
        there = next((p for p in (place, *place.absolute().parents) if p.exists()), Path.cwd())
        free, needed = shutil.disk_usage(there).free, (self.plan.count + 1) * self.num_bytes
        if free < needed:
            raise ConfigError(
                f"Rollback: {self.plan.count} snapshots of {_mib(self.num_bytes)} and one on its way need "
                f"{_mib(needed)}; {there} has {_mib(free)} left. Name another `folder`."
            )

    def _writer_is_free(self) -> bool:
        last = self.held[-1].written if self.plan.on_disk and self.held else None
        if last is None or last.done():
            return True
        if world_size() > 1:
            last.exception()  # ranks take theirs together: this one waits
            return True
        self._is_late = True
        self._guard.limit("rollback: the disk is slower than the snapshots' cadence; they come later", aloud=True)
        return False

    def _send_to_disk(self, snapshot: Snapshot) -> None:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="gradwatch-snapshots")
        if self._folder is None:
            self._folder = _own_folder(self.plan.folder)
        snapshot.file = self._folder / f"step-{snapshot.step}.pt"
        hosts = [copy.host for copy in kept_tensors(snapshot.tree)]
        snapshot.written = self._writer.submit(_write, hosts, list(snapshot.marks), snapshot.file)
        self._spare = hosts  # written over by the next one, which waits for the writer
        for copy in kept_tensors(snapshot.tree):
            copy.host = None


def _write(hosts: list[Tensor | None], marks: Iterable[Mark], file: Path) -> None:
    for each in marks:
        each.synchronize()
    unfinished = file.with_suffix(".part")
    torch.save(hosts, unfinished)
    unfinished.replace(file)


def _own_folder(given: Path | None) -> Path:
    """Return a folder that is this rank's and this run's alone: it is removed with all that it holds."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"rank-{rank_of_this()}-" if given else "gradwatch-snapshots-", dir=given))


def expected_bytes(training: Training) -> int:
    """Return what a snapshot will take once the optimizers have states, from what is known before their first step."""
    tree = training.tree()
    found = size_of(tree)
    for optimizer in training.optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            without = [p for p in group["params"] if p not in optimizer.state]
            found += _moments(group) * size_of(without)
    return found


def _moments(group: Mapping[str, Any]) -> int:
    """Return how many tensors of a parameter's size an optimizer will keep for it, by its settings."""
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    return int(bool(group.get("momentum"))) + int("alpha" in group)


def _live_tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _live_tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _live_tensors(value)


def _mib(num_bytes: float, *, unit: str = " MiB") -> str:
    size = num_bytes / _MIB
    return f"{size:.0f}{unit}" if size >= 100 else f"{size:.3g}{unit}"
