"""FSDP1's flat parameters, taken apart.

`FullyShardedDataParallel` lays the parameters of a block end to end in a flat one, cuts that into equal pieces, one for
each rank, and leaves rank-local views, or the flat parameter itself, in the model. Nothing in these tensors says that
they are pieces, nor of what: the flat parameter's own notes do, and are read here alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import UnreadableError
from ._memory import identity
from ._pieces import Piece, StandIn, Whole, local_of

__all__ = ["FlatPart", "Flats", "is_flat_sharded"]


class FlatPart(StandIn):
    """One parameter in FSDP1's flat parameter: the elements of it that lie on this rank, and their gradient.

    Under `use_orig_params=True` the optimizer holds a view for each parameter, else the flat parameter itself.
    """

    _flat: weakref.ref[Tensor]
    _shape: torch.Size
    _strides: tuple[int, ...]
    _offset: int
    _numel: int
    _at: int

    @staticmethod
    def of(handle: Any, number: int, num_holders: int) -> FlatPart:
        """Return what stands for a parameter of a handle's flat parameter."""
        flat = handle.flat_param
        info = flat._shard_param_infos[number]
        offset, numel, start = (info[1], info[2], info[3]) if info[0] else (0, 0, 0)
        shape = flat._shapes[number]
        strides = tuple(flat._strides[number])
        whole = None
        if handle.uses_sharded_strategy:
            most = min(flat._numels[number], flat._sharded_size.numel())
            whole = Whole(shape, strides, start, most, handle.process_group, num_holders)
        part: FlatPart = Tensor._make_subclass(FlatPart, _cut(_shard(flat), offset, numel, whole, shape, strides))
        part.whole, part._offset, part._numel = whole, offset, numel
        part._flat = weakref.ref(flat)
        part._behind = part._flat if flat._params is None else weakref.ref(flat._params[number])
        part._shape, part._strides, part._at = shape, strides, identity(_shard(flat))
        return part

    def settle(self) -> None:
        flat = self._flat()
        if flat is not None and identity(shard := _shard(flat)) != self._at:
            self._at = identity(shard)
            self.data = self._cut(shard)

    def part_of(self, value: Any) -> Any:
        flat = self._flat()
        is_row = isinstance(value, Tensor) and self.behind is flat and flat is not None and value.shape == flat.shape
        return self._cut(value) if is_row else value

    def _cut(self, row: Tensor) -> Tensor:
        return _cut(row, self._offset, self._numel, self.whole, self._shape, self._strides)

    @property
    def grad(self) -> Tensor | None:
        """A piece of the gradient, empty where this rank has none of it; None where nobody has."""
        flat, behind = self._flat(), self._behind()
        if flat is None or behind is None or not behind.requires_grad:
            return None
        found = behind.grad
        if behind is flat:
            # Of another size between micro-batches that are not reduced.
            if found is None or found.numel() != _shard(flat).numel():
                return None
            found = self._cut(found.detach())
        if self.whole is None:
            return found
        if found is None:
            nothing = torch.empty(0, dtype=self.dtype, device=self.device)
            return Piece.of(nothing, self.whole, is_absent=self._numel > 0)
        return Piece.of(found.detach().view(-1), self.whole)

    @grad.setter
    def grad(self, new: Tensor | None) -> None:
        flat, behind = self._flat(), self._behind()
        assert behind is not None
        if new is None:
            if behind is flat:
                raise UnreadableError(
                    "a single parameter can't be left out of a step while it lies in a flat one: give FSDP "
                    "`use_orig_params=True`, or skip the whole step"
                )
            behind.grad = None
            return
        own = self.grad
        if own is not None and own.numel() == new.numel() and identity(own) != identity(new):
            with torch.no_grad():
                local_of(own).copy_(local_of(new).reshape(own.shape))


def _shard(flat: Any) -> Tensor:
    """Return a flat parameter's part on this rank, also while all of it is put together for a pass."""
    data: Tensor = flat.data
    return data if data.numel() == flat._sharded_size.numel() else flat._local_shard


def _cut(
    row: Tensor, offset: int, numel: int, whole: Whole | None, shape: torch.Size, strides: tuple[int, ...]
) -> Tensor:
    part = row.detach()[offset : offset + numel]
    return part if whole is not None else part.as_strided(shape, strides)


class Flats:
    """The flat parameters of a model.

    Attributes:
        known: their ids.
        parts: id of a view in the model -> what stands in for it.
        inside: id of a module -> names, and what stands for parameters of it that are nowhere but in a flat one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.known: set[int] = set()
        self.parts: dict[int, nn.Parameter] = {}
        self.inside: dict[int, list[tuple[str, nn.Parameter]]] = {}
        self._whole: set[int] = set()
        for handle, num_holders in _handles(model):
            flat = handle.flat_param
            try:
                self._note(handle, _parts(handle, num_holders))
            except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
                continue  # another torch's notes: not understood
            self.known.add(id(flat))

    def _note(self, handle: Any, parts: list[FlatPart] | None) -> None:
        flat = handle.flat_param
        if parts is None:
            self._whole.update(map(id, flat._params))
            return
        for part, info in zip(parts, flat._param_infos, strict=True):
            if part.behind is flat:
                self.inside.setdefault(id(info.module), []).append((info.param_name, part))
            else:
                self.parts[id(part.behind)] = part

    def is_cut(self, p: Tensor) -> bool:
        """Whether a tensor lies in a flat parameter that is not known."""
        is_flat = getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
        return bool(is_flat) and not isinstance(p, FlatPart) and id(p) not in self.parts and id(p) not in self._whole


def is_flat_sharded(module: Any) -> bool:
    """Return whether this is FSDP1's wrapper: without it nobody knows what lies in the flat parameter of the root."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return kind is not None and isinstance(module, kind)


def _handles(model: nn.Module) -> Iterator[tuple[Any, int]]:
    """Yield what looks after each flat parameter of FSDP1, and how many ranks hold pieces of it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for module in model.modules():
        handle = vars(module).get("_handle") if is_flat_sharded(module) else None
        if handle is not None:
            copies = vars(module).get("_inter_node_pg")
            yield handle, handle.process_group.size() * (1 if copies is None else copies.size())


def _parts(handle: Any, num_holders: int) -> list[FlatPart] | None:
    """Return what stands for the parameters in a flat one; None where each has all of its own elements."""
    flat = handle.flat_param
    if flat._params is not None and not handle.uses_sharded_strategy:
        return None
    if any(extension is not None for extension in flat._param_extensions):
        raise ValueError("pieces of pieces")
    if flat not in _KNOWN:
        _KNOWN[flat] = [FlatPart.of(handle, i, num_holders) for i in range(len(flat._shapes))]
    found: list[FlatPart] = _KNOWN[flat]
    return found


_KNOWN: Any = WeakIdKeyDictionary()
"""Flat parameter -> what stands for the parameters in it: the same for as long as it lives."""
