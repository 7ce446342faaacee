"""Clipping each tensor against the moving average of its own norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import Context
from ..stats import global_norm
from ..stats._shards import index_on
from ..torchside import moved, wide_dtype
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_count, check_number, check_patterns
from ._clip import norm_coefficient, tensor_report

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["EmaClip", "ema_clip"]


@torch.no_grad()
def ema_clip(
    norms: Tensor,
    memory: Tensor,
    *,
    ratio: float = 1.05,
    beta: float = 0.98,
    warmup: int = 100,
    warmup_max_norm: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return each tensor's coefficient and the next memory.

    Wang et al., "AdaGC: improving training stability for large language model pretraining", 2025, arXiv 2502.11034:
    during warm-up the whole gradient is clipped to a fixed norm and each tensor keeps its smallest norm; then tensor i
    is clipped to ratio times its moving average, which is fed the clipped norm. We differ: a step whose norm is not
    finite changes nothing, and a norm of exactly 0 is no measurement (kept as the smallest, it would hold a tensor
    whose gradient begins at zero there for ever).

    Args:
        norms: (n,).
        memory: (n, 2), moving average and steps counted, of each tensor; zeros at first.
        ratio, beta: of the limit to the average, and of the average.
        warmup: steps of each tensor that are clipped by the fixed norm.
        warmup_max_norm: that norm; None: no clip during warm-up.
    """
    norms = norms.to(memory.dtype)
    average, count = memory.unbind(dim=1)
    whole = global_norm(norms)
    is_warm = count < warmup
    fixed = torch.ones_like(whole) if warmup_max_norm is None else norm_coefficient(whole, warmup_max_norm)
    coefficients = torch.where(is_warm, fixed, norm_coefficient(norms, ratio * average))
    coefficients = torch.where(torch.isfinite(whole), coefficients, 1.0)
    kept = norms * coefficients
    smallest = torch.where(count > 0, torch.minimum(average, kept), kept)
    updated = torch.stack([torch.where(is_warm, smallest, beta * average + (1 - beta) * kept), count + 1], dim=1)
    counts = torch.isfinite(whole) & (kept > 0)
    return coefficients, torch.where(counts.unsqueeze(1), updated, memory)


@dataclass(frozen=True, eq=False)
class EmaClip(BaseTreatment):
    """Clip each parameter's gradient to `ratio` times the moving average of its own norm (AdaGC).

    Args:
        ratio: of the limit to the average.
        beta: of the average; its memory is about 1 / (1 - beta) steps.
        warmup: steps of each parameter during which the whole gradient is clipped to a fixed norm instead.
        warmup_max_norm: that norm; None: no clip during warm-up.
        paths: glob patterns of parameters.
    """

    ratio: float = 1.05
    beta: float = field(default=0.98, kw_only=True)
    warmup: int = field(default=100, kw_only=True)
    warmup_max_norm: float | None = field(default=1.0, kw_only=True)
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: _Rows = field(default_factory=lambda: _Rows(), init=False, repr=False)
    order: ClassVar[int] = 41
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "ratio", self.ratio, above=0)
        check_number(self, "beta", self.beta, above=0, below=1)
        check_count(self, "warmup", self.warmup, at_least=1)
        check_number(self, "warmup_max_norm", self.warmup_max_norm, above=0, optional=True)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        norms = part.norms
        coefficients, memory = ema_clip(
            norms,
            self._memory.read(part.paths, norms.device),
            ratio=self.ratio,
            beta=self.beta,
            warmup=self.warmup,
            warmup_max_norm=self.warmup_max_norm,
        )
        self._memory.write(memory)
        coefficients = where_triggered(read_trigger(context), coefficients, 1.0)
        part.mul_(coefficients)
        return tensor_report(coefficients)

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state)


class _Rows:
    """Two numbers for each parameter path, on the device; which parameters have a gradient may change by the step."""

    def __init__(self) -> None:
        self._positions: dict[str, int] = {}
        self._values = torch.zeros(0, 2, dtype=torch.float64)
        # Paths asked for last, and where their rows are.
        self._paths: tuple[str, ...] = ()
        self._index = torch.zeros(0, dtype=torch.int64)

    def read(self, paths: tuple[str, ...], device: torch.device) -> Tensor:
        if paths != self._paths or self._index.device != device:
            for path in paths:
                self._positions.setdefault(path, len(self._positions))
            missing, wide = len(self._positions) - len(self._values), wide_dtype(device)
            more = torch.zeros(missing, 2, dtype=wide, device=device)
            self._values = torch.cat([moved(self._values, device, wide), more])
            self._index = index_on([self._positions[path] for path in paths], device)
            self._paths = paths
        return self._values.index_select(0, self._index)

    def write(self, rows: Tensor) -> None:
        self._values.index_copy_(0, self._index, rows)

    def state_dict(self) -> dict[str, Any]:
        return (
            {"paths": list(self._positions), "values": self._values.cpu().to(torch.float64, copy=True)}
            if self._positions
            else {}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._positions = {path: i for i, path in enumerate(state.get("paths", ()))}
        self._values = state["values"].clone() if self._positions else torch.zeros(0, 2, dtype=torch.float64)
        self._paths = ()
