"""Surgery and diagnosis between the micro-batches of gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import ConfigError
from ._decide import Decider
from ._gramian import mean_over_ranks, num_ranks, quick_gramian
from ._noise import agreement_filter, micro_agreement, noise_moments
from ._probe import Grads, Probes
from ._settings import Surgery

__all__ = ["MicroBatchController", "MicroBatchSurgery"]

_MEMORY = 0.95


class MicroBatchSurgery:
    """Settings of surgery between accumulated micro-batches: no further backward, memory for k gradients.

    Args:
        method: a surgery method (a name or a callable from a Gramian to weights) with one gradient a micro-batch; None:
            plain accumulation.
        agreement: "signs" zeroes each element on whose sign fewer than `threshold` of the micro-batches agree (the
            share |sum of signs| / k). "cosine" averages only micro-batches that agree with those before
            (`agreement_filter`); it decides the weights, so it excludes `method`. None: neither.
        threshold: for "signs", in (0, 1]; for "cosine", the largest cosine distance, in (0, 2].
        keep_length: give the combined gradient the plain one's length.
        **options: of the method.

    With `method=None` and `agreement=None` gradients are not touched: pure diagnosis.

    Source of "signs": Parascandolo et al., "Learning explanations that are hard to vary", ICLR 2021, arXiv 2009.00329.
    """

    name = "micro_batch_surgery"

    def __init__(
        self,
        method: str | Callable[..., Any] | None = None,
        *,
        agreement: str | None = None,
        threshold: float | None = None,
        keep_length: bool = False,
        **options: Any,
    ) -> None:
        if agreement not in (None, "signs", "cosine"):
            raise ConfigError(f"`agreement` must be 'signs', 'cosine' or None. Got {agreement!r}.")
        if agreement == "cosine" and method is not None:
            raise ConfigError(f"agreement='cosine' decides the weights itself: leave `method` out. Got {method!r}.")
        limit = 2.0 if agreement == "cosine" else 1.0
        threshold = {"cosine": 0.97}.get(agreement or "", 1.0) if threshold is None else threshold
        if not 0 < threshold <= limit:
            raise ConfigError(f"`threshold` of agreement={agreement!r} must be in (0, {limit:g}]. Got {threshold}.")
        self.method = method
        self.agreement = agreement
        self.threshold = threshold
        self.surgery = Surgery("sum" if method is None else method, keep_length=keep_length, **options)

    @property
    def only_diagnoses(self) -> bool:
        """Whether gradients are left as they are."""
        return self.method is None and self.agreement is None


class MicroBatchController:
    """Takes each micro-batch's gradient after its backward, and puts the combined one into `.grad` after the last.

    It must be in `.grad` when the last backward's hooks end: a GradScaler looks there before the optimizer steps.

    Args:
        settings: what to do.
        parameters: (path, parameter) of the model.

    Attributes:
        step: optimizer steps taken so far; set by the engine.
    """

    def __init__(self, settings: MicroBatchSurgery, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.settings = settings
        self.step = 0
        self._parameters = [p for _, p in parameters]
        self._decider = Decider(settings.surgery)
        self._held: list[Grads] = []
        self._scalars: dict[str, float] = {}
        self._moments: tuple[float, float] | None = None

    def after_backward(self, *, last: bool, grad_scale: float = 1.0, batch_size: float = 1.0) -> None:
        """Take the gradient of the micro-batch whose backward has just run.

        Args:
            last: the optimizer steps next.
            grad_scale: what these gradients are a multiple of (scaler's scale over number of micro-batches).
            batch_size: samples of one micro-batch, for the noise scale.
        """
        if self.settings.only_diagnoses:
            self._held.append(tuple(None if p.grad is None else p.grad.detach().clone() for p in self._parameters))
        else:
            self._held.append(tuple(self._take(p, synced=last) for p in self._parameters))
        if not last:
            return
        held, self._held = self._held, []
        if self.settings.only_diagnoses:
            self._note(_of_differences(quick_gramian(held)), grad_scale, batch_size)
            return
        matrix = self._note(quick_gramian(held), grad_scale, batch_size)
        weights = self._weights(matrix, tuple(str(i) for i in range(len(held))))
        combined = Probes((), held).combine(weights.tolist())
        if self.settings.agreement == "signs":
            combined = self._signs(held, combined)
        for parameter, value in zip(self._parameters, combined, strict=True):
            parameter.grad = value

    def discard(self) -> None:
        """Forget micro-batches whose optimizer step never came."""
        self._held = []

    def report(self) -> dict[str, float]:
        """Return what the last step showed, once: `micro_cos`, `micro_cos_min`, `noise_trace`, `noise_squared_norm`,
        `noise_scale` (from running means, in samples), and what was done."""
        scalars, self._scalars = self._scalars, {}
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {**self._decider.state_dict(), "moments": self._moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._decider.load_state_dict(state)
        moments = state.get("moments")
        self._moments = None if moments is None else (float(moments[0]), float(moments[1]))

    def _take(self, parameter: nn.Parameter, *, synced: bool) -> Tensor | None:
        grad, parameter.grad = parameter.grad, None
        # Micro-batches before the last run under no_sync: their gradients are this rank's own.
        if grad is not None and not synced and num_ranks() > 1:
            dist.all_reduce(grad)
            grad /= num_ranks()
        return grad

    def _note(self, matrix: Tensor, grad_scale: float, batch_size: float) -> Tensor:
        matrix = mean_over_ranks(matrix).to("cpu", torch.float64) / grad_scale**2
        if len(matrix) < 2:
            return matrix
        mean, least = micro_agreement(matrix)
        trace, squared_norm = noise_moments(matrix, batch_size=batch_size)
        now = torch.tensor([trace, squared_norm])
        if bool(now.isfinite().all()):
            before = self._moments or (trace, squared_norm)
            self._moments = (
                before[0] + (1 - _MEMORY) * (trace - before[0]),
                before[1] + (1 - _MEMORY) * (squared_norm - before[1]),
            )
        self._scalars = {
            "micro_cos": mean,
            "micro_cos_min": least,
            "noise_trace": trace,
            "noise_squared_norm": squared_norm,
        }
        if self._moments is not None:
            top, bottom = self._moments
            self._scalars["noise_scale"] = top / bottom if bottom > 0 else float("inf")
        return matrix

    def _weights(self, matrix: Tensor, names: tuple[str, ...]) -> Tensor:
        if len(matrix) == 1:
            return torch.ones(1, dtype=torch.float64)
        if self.settings.agreement == "cosine" and bool(torch.isfinite(matrix).all()):
            weights = agreement_filter(matrix, distance=self.settings.threshold)
            self._scalars["micro_taken"] = float((weights > 0).sum())
            return weights
        decision = self._decider.decide(matrix, names, step=self.step)
        for key in ("surgery_length_ratio", "surgery_cos_to_sum", "surgery_applied", "surgery_fallback"):
            self._scalars[key] = decision.scalars[key]
        return decision.weights

    def _signs(self, held: list[Grads], combined: list[Tensor | None]) -> list[Tensor | None]:
        result: list[Tensor | None] = []
        kept = total = 0.0
        for value, column in zip(combined, zip(*held, strict=True), strict=True):
            if value is None:
                result.append(None)
                continue
            signs = torch.stack([torch.zeros_like(value) if g is None else g.sign() for g in column])
            agreed = signs.sum(0).abs() >= self.settings.threshold * len(held) * (1 - 1e-6)
            # The sign of nan is 0: what is not finite stays, instead of being hidden as a disagreement.
            keep = agreed | ~torch.isfinite(value)
            result.append(torch.where(keep, value, torch.zeros_like(value)))
            kept, total = kept + float(keep.sum()), total + keep.numel()
        self._scalars["micro_signs_kept"] = kept / total if total else 1.0
        return result


def _of_differences(cumulative: Tensor) -> Tensor:
    """Return the Gramian of g_0, g_1 - g_0, g_2 - g_1, ... from that of g_0, g_1, ..."""
    k = len(cumulative)
    D = torch.eye(k, dtype=cumulative.dtype, device=cumulative.device)
    D -= torch.diag(torch.ones(k - 1, dtype=D.dtype, device=D.device), -1)
    return D @ cumulative @ D.T
