"""Output units of weights: which axis they lie on, and their sums and norms, also where ranks hold pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import GradwatchError
from ..torchside import Pipeline, clean_path, parameters_of, shape_of, whole_of, wide_dtype
from ._tensors import as_dtensor, local_part

__all__ = [
    "FIRST_AXIS",
    "UnitLayout",
    "head_paths",
    "num_unit_elements",
    "unit_layouts",
    "unit_norms",
    "unit_sums",
    "unit_view",
]


@dataclass(frozen=True)
class UnitLayout:
    """Where the output units of a weight lie.

    Attributes:
        axis: of the weight.
        groups: of a transposed convolution, whose weight (in, out / groups, ...) mixes them into the first axis.
    """

    axis: int = 0
    groups: int = 1


FIRST_AXIS = UnitLayout()
"""Where they lie in all layers that come with torch but transposed convolutions."""
# Dimensions inside a unit on the first axis, by the number of dimensions.
_INSIDE = [tuple(range(1, ndim)) for ndim in range(65)]


def unit_layouts(model: nn.Module) -> dict[str, UnitLayout]:
    """Return the layouts that are not "first axis", by parameter path: weights of transposed convolutions."""
    layouts: dict[str, UnitLayout] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            layouts[clean_path(f"{path}.weight" if path else "weight")] = UnitLayout(1, module.groups)
    return layouts


def head_paths(model: nn.Module) -> frozenset[str]:
    """Return the paths of the parameters of the last layer: the last module that owns a trainable weight of two or
    more dimensions. A weight tied to an earlier one counts under its first name. In a pipeline the last stage says it
    to the other ranks."""
    if not isinstance(model, Pipeline):
        return _head(model)
    return frozenset().union(*model.told("head", _head(model) if model.has_last else frozenset()))


def _head(model: nn.Module) -> frozenset[str]:
    canonical = {id(owned.param): owned.path for owned in parameters_of(model)}
    own: dict[int, list[Tensor]] = {}
    for owned in parameters_of(model):
        own.setdefault(id(owned.owner), []).append(owned.param)
    head: frozenset[str] = frozenset()
    for module in model.modules():
        shared = [p for p in module._parameters.values() if p is not None and id(p) in canonical]
        held = {id(p): p for p in (*own.get(id(module), ()), *shared)}
        if any(p.requires_grad and len(shape_of(p)) >= 2 for p in held.values()):
            head = frozenset(canonical[key] for key in held)
    return head


def unit_view(tensor: Tensor, layout: UnitLayout) -> tuple[Tensor, tuple[int, ...]]:
    """Return a view of the local part, and the dimensions of it that lie inside a unit: of a run of elements, none.

    Raises:
        GradwatchError: ranks hold pieces of a grouped transposed convolution, whose groups can't be told apart.
    """
    local = local_part(tensor)
    if whole_of(tensor) is not None:
        return local, ()
    if layout.groups == 1:
        return local, tuple(d for d in range(local.ndim) if d != layout.axis)
    if local.shape != tensor.shape:
        raise GradwatchError(
            f"A gradient of shape {tuple(tensor.shape)} belongs to a transposed convolution of {layout.groups} groups "
            "and is sharded: its output units can't be told apart. Leave this parameter out with `paths` or `head`."
        )
    local = local.view(layout.groups, local.shape[0] // layout.groups, *local.shape[1:])
    return local, tuple(d for d in range(local.ndim) if d not in (0, 2))


@torch.no_grad()
def unit_norms(tensor: Tensor, layout: UnitLayout = FIRST_AXIS) -> Tensor:
    """Return the L2 norm of each output unit, whole also where ranks hold pieces of a unit.

    At least float32, in a shape that broadcasts against `unit_view`. Reads nothing back.
    """
    if whole_of(tensor) is not None:
        return _over_units(tensor, layout, local_part(tensor).to(wide_dtype(tensor.device)).square()).sqrt_()
    if layout is FIRST_AXIS and as_dtensor(tensor) is None:
        return torch.linalg.vector_norm(tensor, dim=_INSIDE[tensor.ndim], keepdim=True, dtype=_wide(tensor.dtype))
    view, inside = unit_view(tensor, layout)
    norms = torch.linalg.vector_norm(view, dim=inside, keepdim=True, dtype=_wide(view.dtype))
    groups = _groups_inside(tensor, layout)
    if not groups:
        return norms
    squares = norms.to(wide_dtype(norms.device)).square_()
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt_().to(norms.dtype)


@torch.no_grad()
def unit_sums(tensor: Tensor, layout: UnitLayout = FIRST_AXIS) -> Tensor:
    """Return the sum of each output unit's elements, as `unit_norms` does norms."""
    if whole_of(tensor) is not None:
        return _over_units(tensor, layout, local_part(tensor).to(wide_dtype(tensor.device)))
    view, inside = unit_view(tensor, layout)
    sums = view.sum(dim=inside, keepdim=True, dtype=_wide(view.dtype))
    for group in _groups_inside(tensor, layout):
        dist.all_reduce(sums, group=group)
    return sums


def num_unit_elements(tensor: Tensor, layout: UnitLayout = FIRST_AXIS) -> int:
    """Return the number of elements of each output unit, of the whole tensor."""
    shape = shape_of(tensor)
    return math.prod(shape) // max(shape[layout.axis] * layout.groups, 1)


def _over_units(piece: Tensor, layout: UnitLayout, values: Tensor) -> Tensor:
    """Return, for each element of a piece, the sum of the values of its unit, on whichever ranks they lie.

    In the wide type: a unit's squares may leave that of the gradient.
    """
    whole = whole_of(piece)
    assert whole is not None
    if whole.is_apart:
        return values
    elements = torch.arange(whole.start, whole.start + len(values), device=values.device)
    units = whole.places(elements, layout.axis)
    if layout.groups > 1:
        units += whole.places(elements, 0) // (whole.shape[0] // layout.groups) * whole.shape[layout.axis]
    sums = torch.zeros(whole.shape[layout.axis] * layout.groups, dtype=values.dtype, device=values.device)
    sums.index_add_(0, units, values)
    dist.all_reduce(sums, group=whole.group)
    return sums.index_select(0, units)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _groups_inside(tensor: Tensor, layout: UnitLayout) -> list[Any]:
    """Return the process groups over which units are split: those of placements that shard another axis than theirs."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return []
    mesh = sharded.device_mesh
    # Not `is_shard()`: that is False for the _StridedShard of FSDP2 on top of tensor parallel.
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(sharded.placements)
        if not placement.is_replicate() and getattr(placement, "dim", None) != layout.axis and mesh.size(dim) > 1
    ]
