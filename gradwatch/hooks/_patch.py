"""Ready-made interventions: patch, zero, mean, scale, add, noise; on a whole tensor, positions, heads, or an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index as whole_number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._text import as_bytes
from ..errors import ConfigError
from ._functions import Intervention
from ._points import PAIR_PORTS, READ_AT, Point

__all__ = ["add", "mean", "noise", "numbers_of", "patch", "scale", "zero"]

Selection = int | slice | Sequence[int] | Tensor | None


class _Where:
    """Which part of a tensor is meant.

    Args:
        positions: along `position_dim`.
        heads: along the dimension before the last: of an alias that shows heads (`attn.hook_z`), or, with `num_heads`,
            of any tensor whose last dimension is heads times width.
        index: anything that indexes the tensor, instead of the two.
    """

    def __init__(
        self,
        positions: Selection = None,
        heads: Selection = None,
        *,
        index: Any = None,
        num_heads: int | None = None,
        position_dim: int = 1,
    ) -> None:
        if index is not None and (positions is not None or heads is not None):
            raise ConfigError("say where by `positions` and `heads`, or by `index`, not both.")
        if num_heads is not None and not num_heads >= 1:
            raise ConfigError(f"`num_heads` is at least 1. Got {num_heads!r}.")
        self.positions, self.heads, self.index = numbers_of(positions, "positions"), numbers_of(heads, "heads"), index
        self.num_heads, self.position_dim = num_heads, position_dim

    def at_positions(self, positions: Selection) -> _Where:
        """Return the same part at other positions."""
        if self.positions is None:
            raise ConfigError("`source_positions` go with `positions`.")
        return _Where(positions, self.heads, num_heads=self.num_heads, position_dim=self.position_dim)

    @property
    def is_everything(self) -> bool:
        return self.positions is None and self.heads is None and self.index is None

    def split(self, tensor: Tensor) -> Tensor:
        """Return the tensor with heads apart, where `num_heads` says how many."""
        if self.num_heads is None or self.heads is None:
            return tensor
        if tensor.shape[-1] % self.num_heads:
            raise ValueError(f"a last dimension of {tensor.shape[-1]} does not split into {self.num_heads} heads")
        return tensor.unflatten(-1, (self.num_heads, -1))

    def of(self, tensor: Tensor, point: Point) -> Any:
        """Return the index into a tensor of this shape; dimensions are kept. Positions of pairs are the queries'."""
        if self.index is not None:
            return self.index
        where: list[Any] = [slice(None)] * tensor.ndim
        are_pairs = READ_AT.get(point.port, point.port) in PAIR_PORTS
        position_dim = 2 if are_pairs else self.position_dim
        if self.positions is not None:
            where[position_dim] = _kept(self.positions, tensor.shape[position_dim], "position")
        if self.heads is not None:
            if tensor.ndim < 3:
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no heads: give `num_heads`")
            head_dim = 1 if are_pairs else tensor.ndim - 2
            where[head_dim] = _kept(self.heads, tensor.shape[head_dim], "head")
        lists = [i for i, w in enumerate(where) if isinstance(w, Tensor)]
        if len(lists) == 2:  # every pair of them, not one of each
            first, second = lists
            where[first] = where[first].unsqueeze(-1)
            if second != first + 1:
                raise ValueError("positions and heads as lists need neighbouring dimensions: use slices, or `index`")
        return tuple(where)


def numbers_of(which: Selection, what: str) -> int | slice | list[int] | None:
    """Return positions or heads as numbers or a slice; a mask (True where it is meant) as the numbers of its Trues."""
    if which is None or isinstance(which, slice):
        return which
    if isinstance(which, Tensor):
        which = which.tolist()
    try:
        if isinstance(which, bool):
            raise TypeError
        if not isinstance(which, Iterable):
            return whole_number(which)
        given = list(which)
        are_mask = bool(given) and all(isinstance(i, (bool, np.bool_)) for i in given)
        numbers = [i for i, on in enumerate(given) if on] if are_mask else [whole_number(i) for i in given]
    except TypeError:
        raise ConfigError(f"`{what}` is a number, a list of numbers, a mask, or a slice. Got {which!r}.") from None
    if not numbers:
        raise ConfigError(f"`{what}` names none: {which!r}.")
    return numbers


def _kept(which: Selection, size: int, what: str) -> Any:
    if isinstance(which, slice):
        return which
    numbers: Any = [which] if isinstance(which, int) else which
    for number in numbers:
        if not -size <= number < size:
            raise ValueError(f"there is no {what} {number}: there are {size}")
    return slice(numbers[0] % size, numbers[0] % size + 1) if len(numbers) == 1 else torch.tensor(numbers) % size


class _Partial(Intervention):
    """Changes one part of a tensor; the rest is passed on as it is.

    Attributes:
        is_pure: it never changes in place what it is shown.
        is_fresh: what `change` returns belongs to nobody else, so that the model may change it in place.
    """

    is_pure = True
    is_fresh = True

    def __init__(self, where: _Where, **metadata: Any) -> None:
        super().__init__(None, **metadata)
        self.where = where

    def intervene(self, tensor: Tensor, point: Point) -> Tensor:
        if self.where.is_everything:
            changed = self.change(tensor, tensor, point).expand_as(tensor)
            return changed if self.is_fresh else changed.clone(memory_format=torch.contiguous_format)
        apart = self.where.split(tensor)
        index = self.where.of(apart, point)
        changed = apart.clone()
        changed[index] = self.change(apart[index], apart, point)
        return changed.reshape(tensor.shape)

    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        """Return what takes the place of `part`; must broadcast to it."""
        raise NotImplementedError


class _Patch(_Partial):
    is_fresh = False

    def __init__(self, source: Any, where: _Where, source_positions: Selection = None) -> None:
        super().__init__(where, kind="patch")
        self.source = source
        self.origin = where if source_positions is None else where.at_positions(source_positions)

    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        value = _looked_up(self.source, point)
        value = value.to(device=part.device, dtype=part.dtype)
        if value.shape != whole.shape and self.where.split(value).shape == whole.shape:
            value = self.where.split(value)
        if value.shape == whole.shape and not self.where.is_everything:
            return value[self.origin.of(value, point)]
        return value.expand_as(part)


def _looked_up(source: Any, point: Point) -> Tensor:
    """Return the tensor for this point: of a cache, a mapping, a function of the point, or the tensor itself."""
    if isinstance(source, Mapping):
        value = source[point.name, point.call] if hasattr(source, "calls") else source[point.name]
        value = value[point.leaf] if isinstance(value, Mapping) else value
    else:
        value = source(point) if callable(source) else source
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


class _Scale(_Partial):
    def __init__(self, factor: float | Tensor, where: _Where) -> None:
        super().__init__(where, kind="scale", factor=factor)
        self.factor = factor

    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        factor = self.factor
        return part * (factor.to(device=part.device, dtype=part.dtype) if isinstance(factor, Tensor) else factor)


class _Zero(_Partial):
    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        return torch.zeros_like(part)


class _Mean(_Partial):
    is_fresh = False

    def __init__(self, source: Any, dims: tuple[int, ...], where: _Where) -> None:
        super().__init__(where, kind="mean")
        self.source, self.dims = source, dims

    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        value = part
        if self.source is not None:
            value = self.where.split(_looked_up(self.source, point).to(device=part.device, dtype=part.dtype))
            value = value if self.where.is_everything else value[self.where.of(value, point)]
        return value.mean(dim=self.dims, keepdim=True).expand_as(part)


class _Add(_Partial):
    def __init__(self, value: Any, factor: float, where: _Where) -> None:
        super().__init__(where, kind="add", factor=factor)
        self.value, self.factor = value, factor

    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        value = _looked_up(self.value, point).to(device=part.device, dtype=part.dtype)
        return part + self.factor * value


class _Noise(_Partial):
    """The draw depends on (seed, point, step, call) alone: recomputation sees the same, the global RNG nothing."""

    def __init__(self, std: float, relative: bool, seed: int, where: _Where) -> None:
        super().__init__(where, kind="noise", std=std)
        self.std, self.relative, self.seed = std, relative, seed

    def change(self, part: Tensor, whole: Tensor, point: Point) -> Tensor:
        text = f"{self.seed}/{point.spot.place}/{point.leaf}/{point.step}/{point.call}"
        generator = torch.Generator(device=part.device).manual_seed(_stable_hash(text))
        drawn = torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.float32).to(part.dtype)
        size = part.detach().std() * self.std if self.relative else self.std
        return part + drawn * size


def _stable_hash(text: str) -> int:
    number = 1469598103934665603  # FNV-1a, 64 bit
    for byte in as_bytes(text):
        number = ((number ^ byte) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
    return number >> 1


def patch(
    source: Any,
    *,
    positions: Selection = None,
    heads: Selection = None,
    source_positions: Selection = None,
    **where: Any,
) -> Intervention:
    """Return an intervention that puts in what was there in another run.

    Args:
        source: a `Cache` (the value at the same point and call), a mapping by name, a function of the point, a tensor.
        positions: only these (dimension 1).
        heads: only these.
        source_positions: where they come from in the source, if not from the same positions; as many of them.
        **where: `index`, `num_heads`, `position_dim`: see `zero`.
    """
    return _Patch(source, _Where(positions, heads, **where), source_positions)


def zero(*, positions: Selection = None, heads: Selection = None, **where: Any) -> Intervention:
    """Return an intervention that puts in zeros (ablates).

    Args:
        positions: only these, along `position_dim` (1): a number, list, mask or slice.
        heads: only these, along the dimension before the last: at aliases that show heads apart, as `attn.hook_z`, or
            anywhere with `num_heads`.
        **where: `index` (anything that indexes the tensor, instead of the two), `num_heads`, `position_dim`.
    """
    return _Zero(_Where(positions, heads, **where), kind="zero")


def mean(
    source: Any = None,
    *,
    dims: int | Sequence[int] = 0,
    positions: Selection = None,
    heads: Selection = None,
    **where: Any,
) -> Intervention:
    """Return an intervention that puts in the mean over `dims` (the batch), of this tensor or of a `source`.

    Args:
        source: None, or as for `patch`: the run whose mean it is.
        dims: averaged over.
        positions: only these.
        heads: only these.
        **where: see `zero`.
    """
    return _Mean(source, (dims,) if isinstance(dims, int) else tuple(dims), _Where(positions, heads, **where))


def scale(
    factor: float | Tensor, *, positions: Selection = None, heads: Selection = None, **where: Any
) -> Intervention:
    """Return an intervention that multiplies; at `grad_output` it scales the module's own weight gradients too."""
    return _Scale(factor, _Where(positions, heads, **where))


def add(
    value: Any, *, factor: float = 1.0, positions: Selection = None, heads: Selection = None, **where: Any
) -> Intervention:
    """Return an intervention that adds `factor * value` (a number, a steering vector, a source as for `patch`)."""
    return _Add(value, factor, _Where(positions, heads, **where))


def noise(
    std: float,
    *,
    relative: bool = False,
    seed: int = 0,
    positions: Selection = None,
    heads: Selection = None,
    **where: Any,
) -> Intervention:
    """Return an intervention that adds Gaussian noise, from a generator of its own.

    Args:
        std: its standard deviation; with `relative`, in units of the part's own.
        relative: see `std`.
        seed: equal seeds give equal noise at equal (point, step, call).
        positions: only these.
        heads: only these.
        **where: see `zero`.
    """
    if not std >= 0:
        raise ConfigError(f"`std` is a number from 0 up. Got {std!r}.")
    return _Noise(std, relative, seed, _Where(positions, heads, **where))
