"""What the user's own statistics are shown of a step, and what they keep from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..protocols import Statistic
from ..stats import ALONE, Gradients, Ranks, Shards, View
from ..torchside import StandIn, moved, real_of
from ._measurement import StepView

__all__ = ["Views"]


class Views:
    """Makes the views of one engine's steps, and holds the statistics' memory."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int | None], tuple[tuple[str, ...], dict[str, Any]]] = {}

    def of(
        self,
        statistic: Statistic,
        step: int,
        grads: Gradients,
        shards: Shards,
        optimizers: Sequence[Optimizer],
        number: int | None,
        *,
        ranks: Ranks = ALONE,
        rank: int = 0,
    ) -> View:
        """Return what it is shown.

        Args:
            statistic: says what it needs.
            step: that was measured.
            grads, shards: the gradients, and the pieces of them on this rank.
            optimizers: that step next.
            number: of the one that steps on its own.
            ranks, rank: who takes part, and which this is.
        """
        needs, params, scale = statistic.needs, grads.params, grads.grad_scale

        def gradients() -> Sequence[Tensor]:
            if isinstance(scale, Tensor):
                return [g / moved(scale, g.device) for g in shards.locals]
            return shards.locals if scale == 1 else [g / scale for g in shards.locals]

        def state(name: str) -> Sequence[Tensor | None]:
            kept = [_kept(name, p, optimizers) for p in params]
            return [None if t is None else Shards([t.detach()]).locals[0] for t in kept]

        groups: list[Mapping[str, Any]] = []

        def options(name: str) -> Sequence[Any]:
            if not groups and params:
                owners = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
                groups.extend(owners.get(id(real_of(p)), {}) for p in params)
            return [group.get(name) for group in groups]

        tensors: dict[str, Any] = {"gradients": gradients, "parameters": lambda: _locals(params)}
        view = View(
            step,
            grads.paths,
            self.memory_of(statistic, number, grads.paths),
            tensors={name: tensors[name] for name in needs if name in tensors},
            state=state if "optimizer_state" in needs else None,
            options=options if "optimizer_state" in needs else None,
        )
        view.ranks, view.rank = ranks, rank
        return view

    def after(self, statistic: Statistic, step: StepView, before: Sequence[Tensor], now: Sequence[Tensor]) -> View:
        """Return what is shown of a step that the optimizers have taken.

        Args:
            statistic: that needs updates.
            step: of the step, before it.
            before, now: the parameters' pieces on this rank.
        """
        grads = step.gradients
        shards = Shards(grads.tensors, grads.params) if "gradients" in statistic.needs else Shards([])
        view = self.of(statistic, step.step, grads, shards, step.optimizers, step.number)
        view.show(before=before, parameters=now)
        return view

    def memory_of(
        self, statistic: Statistic, number: int | None, paths: tuple[str, ...], place: str = ""
    ) -> dict[str, Any]:
        """Return what a statistic keeps, as long as it is shown the same paths."""
        key = (f"{statistic.name}/{place}", number)
        if key not in self._memory or self._memory[key][0] != paths:
            self._memory[key] = (paths, {})
        return self._memory[key][1]


def _kept(name: str, p: Tensor, optimizers: Sequence[Optimizer]) -> Any:
    held = real_of(p)
    found = next((o.state[held].get(name) for o in optimizers if held in o.state), None)
    is_whole = isinstance(found, Tensor) and found.dim() > 0  # not a number of steps
    return p.part_of(found) if isinstance(p, StandIn) and is_whole else found


def _locals(params: Sequence[Tensor]) -> Sequence[Tensor]:
    return Shards([p.detach() for p in params]).locals
