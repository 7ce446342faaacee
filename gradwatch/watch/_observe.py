"""Puts one step's measurement together: gradients, modules, losses, the batch; made equal on all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..stats import Gradients
from ._batch import batch_scalars, num_samples
from ._draft import Draft, StepInputs
from ._guard import Guard
from ._meter import Meter, constant, detach_scalar
from ._options import is_due
from ._ranks import combine
from ._transfer import Transfer

__all__ = ["Observer"]


class Observer:
    """Makes the draft of a record from what the meter sees and the trainer says."""

    def __init__(self, meter: Meter, guard: Guard) -> None:
        self.meter = meter
        self.guard = guard
        self._clock = time.perf_counter()

    def observe(self, inputs: StepInputs, grads: Gradients, optimizers: Sequence[Optimizer]) -> Draft:
        """Measure one step before treatment, and send its numbers on their way to the host."""
        device = self.meter.device
        sampled, output = self.meter.armed, self.meter.take_output()
        tap, scalars = None, None
        samples = inputs.num_samples or num_samples(inputs.batch)
        sums = {"samples": constant(samples, device)}
        maxima: dict[str, Tensor] = {}
        if inputs.losses:
            losses = torch.stack([detach_scalar(x, device).to(device) for x in inputs.losses])
            sums["loss"] = torch.stack([losses.sum(), torch.full_like(losses[0], len(losses))])
        if sampled:
            tap = self.meter.take_modules()
            if tap is not None:
                sums["tap_sums"], maxima["tap_maxima"] = tap.sums, tap.maxima
        if self.meter.samples(inputs.step) and self.guard.ok("numbers of the batch"):
            scalars = {}
            with self.guard("numbers of the batch"):
                outputs = output if inputs.outputs is None else inputs.outputs
                scalars = batch_scalars(inputs.batch, outputs, inputs.targets)
        batch = combine(sums, maxima, scalars, device)
        parts = {**sums, **maxima}
        parts |= {f"batch/{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
        spread_positions = None
        if len(grads) and is_due(inputs.step, self.meter.options.histograms_every):
            parts |= self.meter.details(grads)
        parts |= {"norms": grads.norms, "global_norm": grads.global_norm}
        if inputs.step == 0:
            spread_positions, spreads = self.meter.spreads(grads)
            parts |= spreads
        index = self.meter.watched.index
        return Draft(
            step=inputs.step,
            index=index,
            when=time.time(),
            epoch=inputs.epoch,
            batch_idx=inputs.batch_idx,
            lr=_largest_rate(optimizers),
            scaler=inputs.scaler,
            positions=self.meter.positions(grads.params),
            numbers=Transfer(parts),
            scalars=self._plain_scalars(inputs, grads) | {k: v for k, v in batch.items() if not isinstance(v, Tensor)},
            tap=tap,
            loss_scale=1.0 if inputs.scale is None else float(inputs.scale),
            tap_positions=None if tap is None else self.meter.module_positions(),
            spread_positions=spread_positions,
        )

    def _plain_scalars(self, inputs: StepInputs, grads: Gradients) -> dict[str, float]:
        index = self.meter.watched.index
        now = time.perf_counter()
        scalars = {"seconds": now - self._clock, "num_trainable": float((index.trainable & index.in_optimizer).sum())}
        self._clock = now
        kept = self.meter.were_kept(grads, max(1, len(inputs.losses)))
        if kept is not None:
            scalars["grads_kept"] = kept
        if inputs.scale is not None:
            scalars["grad_scale"] = float(inputs.scale)
        if inputs.optimizer is not None:
            scalars["optimizer"] = float(inputs.optimizer)
        return scalars | inputs.scalars


def _largest_rate(optimizers: Sequence[Optimizer]) -> float:
    # A tensor rate on a device is left out rather than waited for.
    rates = [g["lr"] for o in optimizers for g in o.param_groups if "lr" in g]
    known = [float(r) for r in rates if not isinstance(r, Tensor) or r.device.type == "cpu"]
    return max(known, default=math.nan)
