"""Which samples carry a step's gradient: its micro-batches are taken apart, and those of all ranks put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from ..records import Sample
from ..samples import Begun, LossCall, PerSample, matching_losses, take_apart
from ..torchside import untouched
from ._batch import split_batch
from ._ranks import rank_of_this, world_size
from ._replays import Replay
from ._step_inputs import StepInputs

__all__ = ["Carriers", "carriers", "gathered", "taken_apart"]

NUM_SAMPLES = 5
"""Samples that are named."""


@dataclass
class Carriers:
    """The samples that carry most of a step's gradient.

    Attributes:
        samples: largest share first; those that are not finite before all others.
        total: sum of all samples' projections, that shares are parts of.
        size: samples looked at.
        coverage: share of the gradient's square that was told apart.
        method: see `PerSample`.
        num_finite: how many of the samples are finite.
        num_micro_batches: of this rank.
    """

    samples: list[Sample] = field(default_factory=list)
    total: float = 0.0
    size: int = 0
    coverage: float = 1.0
    method: str = ""
    num_finite: int = 0
    num_micro_batches: int = 1

    def details(self) -> dict[str, Any]:
        """Return plain values for an incident."""
        if not self.samples:
            return {}
        return {
            "samples": [sample.to_json() for sample in self.samples],
            "samples_of": self.size,
            "samples_method": self.method,
            "samples_coverage": self.coverage,
            "samples_micro_batches": self.num_micro_batches,
        }


def carriers(
    model: nn.Module, replays: Sequence[Replay], params: Sequence[Tensor], inputs: StepInputs | None
) -> Carriers:
    """Return which samples of this rank's micro-batches carry the gradient that lies in `.grad`.

    Random states, buffers and gradients are as before afterwards, bit for bit. Reads the device.

    Args:
        model: that is trained.
        replays: of the step's micro-batches.
        params: whose gradients count.
        inputs: of the step.

    Raises:
        ValueError: no micro-batch can be taken apart.
    """
    return replace(_together(taken_apart(model, replays, params, inputs)), num_micro_batches=len(replays))


def taken_apart(
    model: nn.Module, replays: Sequence[Replay], params: Sequence[Tensor], inputs: StepInputs | None
) -> list[tuple[int, PerSample]]:
    """Return each of this rank's micro-batches taken apart, with its number; arguments and errors as of `carriers`."""
    direction = [p.grad if type(p.grad) is Tensor else None for p in params]
    if all(d is None for d in direction):
        raise ValueError("gradients lie in pieces")
    left = 1.0 if inputs is None else float(inputs.grad_scale)
    found: list[tuple[int, PerSample]] = []
    reason = "nothing was seen of the step's forward passes"
    with untouched(model):
        for number, replay in enumerate(replays):
            if replay.size and replay.grads != {}:
                begin = _beginning(replay, inputs if len(replays) == 1 else None)
                try:
                    part = take_apart(model, begin, params, replay.size, direction=direction)
                except ValueError as error:
                    reason = str(error)
                    continue
                unit = _unit(replay, len(replays), inputs)
                scaled = replace(part, norm=part.norm * unit, projection=part.projection * unit / left)
                found.append((number, scaled))
    if not found:
        raise ValueError(reason)
    return found


def _beginning(replay: Replay, inputs: StepInputs | None) -> Any:
    def begin() -> Begun:
        begun = replay.begin()
        if not begun.roots:
            raise ValueError("the loss, and the gradients of the model's outputs, were not seen")
        known = None if inputs is None else _losses(begun, inputs)
        return begun if known is None else replace(begun, losses=[known])

    return begin


def _losses(begun: Begun, inputs: StepInputs) -> LossCall | None:
    """Return how a loss that was made outside of the model came of its outputs, where the usual ones come to it."""
    targets = inputs.targets if inputs.targets is not None else split_batch(inputs.batch)[1]
    if len(begun.roots) != 1 or len(inputs.losses) != 1 or not isinstance(targets, Tensor):
        return None
    loss = inputs.losses[0]
    return matching_losses(begun.roots[0], targets, float(loss.detach() if isinstance(loss, Tensor) else loss))


def _unit(replay: Replay, num: int, inputs: StepInputs | None) -> float:
    """Return what a micro-batch's gradients are multiplied by on their way into `.grad`."""
    scale = 1.0 if inputs is None or not inputs.scale else inputs.scale
    # Gradients that were seen hold the loss scaler's factor, and what the loss was divided by.
    own = 1.0 / num if replay.grads is None else 1.0 / scale
    return own / world_size()


def _together(found: Sequence[tuple[int, PerSample]]) -> Carriers:
    total = float(sum(part.projection[np.isfinite(part.projection)].sum() for _, part in found))
    rank, samples = rank_of_this(), []
    for number, part in found:
        for sample in part.top(NUM_SAMPLES):
            # Shares of the whole step are made when its total is known.
            own = float(part.projection[sample.index])
            samples.append(replace(sample, share=own, micro_batch=number, rank=rank))
    size = sum(len(part) for _, part in found)
    num_finite = sum(int(part.is_finite.sum()) for _, part in found)
    coverage = min(part.coverage for _, part in found)
    return _shared([Carriers(samples, total, size, coverage, found[0][1].method, num_finite)])


def gathered(own: Carriers) -> Carriers:
    """Return those of all ranks. Every rank must call it, also one that has found nothing."""
    if world_size() == 1:
        return own
    every: list[Any] = [None] * world_size()
    # Shares are parts of a rank's own total here.
    dist.all_gather_object(every, own)
    return _shared([replace(c, samples=[replace(s, share=s.share * c.total) for s in c.samples]) for c in every])


def _shared(parts: Sequence[Carriers]) -> Carriers:
    """Return the largest of all, whose `share` is a projection, with their shares in the sum of all."""
    told = [part for part in parts if part.samples]
    if not told:
        return Carriers()
    total = sum(part.total for part in told)
    samples = [_with_share(sample, total) for part in told for sample in part.samples]
    samples.sort(key=lambda s: (s.is_finite, -abs(s.share) if np.isfinite(s.share) else np.inf))
    return Carriers(
        samples[:NUM_SAMPLES],
        total,
        sum(part.size for part in told),
        min(part.coverage for part in told),
        told[0].method,
        sum(part.num_finite for part in told),
        told[0].num_micro_batches,
    )


def _with_share(sample: Sample, total: float) -> Sample:
    if not sample.is_finite:
        return replace(sample, share=float("nan"))
    return replace(sample, share=sample.share / total if total else float("nan"))
