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

from ..torchside import SameKind, clean_path

__all__ = ["FLAGS", "PARTS", "ModelNow"]

FLAGS, PARTS = "flags", "parts"
"""What can be another: `requires_grad` alone; anything else."""

_PARTS = ("_parameters", "_modules")
_LOOKED_UP, _ASKED = itemgetter(*_PARTS), attrgetter(*_PARTS)
_RARELY = 16
"""Looks after which it is asked whether modules have their attributes where they had them, and are of their class. Of
lazy ones that is asked at every look."""
_REQUIRES_GRAD = attrgetter("requires_grad")
_PLAIN = frozenset({Tensor, nn.Parameter})


class _Likeness(NamedTuple):
    """Two whose lists hold the same show the same model.

    Attributes:
        parts: all modules' parameters and children, and the optimizers' parameters: these very ones.
        kinds: classes of the modules and of the parameters: a lazy one keeps its identity when it materialises.
        sizes: of the parameters: one that grows through `.data` keeps its identity.
        trainable: `requires_grad` of the parameters.
    """

    parts: list[Any]
    kinds: list[type]
    sizes: list[int]
    trainable: list[bool]


class ModelNow:
    """Tells at every step whether modules or parameters were added, replaced, resized, frozen or unfrozen.

    Attributes:
        replaced: path -> the step since which a parameter that stood there is the model's no more, though an optimizer
            holds it still.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.replaced: dict[str, int] = {}
        self._num_looks = 0
        self._kind = SameKind()
        self._list()
        self._last = self._take()

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
        self._kind.forget()
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        self._known |= {id(p): (weakref.ref(p), clean_path(path)) for path, p in named}

    def _parts(self) -> list[Any]:
        # Children and parameters are looked up anew: a container may put another dict in the place of its own.
        held = chain.from_iterable(chain(map(_LOOKED_UP, self._vars), map(_ASKED, self._odd)))
        parts: list[Any] = list(chain.from_iterable(map(dict.values, filter(None, held))))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                parts += group["params"]
        return parts

    def _kinds(self) -> list[type]:
        return [*map(type, self._modules), *map(type, self._params)]

    def _take(self) -> _Likeness:
        sizes, trainable = list(map(Tensor.numel, self._sized)), list(map(_REQUIRES_GRAD, self._params))
        return _Likeness(self._parts(), self._kinds(), sizes, trainable)

    def look(self) -> str:
        """Return what is another since the last look: `FLAGS`, `PARTS`, or "" for nothing."""
        self._num_looks += 1
        is_close = self._is_lazy or self._num_looks % _RARELY == 0
        if is_close:
            self._vars = list(map(vars, self._plain))
        parts, last = self._parts(), self._last
        # By identity: tensors compare by their elements.
        same = len(parts) == len(last.parts) and all(map(is_, parts, last.parts))
        # While nothing is recorded nothing seems to require a gradient.
        asks_kind = same and self._are_plain and torch.is_grad_enabled()
        as_before = asks_kind and self._kind.holds(self._params)
        same = same and (as_before or list(map(Tensor.numel, self._sized)) == last.sizes)
        if not same or (is_close and self._kinds() != last.kinds):
            self._list()
            self._last = self._take()
            return PARTS
        trainable = last.trainable if as_before else list(map(_REQUIRES_GRAD, self._params))
        if asks_kind and not as_before:
            self._kind.learn(self._params)
        if trainable == last.trainable:
            return ""
        self._last = last._replace(trainable=trainable)
        return FLAGS

    def known_paths(self) -> Mapping[int, str]:
        """Return id -> path of all living parameters that are the model's, or once were."""
        return {key: path for key, (_, path) in self._known.items()}

    def note_replaced(self, paths: Iterable[str], step: int) -> None:
        """Remember since when these are gone."""
        self.replaced = {path: self.replaced.get(path, step) for path in paths}


def _held(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]
