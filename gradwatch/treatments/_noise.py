"""Adding Gaussian noise that fades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..protocols import Context
from ..torchside import moved, pipeline_of, whole_of
from ._base import BaseTreatment, chosen, read_trigger
from ._checks import check_count, check_number, check_patterns
from ._tensors import as_dtensor, local_part

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["Noise", "add_noise_"]


@torch.no_grad()
def add_noise_(grads: Sequence[Tensor], std: float | Tensor, *, generator: torch.Generator | None = None) -> None:
    """Add Gaussian noise of this standard deviation to every element, in place. Sparse gradients stay."""
    for grad in grads:
        if not grad.is_sparse:
            values = local_part(grad)
            values.add_(torch.empty_like(values).normal_(generator=generator) * std)


@dataclass(frozen=True, eq=False)
class Noise(BaseTreatment):
    """Add Gaussian noise of variance eta / (1 + t) ** gamma at step t.

    Neelakantan et al., "Adding gradient noise improves learning for very deep networks", 2015, arXiv 1511.06807. The
    draws depend on the seed and on how many steps came before, and on nothing else: training's own random
    numbers are not touched, all ranks add the same noise to the same element, and a resumed run goes on as it would
    have.

    Args:
        eta: variance at the first step, for unscaled gradients; the paper takes 0.01, 0.3 or 1.
        gamma: how fast it fades.
        seed: of the draws.
        paths: glob patterns of parameters.
    """

    eta: float = 0.01
    gamma: float = 0.55
    seed: int = field(default=0, kw_only=True)
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: dict[str, int] = field(default_factory=lambda: {"draws": 0}, init=False, repr=False)
    order: ClassVar[int] = 60

    def __post_init__(self) -> None:
        check_number(self, "eta", self.eta, above=0, below=float("inf"))
        check_number(self, "gamma", self.gamma, at_least=0, below=float("inf"))
        check_count(self, "seed", self.seed, at_least=0)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        trigger = read_trigger(context)
        draws = self._memory["draws"]
        self._memory["draws"] = draws + 1
        std = (self.eta / (1 + context.step) ** self.gamma) ** 0.5
        if trigger is False:
            return {"applied": 0.0, "std": 0.0}
        scale = std * part.grad_scale
        if isinstance(trigger, Tensor):
            scale = torch.where(trigger, scale, 0.0)
        pipeline = pipeline_of(part.params)
        stage = () if pipeline is None else (dist.get_rank(pipeline.group),)
        for (device, place), tensors in _by_place(part.grads).items():
            # Seeded anew at each step: what is kept is one number, and pieces of one tensor get draws of their own.
            generator = torch.Generator(device=device)
            generator.manual_seed(_mixed(self.seed, draws, *stage, *place))
            here = moved(scale, device) if isinstance(scale, Tensor) else scale
            add_noise_(tensors, here, generator=generator)
        part.touch()
        return {"applied": trigger if isinstance(trigger, Tensor) else 1.0, "std": std}

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, **self._memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory["draws"] = int(state.get("draws", 0))


def _by_place(grads: Sequence[Tensor]) -> dict[tuple[torch.device, tuple[int, ...]], list[Tensor]]:
    """Return gradients by device and by which piece of the whole this rank holds: () for whole tensors."""
    places: dict[tuple[torch.device, tuple[int, ...]], list[Tensor]] = {}
    for grad in grads:
        place: tuple[int, ...] = ()
        sharded, whole = as_dtensor(grad), whole_of(grad)
        if whole is not None:
            place = (whole.group.rank(),)
        if sharded is not None:
            coordinate = sharded.device_mesh.get_coordinate() or ()
            pairs = zip(sharded.placements, coordinate, strict=False)
            place = tuple(-1 if placement.is_replicate() else k for placement, k in pairs)
        places.setdefault((grad.device, place), []).append(grad)
    return places


def _mixed(*numbers: int) -> int:
    """Return one 62-bit number that differs wherever one of these does (FNV-1a, a word at a time)."""
    mixed = 0xCBF29CE484222325
    for number in numbers:
        mixed = ((mixed ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed & 0x3FFFFFFFFFFFFFFF
