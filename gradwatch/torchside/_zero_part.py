"""Parameters under DeepSpeed's ZeRO, and their gradients, where its optimizer keeps them between backward and step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnreadableError
from ._memory import identity
from ._pieces import Piece, StandIn, Whole, local_of

__all__ = ["Place", "SplitGradients", "SplitParameters", "WholeGradients", "ZeroPart"]

_ALONE = (
    "a single parameter can't be left out of a step while DeepSpeed steps it in a flat one: skip the whole step, or "
    "freeze the parameter before `deepspeed.initialize`"
)


@dataclass(frozen=True)
class Place:
    """Where the part of a parameter that this rank looks after lies in a ZeRO optimizer's lists.

    Attributes:
        group: number of the flat float32 tensor.
        number: of the gradient among those of that tensor; -1 where this rank has none of it.
        offset: how many elements of the flat tensor lie before the part.
        numel: of the part, without padding.
        start: how many elements of the parameter lie before the part.
        most: elements of the largest part on any rank, or a bound on it.
        process_group: over whose ranks the parts are spread.
    """

    group: int
    number: int
    offset: int
    numel: int
    start: int
    most: int
    process_group: Any


class ZeroPart(StandIn):
    """One parameter under ZeRO: the part of its float32 copy that this rank looks after, and its gradient.

    The gradient is as the last backward of a step leaves it: averaged over ranks and accumulated, still multiplied by
    DeepSpeed's loss scale.
    """

    is_in_optimizer = True
    _zero: weakref.ref[Any]
    _param: weakref.ref[Tensor]
    _place: Place
    _shape: torch.Size
    _at: int

    @classmethod
    def of(cls, zero: Any, p: Tensor, place: Place) -> ZeroPart:
        """Return what stands for a parameter."""
        shape = torch.Size(getattr(p, "ds_shape", p.shape))
        size = dist.get_world_size(place.process_group)
        strides = _contiguous(shape)
        whole = Whole(shape, strides, place.start, place.most, place.process_group, size) if size > 1 else None
        part = cls._made(zero, p, place, _cut(cls._flat_of(zero, place), place, whole, shape))
        part.whole, part._shape = whole, shape
        return part

    @classmethod
    def _made(cls, zero: Any, p: Tensor, place: Place, data: Tensor) -> ZeroPart:
        flat = cls._flat_of(zero, place)
        part: ZeroPart = Tensor._make_subclass(cls, data)
        part._place, part._shape, part._at = place, p.shape, identity(flat)
        part._zero, part._param, part._behind = weakref.ref(zero), weakref.ref(p), weakref.ref(flat)
        return part

    @staticmethod
    def _flat_of(zero: Any, place: Place) -> Tensor:
        """Return the flat float32 tensor that the part lies in."""
        raise NotImplementedError

    def _row(self, zero: Any) -> Tensor | None:
        """Return the part of the gradient, one after another, in DeepSpeed's own memory; None where there is none."""
        raise NotImplementedError

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        found = self._param()
        return found is not None and found.requires_grad

    @property
    def masters(self) -> Sequence[Tensor]:
        """All flat tensors that the ZeRO optimizer steps on this rank."""
        raise NotImplementedError

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer; None once it is gone."""
        return self._zero()

    def settle(self) -> None:
        zero = self._zero()
        flat = None if zero is None else self._flat_of(zero, self._place)
        if flat is not None and identity(flat) != self._at:
            self._at, self._behind = identity(flat), weakref.ref(flat)
            self.data = _cut(flat, self._place, self.whole, self._shape)

    def part_of(self, value: Any) -> Any:
        flat = self._behind()
        is_row = isinstance(value, Tensor) and flat is not None and value.shape == flat.shape
        return _cut(value, self._place, self.whole, self._shape) if is_row else value

    @property
    def grad(self) -> Tensor | None:
        """A piece of the gradient, empty where this rank has none of it; None where nobody has."""
        zero = self._zero()
        if zero is None or not self.requires_grad:
            return None
        place = self._place
        row = self._row(zero) if place.numel else None
        if self.whole is None:
            return None if row is None else row.view(self._shape)
        if row is None:
            nothing = torch.empty(0, dtype=self.dtype, device=self.device)
            return Piece.of(nothing, self.whole, is_absent=place.numel > 0)
        return Piece.of(row, self.whole)

    @grad.setter
    def grad(self, new: Tensor | None) -> None:
        if new is None:
            raise UnreadableError(_ALONE)
        own = self.grad
        if own is not None and own.numel() == new.numel() and identity(own) != identity(new):
            with torch.no_grad():
                local_of(own).copy_(local_of(new).reshape(own.shape))


class SplitGradients(ZeroPart):
    """Stages 1 and 2: the parameters are whole on every rank."""

    @staticmethod
    def _flat_of(zero: Any, place: Place) -> Tensor:
        found: Tensor = zero.single_partition_of_fp32_groups[place.group]
        return found

    @property
    def masters(self) -> Sequence[Tensor]:
        zero = self._zero()
        return () if zero is None else list(zero.single_partition_of_fp32_groups)

    def _row(self, zero: Any) -> Tensor | None:
        place = self._place
        if zero.cpu_offload:
            return _narrowed(self._flat_of(zero, place).grad, place)
        rows = zero.averaged_gradients.get(place.group)
        return None if rows is None else _in_a_row(rows, place.number)


class SplitParameters(ZeroPart):
    """Stage 3: of the parameters, too, every rank has a part, each rounded up to one size."""

    @staticmethod
    def _flat_of(zero: Any, place: Place) -> Tensor:
        found: Tensor = zero.fp32_partitioned_groups_flat[place.group]
        return found

    @property
    def masters(self) -> Sequence[Tensor]:
        zero = self._zero()
        return () if zero is None else list(zero.fp32_partitioned_groups_flat)

    def _row(self, zero: Any) -> Tensor | None:
        place = self._place
        if zero.offload_optimizer:
            return _narrowed(self._flat_of(zero, place).grad, place)
        rows = zero.averaged_gradients.get(place.group)
        return None if rows is None else _in_a_row(rows, place.number)[: place.numel]


class WholeGradients(ZeroPart):
    """Stage 1 in bfloat16 that accumulates in float32: gradients and parameters are whole on every rank."""

    @classmethod
    def of(cls, zero: Any, p: Tensor, place: Place) -> ZeroPart:
        return cls._made(zero, p, place, p.detach())

    @staticmethod
    def _flat_of(zero: Any, place: Place) -> Tensor:
        found: Tensor = zero.fp32_groups_flat_partition[place.group]
        return found

    @property
    def masters(self) -> Sequence[Tensor]:
        zero = self._zero()
        return () if zero is None else list(zero.fp32_groups_flat_partition)

    def settle(self) -> None:
        p = self._param()
        if p is not None and identity(p) != identity(self):
            self.data = p.data

    def part_of(self, value: Any) -> Any:
        return value

    def _row(self, zero: Any) -> Tensor | None:
        place = self._place
        if not zero.fp32_groups_has_gradients[place.group][place.number]:
            return None
        found: Tensor = zero.fp32_groups_gradients[place.group][place.number]
        return found.detach()


def _in_a_row(rows: list[Tensor], number: int) -> Tensor:
    if not rows[number].is_contiguous():
        # DeepSpeed lays them end to end itself when it steps: then what is done to this one counts.
        rows[number] = rows[number].contiguous()
    return rows[number].detach().view(-1)


def _narrowed(row: Tensor | None, place: Place) -> Tensor | None:
    return None if row is None else row.detach().view(-1)[place.offset : place.offset + place.numel]


def _cut(row: Tensor, place: Place, whole: Whole | None, shape: torch.Size) -> Tensor:
    part = row.detach().view(-1)[place.offset : place.offset + place.numel]
    return part if whole is not None else part.view(shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
