"""Stages of a pipeline: the parameters of a rank's own are tensors like any other, and those of the others are not
here at all. What all ranks know of one another's, and what stands in for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ._paths import clean_path
from ._pieces import Piece, StandIn, Whole

__all__ = ["Away", "Pipeline", "pipeline_of"]


class _Names(NamedTuple):
    """Paths inside a stage: of its parameters, and of its modules."""

    parameters: tuple[str, ...]
    modules: tuple[str, ...]


class Pipeline(nn.Module):
    """The stages that lie on this rank, as one model, whose paths are those of the whole.

    Paths are the stages' own where no two stages have a parameter of one path; else each begins with `stages.N.`.
    Every rank of the pipeline must make one at the same time: they tell each other the names.

    Args:
        stages: number of a stage -> its module, free of wrappers.
        group: process group whose ranks hold the stages; None: all ranks.
        num_parts: micro-batches whose error signals are not averaged when modules see them.

    Attributes:
        parameter_paths, module_paths: of all stages.
        has_last: the last stage is here.
        known: whatever the ranks have told each other since, by what it is about: kept, since it is said once.
    """

    def __init__(self, stages: Mapping[int, nn.Module], group: Any = None, num_parts: int = 1) -> None:
        super().__init__()
        self.group = dist.group.WORLD if group is None else group
        self.num_parts = num_parts
        self.numbers = tuple(sorted(stages))
        for number in self.numbers:
            self.add_module(str(number), stages[number])
        self.known: dict[str, Any] = {}
        self.away: dict[str, Away] = {}
        self._prefix = ""
        named: dict[int, _Names] = {}
        for told in self.told("names", {number: _names(stages[number]) for number in self.numbers}):
            named |= told
        every = [path for names in named.values() for path in names.parameters]
        if len(set(every)) < len(every):
            self._prefix = "stages.{}"
        self.has_last = max(named) in self.numbers
        order = sorted(named)
        self.parameter_paths = tuple(self._path(n, path) for n in order for path in named[n].parameters)
        self.module_paths = tuple(dict.fromkeys(self._path(n, path) for n in order for path in named[n].modules))

    @property
    def training(self) -> bool:
        """Whether any stage is in training mode."""
        return any(module.training for module in self._modules.values() if module is not None)

    @training.setter
    def training(self, mode: bool) -> None:
        """Nothing: the stages know."""

    @property
    def name(self) -> str:
        """What a reader knows this rank's part by."""
        return "stage " + ", ".join(map(str, self.numbers))

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size(self.group)

    def told(self, about: str, mine: Any) -> list[Any]:
        """Return what each rank has to say, in the order of ranks; asked once, and kept."""
        if about not in self.known:
            said: list[Any] = [None] * self.num_ranks
            dist.all_gather_object(said, mine, group=self.group)
            self.known[about] = said
        found: list[Any] = self.known[about]
        return found

    def join(self, params: Iterable[Tensor]) -> None:
        """Say that parameters belong to one of the stages here."""
        for p in params:
            _JOINED[p] = weakref.ref(self)

    def owners(self) -> dict[int, int]:
        """Return id of a module -> the number of the stage that it is in."""
        return {id(module): n for n in reversed(self.numbers) for module in self._stage(n).modules()}

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of all stages here under the paths of the whole; a stage itself stands under its prefix."""
        memo = set() if memo is None else memo
        yield prefix, self
        for number in self.numbers:
            parts = [part for part in (prefix, self._prefix.format(number)) if part]
            yield from self._stage(number).named_modules(memo, ".".join(parts), remove_duplicate)

    def _stage(self, number: int) -> nn.Module:
        found = self._modules[str(number)]
        assert found is not None
        return found

    def _path(self, number: int, path: str) -> str:
        return f"{self._prefix.format(number)}.{path}" if self._prefix else path


def _names(stage: nn.Module) -> _Names:
    parameters = tuple(clean_path(path) for path, _ in stage.named_parameters())
    return _Names(parameters, tuple(filter(None, (clean_path(path) for path, _ in stage.named_modules()))))


class Away(StandIn):
    """Stands for a parameter that lies whole on another rank; or for one that lies here, where it has no gradient.

    It has no elements, and its gradient none.
    """

    _pipeline: weakref.ref[Pipeline]
    _trains: bool
    _is_here: bool

    @staticmethod
    def of(
        pipeline: Pipeline,
        empty: Tensor,
        shape: Sequence[int],
        most: int,
        *,
        trains: bool = True,
        is_here: bool = False,
        p: Tensor | None = None,
    ) -> Away:
        """Return what stands for a parameter of a pipeline.

        Args:
            pipeline: whose.
            empty: no elements, of the parameter's dtype, on the device of this rank.
            shape: of the parameter.
            most: elements of the largest piece of it on any rank.
            trains: it requires a gradient.
            is_here: it lies on this rank, or has.
            p: the parameter itself, where it still does.
        """
        made: Away = Tensor._make_subclass(Away, empty)
        strides = tuple(torch.empty(tuple(shape), device="meta").stride())
        made.whole = Whole(torch.Size(shape), strides, 0, most, pipeline.group, dist.get_world_size(), is_apart=True)
        made._pipeline, made._trains, made._is_here = weakref.ref(pipeline), trains, is_here
        made._behind = weakref.ref(made if p is None else p)
        return made

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        behind = self.behind
        return self._trains if behind is self else behind.requires_grad

    @property
    def grad(self) -> Tensor | None:
        """No elements; where the parameter lies here, the word that there is no gradient."""
        assert self.whole is not None
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return Piece.of(nothing, self.whole, is_absent=self._is_here)

    @grad.setter
    def grad(self, new: Tensor | None) -> None:
        """Nothing: the rank that has it sets it."""


_JOINED: Any = WeakIdKeyDictionary()
"""Parameter of a stage -> its pipeline, for as long as both live."""


def pipeline_of(params: Sequence[Tensor]) -> Pipeline | None:
    """Return the pipeline that parameters are of, all of them or none; None where there is none."""
    if not _JOINED or not params:
        return None
    first = params[0]
    found = first._pipeline if isinstance(first, Away) else _JOINED.get(first)
    return None if found is None else found()
