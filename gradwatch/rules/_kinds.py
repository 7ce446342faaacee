"""What kind of training it is, as the index shows it, and what a record says of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from weakref import WeakKeyDictionary

import numpy as np

from ..records import Bools, Index, StepRecord, kind_scalars
from ._experts import rows_of_branches

__all__ = ["FINE_TUNING", "VALUES", "has_twin", "is_of", "kinds_of_index"]

VALUES = frozenset(kind_scalars(("rl", "bootstrapped")))
"""Of trainings whose targets come from what is trained: with its values its loss grows."""
FINE_TUNING = frozenset(kind_scalars(("fine_tuning",)))
"""Of trainings that go on from what was learned before, most of it frozen."""
MOSTLY = 0.5
"""Share of the elements that are frozen where a model is fine-tuned."""

LARGE = 0.2
"""Share of what is trained that a network makes up which another one is a copy of."""
_NUMBER = re.compile(r"\d+")

_CACHE: WeakKeyDictionary[Index, tuple[str, ...]] = WeakKeyDictionary()


def is_of(record: StepRecord, kinds: Collection[str]) -> bool:
    """Return whether a record says that its training is of one of these kinds, given as scalars."""
    return not frozenset(kinds).isdisjoint(record.scalars)


def kinds_of_index(index: Index) -> tuple[str, ...]:
    """Return the kinds of training that a model shows by itself: what is trained, and what it is like."""
    if index not in _CACHE:
        _CACHE[index] = tuple(_shown(index))
    return _CACHE[index]


def _shown(index: Index) -> list[str]:
    trained = index.is_parameter & index.trainable & index.in_optimizer
    left = index.is_parameter & ~trained
    if not trained.any():
        return []
    found = []
    if has_twin(index, left).any():
        found.append("bootstrapped")
    elif index.numel[left].sum() > MOSTLY * index.numel[index.is_parameter].sum():
        found.append("fine_tuning")
    return found + ["mixture_of_experts"] * bool(rows_of_branches(index))


def has_twin(index: Index, left: Bools) -> Bools:
    """Return which of the paths in `left` belong to a network that lies in there as a whole, and is like another one
    that does not: a target network, a teacher.

    Layers of one series, whose paths differ by numbers alone, are no twins of each other; nor is a small part of what
    is trained the twin of a network.
    """
    weights = index.is_parameter & (index.ndim >= 2)
    found = np.zeros(len(index), np.bool_)
    if not (left & weights).any():
        return found
    num_trained = index.numel[weights & ~left].sum()
    for same in _alike(index, weights):
        trained = [
            _unnumbered(part)
            for part, held in same.items()
            if not left[held].any() and index.numel[held].sum() >= LARGE * num_trained
        ]
        for part, held in same.items():
            if left[held].all() and any(other != _unnumbered(part) for other in trained):
                found[held] = True
    return found


def _alike(index: Index, weights: Bools) -> list[dict[str, list[int]]]:
    """Return the parts of a model by what they hold: path -> places, of those with weights of the same names and
    shapes."""
    parts: dict[str, dict[str, int]] = {}
    for place in np.flatnonzero(weights).tolist():
        path = index.paths[place]
        for end in (i for i, letter in enumerate(path) if letter == "."):
            parts.setdefault(path[:end], {})[path[end:]] = place
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, list[int]]] = {}
    for part, held in parts.items():
        if len(held) > 1:  # a layer alone has many like it
            key = tuple(sorted((rest, tuple(index.shapes[place])) for rest, place in held.items()))
            groups.setdefault(key, {})[part] = list(held.values())
    return list(groups.values())


def _unnumbered(path: str) -> str:
    return _NUMBER.sub("#", path)
