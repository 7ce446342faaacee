"""Whether all ranks take part, alike, found out before the first of them waits for the others in a collective.

A watch that is made on rank 0 alone, as loggers are, would wait in its first all-reduce for ranks that never come; or,
worse, for their gradients, which have another length. So would one that was told to measure at other steps. So ranks
meet through the store by which they have found each other: it belongs to no collective, and whoever waits there can
stop waiting.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..torchside import world_size
from ._options import MeasureOptions

__all__ = ["PATIENCE", "Meeting", "terms_of"]

PATIENCE = 20.0
"""Seconds for which ranks wait for each other at a run's first step. Their gradients were reduced just before it."""

_PAUSE, _LONGEST_PAUSE = 0.001, 0.1
_APART, _TOGETHER = "apart", "together"
_OF_ONE_RANK = frozenset({"on_error", "history", "memory_limit_mb", "save_batch"})
"""Options that change nothing of what is exchanged, and when."""

_NOBODY = (
    "{} made no step within {:.0f} s. Make the watch on every rank and call its `step` there, or add the callback on "
    "every rank: rank 0 alone writes all the same"
)
_UNLIKE = "the ranks were not told the same: {} on some, {} on others. Give every rank the same options"
_OF_SOME = (
    "the model is trained by {} of {} ranks, in a process group of their own, and gradwatch exchanges numbers among "
    "all ranks: it can't watch a part of them"
)
_JOINING = (
    "ranks may run out of batches one after another here (`Join`, `join_uneven_inputs`), and those that still have "
    "some would wait for the others in what gradwatch exchanges"
)

_PLACES = "gradwatch/places"

# Of a process group: the number of the place where this rank meets the others next. Only some ranks may have been at
# the last ones, and new processes at none: the store knows how many are done with, and this rank, what it was told.
_next: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

Terms = Mapping[str, Any]


class Meeting:
    """Tells why ranks can't exchange anything, if that is so.

    Args:
        model: as the trainer has it, with its wrappers.
    """

    def __init__(self, model: Any) -> None:
        # Weakly: whoever lets go of the wrapper, and keeps what is inside, must find the wrapper gone.
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else _gone
        self._has_met = False

    def why_alone(self, terms: Callable[[], Terms]) -> str:
        """Return why this rank must not wait for the others; "" where it may. The first call waits for them here.

        Args:
            terms: tells what must be the same on all ranks, by name, in plain values; asked at the first call.
        """
        model, why = self._model(), ""
        if not self._has_met:
            if isinstance(model, DistributedDataParallel) and not _are_all_copies(model):
                return _OF_SOME.format(model.process_group.size(), world_size())
            self._has_met = True
            with suppress(Exception):  # a store that fails tells nothing: all are taken to be here
                why = _meet(terms())
        # Ranks run out of batches one after another there, and those that have none left answer for the wrapper alone.
        config = getattr(model, "__dict__", {}).get("_join_config")
        return why or (_JOINING if getattr(config, "enable", False) else "")


def terms_of(
    options: MeasureOptions, rules: Iterable[Any], treatments: Iterable[Any], statistics: Iterable[Any], step: int
) -> dict[str, Any]:
    """Return what decides what is exchanged at which step, by name, in plain values.

    Of rules and treatments of gradwatch's own their numbers count, too: what one of them finds on one rank alone is
    acted upon there alone. What others write may hold what is of one rank: names count alone.
    """
    found = {f"`{f.name}`": getattr(options, f.name) for f in fields(options) if f.name not in _OF_ONE_RANK}
    for kind, several in (("rule", rules), ("treatment", treatments), ("statistic", statistics)):
        found |= {f"{kind} {one.name!r}": _numbers_of(one) for one in several}
    return found | {"the first step": step}


def _are_all_copies(model: DistributedDataParallel) -> bool:
    """Whether every rank trains this model, or holds pieces of it: tensor parallelism times DDP."""
    return model.process_group.size() == world_size() or any(hasattr(p, "device_mesh") for p in model.parameters())


def _gone() -> None:
    return None


def _numbers_of(part: Any) -> list[Any]:
    if not (type(part).__module__.startswith("gradwatch.") and is_dataclass(part)):
        return []
    given = [(f.name, getattr(part, f.name, None)) for f in fields(part) if f.init]
    return [[name, value] for name, value in given if isinstance(value, (bool, int, float))]


def _meet(terms: Terms) -> str:
    """Meet the other ranks; return "" where all are here and were told the same, or why not. All learn the same.

    Where there is no store to meet at (MPI, groups of tests), all are taken to be here.
    """
    store = _store()
    if store is None:
        return ""
    group = dist.group.WORLD
    number = max(_next.get(group, 0), store.add(_PLACES, 0))
    _next[group] = number + 1
    place = _Place(store, f"gradwatch/{number}")
    text = json.dumps(terms, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    missing = place.meet(text, digest)
    if missing is not None:
        return _NOBODY.format(_names(missing), PATIENCE)
    if place.num_alike(digest) == world_size():
        return ""
    return _UNLIKE.format(*_first_difference(*place.kinds()))


def _names(ranks: Sequence[int]) -> str:
    if not ranks:
        return "some ranks"  # they came later
    named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


def _first_difference(one: Terms, other: Terms) -> tuple[str, str]:
    name = next(n for n in [*one, *other] if repr(one.get(n, _gone)) != repr(other.get(n, _gone)))
    return _said(name, one), _said(name, other)


def _said(name: str, terms: Terms) -> str:
    if name not in terms:
        return f"no {name}"
    value = terms[name]
    if name.startswith("`") or not isinstance(value, list):
        return f"{name} {value}"
    return f"{name} ({', '.join(f'{k}={v}' for k, v in value)})" if value else name


class _Place:
    """Where the ranks of one run meet: some keys in the store."""

    def __init__(self, store: Any, name: str) -> None:
        self._store, self._name = store, name
        self._rank, self._num_ranks = dist.get_rank(), world_size()

    def meet(self, text: str, digest: str) -> list[int] | None:
        """Say what this rank was told, and wait for the others; return those that did not come, None where all did."""
        if self._store.add(self._of(digest), 1) == 1:
            self._store.set(self._of(f"kind/{self._store.add(self._of('kinds'), 1)}"), text)
        self._store.set(self._of(self._rank), "here")
        num_here = self._store.add(self._of("num"), 1)
        until, pause = monotonic() + PATIENCE, _PAUSE
        while num_here < self._num_ranks and monotonic() < until:
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            num_here = self._store.add(self._of("num"), 0)
        said = _TOGETHER if num_here >= self._num_ranks else _APART
        # The first that says so decides for all.
        said = self._store.compare_set(self._of("said"), "", said).decode()
        if self._store.add(self._of("over"), 1) == 1:
            self._store.add(_PLACES, 1)
        if said == _TOGETHER:
            return None
        return [rank for rank in range(self._num_ranks) if not self._store.check([self._of(rank)])]

    def num_alike(self, digest: str) -> int:
        """Return how many ranks were told the same as this one."""
        return int(self._store.add(self._of(digest), 0))

    def kinds(self) -> list[Terms]:
        """Return the first two of the unlike things that ranks were told."""
        return [json.loads(self._store.get(self._of(f"kind/{i}"))) for i in (1, 2)]

    def _of(self, what: object) -> str:
        return f"{self._name}/{what}"


def _store() -> Any:
    """Return the default group's store. Private: torch tells it nowhere else."""
    if str(dist.get_backend()) in ("fake", "mpi"):
        return None
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()
