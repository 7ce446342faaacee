"""Interventions under activation checkpointing: what acted in a forward acts in its repetition, and nothing else does.

A checkpoint holds the function that backward will run again. In its place a `Replay` is put, which knows the hooks that
fired within, and puts them back for the time of the repetition: whether they have been taken off since or not, at the
step and call numbers of the first time. It lives and dies with the graph; nothing stays on the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..torchside import checkpoints_around
from ._hook import Entry
from ._runs import Runs

if TYPE_CHECKING:
    from ._registry import Registry

__all__ = ["Replay", "tie"]


class Replay:
    """Runs a checkpoint's function with the hooks of its first run.

    A hook whose function keeps the tensors it is shown would keep the graph that keeps it: it is held weakly here, and
    by its manager until the next pass that has hooks of its own.
    """

    __slots__ = ("_again", "_entries", "_registry", "_runs", "_weak", "calls", "step")

    def __init__(self, again: Callable[..., Any], runs: Runs, registry: Registry) -> None:
        self._again, self._runs, self._registry, self.step = again, runs, registry, runs.local.step
        self._entries: dict[Entry, None] = {}
        self._weak: dict[int, weakref.ref[Entry]] = {}
        self.calls: dict[tuple[str, int], int] = {}

    @classmethod
    def of(cls, holder: Any, name: str, runs: Runs, registry: Registry) -> Replay:
        """Return the one of these runs that a checkpoint has; put it there first where it has none."""
        again = getattr(holder, name)
        inner = again
        while isinstance(inner, Replay):
            if inner._runs is runs:
                return inner
            inner = inner._again
        made = cls(again, runs, registry)
        setattr(holder, name, made)
        return made

    def add(self, entry: Entry) -> None:
        if not entry.hook.keeps:
            self._entries[entry] = None
        elif id(entry) not in self._weak:
            self._weak[id(entry)] = weakref.ref(entry)
            self._registry.keep(entry)

    def has(self, entry: Entry) -> bool:
        return entry in self._entries or id(entry) in self._weak

    def entries(self) -> list[Entry]:
        """Return what acted in the first run.

        Raises:
            RuntimeError: some of it is gone, and the gradients would be another function's.
        """
        held = [ref() for ref in self._weak.values()]
        found = [*self._entries, *(entry for entry in held if entry is not None)]
        if None in held:
            raise RuntimeError(
                "a hook that acted in a checkpointed forward is gone before its backward. Its function keeps tensors "
                "of the graph, so the graph can't keep the function: run backward before the next run with hooks, keep "
                "the HookManager until then, or let the function keep detached tensors"
            )
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        local = self._runs.local
        before = local.replay, local.step, local.recalls
        entries = self.entries()
        self._registry.replay(entries, on=True)
        local.replay, local.step, local.recalls = self, self.step, self._registry.counts_from(self.calls)
        try:
            return self._again(*args, **kwargs)
        finally:
            local.replay, local.step, local.recalls = before
            self._registry.replay(entries, on=False)


def tie(entry: Entry, runs: Runs, call: int) -> bool:
    """Let a hook that has just acted in this call act again wherever checkpointing repeats the present forward.

    Returns:
        Whether it ever may.
    """
    registry = entry.hook.registry
    around = [] if registry is None else checkpoints_around()
    for holder, name in around:
        assert registry is not None
        replay = Replay.of(holder, name, runs, registry)
        replay.calls.setdefault(entry.site, call)
        replay.add(entry)
    return bool(around)
