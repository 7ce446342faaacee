"""The model as it is now: whether anything of it is another one, told at the price of some microseconds a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from ..torchside import SameKind, clean_path, stamps_of

__all__ = ["FLAGS", "PARTS", "ModelNow"]

FLAGS, PARTS = "flags", "parts"
"""What can be another: `requires_grad` alone; anything else."""

_PARTS = ("_parameters", "_modules")
_LOOKED_UP, _ASKED = itemgetter(*_PARTS), attrgetter(*_PARTS)
_RARELY = 16
"""Looks after which it is asked whether modules have their attributes where they had them, and are of their class. Of
lazy ones that is asked at every look."""
_AT_A_LOOK = 1024
"""Of more parameters than twice these so many are looked at, where not all need be."""
_REQUIRES_GRAD = attrgetter("requires_grad")
_PLAIN = frozenset({Tensor, nn.Parameter})


class _Likeness(NamedTuple):
    """Two whose lists hold the same show the same model.

    Attributes:
        parts: all modules' parameters and children: these very ones.
        held: the optimizers' parameters, likewise.
        kinds: classes of the modules and of the parameters: a lazy one keeps its identity when it materialises.
        sizes: of the parameters: one that grows through `.data` keeps its identity.
        trainable: `requires_grad` of the parameters.
    """

    parts: list[Any]
    held: list[Tensor]
    kinds: list[type]
    sizes: list[int]
    trainable: list[bool]


class ModelNow:
    """Tells at every step whether modules or parameters were added, replaced, resized, frozen or unfrozen.

    Attributes:
        is_large: so many parameters that they are looked at in turns, where not all need be.
        replaced: path -> the step since which a parameter that stood there is the model's no more, though an optimizer
            holds it still.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.replaced: dict[str, int] = {}
        self._num_looks = 0
        self._kinds_of: list[SameKind] = []
        self._stamps: list[int] | None = None
        self._list()
        self._last = self._take()
        self._frozen = self._frozen_now()

    def _list(self) -> None:
        # What a scripted module holds comes as new objects at every look.
        self._modules: list[Any] = [m for m in self._model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        # Looking their parts up costs half of asking for them; some have made properties of these.
        self._plain = [m for m in self._modules if vars(m).keys() >= set(_PARTS)]
        self._odd = [m for m in self._modules if not vars(m).keys() >= set(_PARTS)]
        self._vars = list(map(vars, self._plain))
        named = list(self._model.named_parameters())
        params = {id(p): p for _, p in named} | {id(p): p for p in _held(self._optimizers)}
        self._params = list(params.values())
        # DeepSpeed empties and fills what it has split, as a pass goes on.
        self._sized = [p for p in self._params if not (isinstance(p, UninitializedParameter) or hasattr(p, "ds_id"))]
        self._is_lazy = any(isinstance(p, UninitializedParameter) for p in self._params) or any(
            isinstance(m, LazyModuleMixin) for m in self._modules
        )
        self._are_plain = _PLAIN.issuperset(map(type, self._params)) and len(self._sized) == len(self._params)
        self._shares = _shares_of(self._params)
        self._kinds_of = [SameKind() for _ in self._shares]
        self.is_large = len(self._shares) > 1
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        self._known |= {id(p): (weakref.ref(p), clean_path(path)) for path, p in named}

    def _frozen_now(self) -> list[Tensor]:
        return [p for p, is_trained in zip(self._params, self._last.trainable, strict=True) if not is_trained]

    def _kinds(self) -> list[type]:
        return [*map(type, self._modules), *map(type, self._params)]

    def _take(self) -> _Likeness:
        sizes, trainable = list(map(Tensor.numel, self._sized)), list(map(_REQUIRES_GRAD, self._params))
        return _Likeness(self._parts(), _held(self._optimizers), self._kinds(), sizes, trainable)

    def _parts(self) -> list[Any]:
        dicts = list(chain.from_iterable(map(_LOOKED_UP, self._vars)))
        self._stamps = stamps_of(dicts)
        dicts += chain.from_iterable(map(_ASKED, self._odd))
        return list(chain.from_iterable(map(dict.values, filter(None, dicts))))

    def _has_same_parts(self) -> bool:
        """Whether modules and optimizers hold what they held."""
        last, held = self._last, list[Tensor]()
        # Asking each dictionary for its stamp takes a third of what walking through all that they hold does. They are
        # looked up anew: a container may put another one in the place of its own.
        stamps = None if self._odd else stamps_of(chain.from_iterable(map(_LOOKED_UP, self._vars)))
        if (stamps is None or stamps != self._stamps) and not _are(self._parts(), last.parts):
            return False
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                held += group["params"]
        # By identity: tensors compare by their elements.
        return len(held) == len(last.held) and all(map(is_, held, last.held))

    def look(self, *, at_all: bool = True) -> str:
        """Return what is another since the last look: `FLAGS`, `PARTS`, or "" for nothing.

        Args:
            at_all: whether each parameter is of the size it was, and trained as it was, is asked of all. Else of some
                of thousands at each look, in turns, and of all that were frozen whether they still are.
        """
        self._num_looks += 1
        is_close = self._is_lazy or self._num_looks % _RARELY == 0
        if is_close:
            self._vars = list(map(vars, self._plain))
        last, same = self._last, self._has_same_parts()
        # While nothing is recorded nothing seems to require a gradient.
        asks_kind = same and self._are_plain and torch.is_grad_enabled()
        others: list[int] = []
        if asks_kind:
            # One that is frozen and gets a gradient all the same is missed by nobody who counts gradients.
            at_all = at_all or any(map(_REQUIRES_GRAD, self._frozen))
            turns = range(len(self._shares)) if at_all else (self._num_looks % len(self._shares),)
            others += [turn for turn in turns if not self._kinds_of[turn].holds(self._shares[turn])]
        as_before = asks_kind and not others
        same = same and (as_before or list(map(Tensor.numel, self._sized)) == last.sizes)
        if not same or (is_close and self._kinds() != last.kinds):
            self._list()
            self._last = self._take()
            self._frozen = self._frozen_now()
            return PARTS
        trainable = last.trainable if as_before else list(map(_REQUIRES_GRAD, self._params))
        for turn in others:
            self._kinds_of[turn].learn(self._shares[turn])
        if trainable == last.trainable:
            return ""
        self._last = last._replace(trainable=trainable)
        self._frozen = self._frozen_now()
        return FLAGS

    def known_paths(self) -> Mapping[int, str]:
        """Return id -> path of all living parameters that are the model's, or once were."""
        return {key: path for key, (_, path) in self._known.items()}

    def note_replaced(self, paths: Iterable[str], step: int) -> None:
        """Remember since when these are gone."""
        self.replaced = {path: self.replaced.get(path, step) for path in paths}


def _are(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _shares_of(params: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    if len(params) <= 2 * _AT_A_LOOK:
        return [params]
    return [params[first : first + _AT_A_LOOK] for first in range(0, len(params), _AT_A_LOOK)]


def _held(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return list(chain.from_iterable([group["params"] for o in optimizers for group in o.param_groups]))
