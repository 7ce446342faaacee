"""Clipping to a quantile of past norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import Context
from ..torchside import moved, wide_dtype
from ._base import BaseTreatment, chosen
from ._checks import check_count, check_number, check_patterns
from ._clip import clip_to_

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["QuantileClip", "quantile_limit"]


@torch.no_grad()
def quantile_limit(norm: Tensor, history: Tensor, count: Tensor, q: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the q-quantile of the norms up to and with this one (inf where there is none), and the next memory.

    Seetharaman et al., "AutoClip: adaptive gradient clipping for source separation networks", MLSP 2020, arXiv
    2007.14469, over a window instead of the whole past. A norm that is not finite never enters (in the published
    form one NaN makes every later gradient NaN).

    Args:
        norm: 0-dim.
        history: float64 (window,), nan where nothing was seen yet; the oldest value is written over.
        count: int64 0-dim, norms that entered so far.
        q: between 0 and 1.
    """
    usable = torch.isfinite(norm)
    place = (count % len(history)).view(1)
    value = torch.where(usable, norm.to(history.dtype), history.gather(0, place).squeeze(0))
    history = history.scatter(0, place, value.view(1))
    limit = torch.nanquantile(history, q)
    return torch.where(torch.isnan(limit), torch.inf, limit), history, count + usable


@dataclass(frozen=True, eq=False)
class QuantileClip(BaseTreatment):
    """Clip the whole gradient to a quantile of its own past norms (AutoClip).

    Clips at a share 1 - q of all steps, healthy ones too: with the paper's q = 0.1 most steps are scaled down.

    Args:
        q: quantile, between 0 and 1.
        window: steps that count.
        paths: glob patterns of the parameters that count, and are scaled.
    """

    q: float
    window: int = 1000
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "q", self.q, at_least=0, at_most=1)
        check_count(self, "window", self.window, at_least=1)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        norm = part.global_norm
        history = self._memory.get("history")
        if history is None:
            history = torch.full((self.window,), torch.nan, dtype=torch.float64)
        count = self._memory.get("count", torch.zeros((), dtype=torch.int64))
        history = moved(history, norm.device, wide_dtype(norm.device))
        limit, history, count = quantile_limit(norm, history, moved(count, norm.device), self.q)
        self._memory.update(history=history, count=count)
        return clip_to_(part, context, limit)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in self._memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the memory; of a longer window the newest norms, of a shorter one all."""
        self._memory.clear()
        if not state:
            return
        history, count = state["history"], state["count"]
        if len(history) != self.window:
            # Oldest first, then into a window of the new length.
            known = torch.roll(history, -(int(count) % len(history)))
            known = known[~torch.isnan(known)][-self.window :]
            history = torch.full((self.window,), torch.nan, dtype=torch.float64)
            history[: len(known)] = known
            count = torch.tensor(len(known))
        self._memory.update(history=history.clone(), count=count.clone())
