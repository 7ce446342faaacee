"""DeepSpeed's ZeRO, taken apart.

Its optimizer lays the parameters of a group end to end, keeps in float32 what this rank looks after, and leaves no
gradient in `.grad`: a backward ends with the pieces of it that this rank's copy is stepped with. What lies where is
read from the ZeRO optimizer's own lists, here alone; the engine is found by the hooks that it leaves on the module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ._zero_part import Place, SplitGradients, SplitParameters, WholeGradients, ZeroPart

__all__ = ["ZeroPart", "ZeroParts", "engine_of", "is_split_by_zero"]


def engine_of(model: Any) -> Any:
    """Return the DeepSpeed engine that trains a model, given the engine or the module inside; None where none does."""
    kind = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if kind is None or not isinstance(model, nn.Module):
        return None
    if isinstance(model, kind):
        return model
    # Nothing else leads from the module to the engine.
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    cells = [cell for hook in hooks for cell in getattr(hook, "__closure__", None) or ()]
    held = [cell.cell_contents for cell in cells if _is_filled(cell)]
    return next((one for one in held if isinstance(one, kind) and one.module is model), None)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class ZeroParts:
    """The parameters of a model under ZeRO.

    Attributes:
        parts: id of a parameter -> what stands in for it.
        why: where the engine's optimizer is of a form that is not understood: which, in a sentence; else "".
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts: dict[int, nn.Parameter] = {}
        self.why = ""
        engine = engine_of(model)
        zero = None if engine is None else engine.optimizer
        if zero is None or not type(zero).__module__.startswith("deepspeed."):
            return
        form = _FORMS.get(type(zero).__qualname__)
        if form is None:
            self.why = _UNKNOWN.format(type(zero).__name__) if _is_split(zero) else ""
            return
        kind, places = form
        try:
            self.why = _why_not(zero)
            for p, place in () if self.why else places(zero):
                self.parts[id(p)] = _known(kind, zero, p, place)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
            self.parts, self.why = {}, _UNKNOWN.format(f"this release's {type(zero).__name__}")

    def why_strange(self, p: Tensor) -> str:
        """Return why nothing can be said of a parameter whose gradient DeepSpeed keeps elsewhere; "" of any other."""
        if id(p) in self.parts or not is_split_by_zero(p):
            return ""
        return self.why or ("" if not p.requires_grad else _NO_ENGINE)


def is_split_by_zero(p: Tensor) -> bool:
    """Return whether DeepSpeed's ZeRO has split a parameter, or what it keeps of it."""
    return hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


_NO_ENGINE = (
    "DeepSpeed keeps its gradient in pieces of its own, and no engine that trains this model is found. Give gradwatch "
    "what `deepspeed.initialize` returned: `Watch(engine)`"
)
_UNKNOWN = "DeepSpeed keeps its gradient in pieces of its own, which are not understood as {} keeps them"
_EXPERTS = "DeepSpeed keeps other experts on other ranks under the same names, of which each rank sees its own alone"
_SWAPPED = "DeepSpeed keeps its gradient on a disk between backward and step"
_MODEL_PARALLEL = "DeepSpeed's ZeRO holds a part of it here, and model parallelism others elsewhere"


def _is_split(zero: Any) -> bool:
    return any(base.__name__ == "ZeROOptimizer" for base in type(zero).__mro__)


def _why_not(zero: Any) -> str:
    """Return why the pieces of an optimizer of a known form can't be put together; "" where they can."""
    if getattr(zero, "has_moe_layers", False):
        return _EXPERTS
    if getattr(zero, "swap_optimizer", False):
        return _SWAPPED
    group = getattr(zero, "model_parallel_group", None)
    if group is not None and dist.get_world_size(group) > 1:
        return _MODEL_PARALLEL
    return _UNKNOWN.format("ZenFlow") if getattr(zero, "zenflow", False) else ""


def _places_of_split_gradients(zero: Any) -> Iterator[tuple[Tensor, Place]]:
    for i, group in enumerate(zero.round_robin_bit16_groups):
        processes, size = zero.real_dp_process_group[i], int(zero.partition_size[i])
        first = dist.get_rank(processes) * size
        at = number = 0
        for p in group:
            begin, end = max(at, first), min(at + p.numel(), first + size)
            numel = max(end - begin, 0)
            most = min(p.numel(), size)
            if numel:
                yield p, Place(i, number, begin - first, numel, begin - at, most, processes)
                number += 1
            else:
                yield p, Place(i, -1, 0, 0, 0, most, processes)
            at += p.numel()


def _places_of_split_parameters(zero: Any) -> Iterator[tuple[Tensor, Place]]:
    processes = zero.dp_process_group
    rank = dist.get_rank(processes)
    for i, group in enumerate(zero.fp16_groups):
        offset = 0
        for number, p in enumerate(group):
            size = p.partition_numel()
            numel = min(max(p.ds_numel - rank * size, 0), size)
            start = min(rank * size, p.ds_numel)
            yield p, Place(i, number, offset, numel, start, size, processes)
            offset += size


def _places_of_whole_gradients(zero: Any) -> Iterator[tuple[Tensor, Place]]:
    for i, group in enumerate(zero.bf16_groups):
        for number, p in enumerate(group):
            yield p, Place(i, number, 0, p.numel(), 0, p.numel(), zero.real_dp_process_group[i])


_FORMS: dict[str, tuple[type[ZeroPart], Any]] = {
    "DeepSpeedZeroOptimizer": (SplitGradients, _places_of_split_gradients),
    "DeepSpeedZeroOptimizer_Stage3": (SplitParameters, _places_of_split_parameters),
    "BF16_Optimizer": (WholeGradients, _places_of_whole_gradients),
}


def _known(kind: type[ZeroPart], zero: Any, p: Tensor, place: Place) -> ZeroPart:
    found = _KNOWN.get(p)
    if found is None or found.zero is not zero or found._place != place:
        found = _KNOWN[p] = kind.of(zero, p, place)
    return found


_KNOWN: Any = WeakIdKeyDictionary()
"""Parameter -> what stands in for it: the same for as long as both live."""
