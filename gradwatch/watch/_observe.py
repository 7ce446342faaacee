"""Puts one step's measurement together: gradients, modules, losses, the batch; made equal on all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..hooks import TapStats
from ..stats import Exchange, GradientPieces, Gradients, Shards, global_norm
from ._batch import batch_scalars, num_samples
from ._draft import Draft, StepInputs
from ._guard import Guard
from ._meter import Meter, constant, detach_scalar
from ._options import is_due
from ._parallel import num_batches_at_once
from ._ranks import combine, pack_extras, rank_of_this, world_size
from ._transfer import Transfer

__all__ = ["Observer"]


@dataclass
class _Seen:
    """What one rank saw of a step, in a layout that is the same on all ranks whatever each could see."""

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]
    scalars: dict[str, Tensor | float] | None
    tap: TapStats | None
    pieces: GradientPieces | None = None
    extras: tuple[str, ...] = ()


class Observer:
    """Makes the draft of a record from what the meter sees and the trainer says.

    Attributes:
        num_failed_treatments: on this rank since the last exchange, rules that carry some among them; told to the
            other ranks with the next one.
    """

    def __init__(self, meter: Meter, guard: Guard) -> None:
        self.meter = meter
        self.guard = guard
        self.num_failed_treatments = 0
        self._clock = time.perf_counter()
        self._num_batches: tuple[object, int] | None = None

    def observe(self, inputs: StepInputs, grads: Gradients, optimizers: Sequence[Optimizer]) -> Draft:
        """Measure one step before treatment, and send its numbers on their way to the host."""
        plain = self._plain_scalars(inputs)
        try:
            extras = self._rank_scalars(inputs, grads)
            seen = self._look(inputs, grads, extras)
        except Exception:
            self.give_up(inputs.step, grads)
            raise
        batch = self._combine(seen)
        assert seen.pieces is not None
        found = grads.put_together(seen.pieces)
        parts = {**seen.sums, **seen.maxima}
        parts |= {f"batch/{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
        if found.histograms is not None:
            parts |= {"details_sums": found.sums, "details_maxima": found.maxima, "histograms": found.histograms}
        parts |= {"norms": grads.norms, "global_norm": grads.global_norm}
        spread_positions = None
        if inputs.step == 0:
            spread_positions, spreads = self.meter.spreads(grads)
            parts |= spreads
        if world_size() == 1:
            plain |= extras
        return Draft(
            step=inputs.step,
            index=self.meter.watched.index,
            when=time.time(),
            epoch=inputs.epoch,
            batch_idx=inputs.batch_idx,
            lr=_largest_rate(optimizers),
            scaler=inputs.scaler,
            positions=self.meter.positions(grads.params),
            numbers=Transfer(parts),
            scalars=plain | {k: v for k, v in batch.items() if not isinstance(v, Tensor)},
            extras=seen.extras,
            tap=seen.tap,
            loss_scale=1.0 if inputs.scale is None else float(inputs.scale),
            failed=seen.sums.get("failed"),
            num_ranks=world_size(),
            num_batches=self.num_batches,
            tap_positions=None if seen.tap is None else self.meter.module_positions(),
            spread_positions=spread_positions,
        )

    def give_up(self, step: int, grads: Gradients | None = None) -> None:
        """Take part in a step's exchange with nothing to say, so that no rank waits for this one, and all know."""
        if world_size() == 1:
            return
        seen = self._nothing(step)
        seen.sums["failed"] = constant(1.0, self.meter.device)
        if grads is not None and len(grads):
            width = 515 if self._has_details(step, grads) else 1
            shards = Shards(grads.grads)
            rows = torch.zeros(len(grads), width, dtype=torch.float64, device=grads.device)
            seen.pieces = GradientPieces(shards, rows, rows[:, :1].clone() if width > 1 else None, rows[:, 0].clone())
        self._combine(seen)

    @property
    def num_batches(self) -> int:
        """How many ranks work on batches of their own."""
        key = self.meter.watched
        if self._num_batches is None or self._num_batches[0] is not key:
            self._num_batches = (key, num_batches_at_once(self.meter.model, [p for _, _, p in key.params]))
        return self._num_batches[1]

    def _has_details(self, step: int, grads: Gradients) -> bool:
        return len(grads) > 0 and is_due(step, self.meter.options.histograms_every)

    def _nothing(self, step: int) -> _Seen:
        device = self.meter.device
        sums = {"samples": constant(0.0, device), "loss": torch.zeros(2, dtype=torch.float64, device=device)}
        maxima: dict[str, Tensor] = {}
        ranks = world_size()
        if ranks > 1:
            sums["failed"] = constant(0.0, device)
            sums["treatments_failed"] = constant(float(self.num_failed_treatments > 0), device)
            sums["extras"] = pack_extras({}, device)
            sums["norm_of_rank"] = torch.zeros(ranks, dtype=torch.float64, device=device)
        if self.meter.local is not None:
            sums["local_norms"] = torch.zeros(ranks, dtype=torch.float64, device=device)
        seen = _Seen(sums, maxima, {} if self.meter.samples(step) else None, None)
        if seen.scalars is not None and ranks > 1:
            self._put_modules(seen, self.meter.blank_modules())
        return seen

    def _put_modules(self, seen: _Seen, tap: TapStats | None) -> None:
        if tap is not None:
            seen.tap, seen.sums["tap_sums"], seen.maxima["tap_maxima"] = tap, tap.sums, tap.maxima

    def _look(self, inputs: StepInputs, grads: Gradients, extras: dict[str, float]) -> _Seen:
        device, rank = self.meter.device, rank_of_this()
        sampled, output = self.meter.armed, self.meter.take_output()
        seen = self._nothing(inputs.step)
        seen.sums["samples"] = constant(inputs.num_samples or num_samples(inputs.batch), device)
        if inputs.losses:
            losses = torch.stack([detach_scalar(x, device).to(device) for x in inputs.losses])
            seen.sums["loss"] = torch.stack([losses.sum(), torch.full_like(losses[0], len(losses))])
        if sampled:
            tap = self.meter.take_modules()
            # Beyond the plan of this step (a tap left armed) nothing may be added to the vector.
            if seen.scalars is not None or world_size() == 1:
                self._put_modules(seen, tap)
        if seen.scalars is not None and self.guard.ok("numbers of the batch"):
            with self.guard("numbers of the batch"):
                outputs = output if inputs.outputs is None else inputs.outputs
                seen.scalars = batch_scalars(inputs.batch, outputs, inputs.targets)
        seen.pieces = grads.pieces(histograms=self._has_details(inputs.step, grads))
        if "norm_of_rank" in seen.sums and not seen.pieces.shards.groups:
            seen.sums["norm_of_rank"][rank] = global_norm(seen.pieces.norms).to(device)
        if self.meter.local is not None:
            own = self.meter.local.take(1.0 if inputs.scale is None else float(inputs.scale))
            if own is not None:
                seen.sums["local_norms"][rank] = own.to(device)
        if "extras" in seen.sums:
            seen.sums["extras"], seen.extras = pack_extras(extras, device), tuple(extras)
        return seen

    def _combine(self, seen: _Seen) -> dict[str, Tensor | float]:
        pieces = seen.pieces
        self.num_failed_treatments = 0
        return combine(
            seen.sums,
            seen.maxima,
            seen.scalars,
            self.meter.device,
            exchange=Exchange(None if pieces is None else pieces.shards),
            rows=None if pieces is None or not pieces.shards.groups else pieces.rows,
            row_maxima=None if pieces is None or not pieces.shards.groups else pieces.maxima,
        )

    def _rank_scalars(self, inputs: StepInputs, grads: Gradients) -> dict[str, float]:
        """Return what each rank knows for itself, and no rank may act on alone."""
        now = time.perf_counter()
        scalars = {"seconds": now - self._clock}
        self._clock = now
        kept = self.meter.were_kept(grads, max(1, len(inputs.losses)))
        if kept is not None:
            scalars["grads_kept"] = kept
        return scalars | inputs.scalars

    def _plain_scalars(self, inputs: StepInputs) -> dict[str, float]:
        index = self.meter.watched.index
        scalars = {"num_trainable": float((index.trainable & index.in_optimizer).sum())}
        if inputs.scale is not None:
            scalars["grad_scale"] = float(inputs.scale)
        if inputs.optimizer is not None:
            scalars["optimizer"] = float(inputs.optimizer)
        return scalars


def _largest_rate(optimizers: Sequence[Optimizer]) -> float:
    # A tensor rate on a device is left out rather than waited for.
    rates = [g["lr"] for o in optimizers for g in o.param_groups if "lr" in g]
    known = [float(r) for r in rates if not isinstance(r, Tensor) or r.device.type == "cpu"]
    return max(known, default=math.nan)
