"""Puts one step's measurement together: gradients, modules, losses, the batch; made equal on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..hooks import TapStats
from ..stats import Exchange, GradientMeasures, GradientPieces, Gradients, Row, Shards
from ..torchside import Aside, are_modes_on, is_host, real_of, wide_dtype
from ._accord import Accord, Layout
from ._batch import batch_scalars, holds_targets, num_samples
from ._between import whole
from ._company import Company, LossOfOthers
from ._configured import Measured
from ._guard import Guard
from ._kind import Kind
from ._loss_graph import SeenLoss, form_scalars
from ._model_meter import ModelMeter, constant, few_seals, loss_value
from ._numbers import Scalars
from ._prediction import Prediction
from ._produced import Look, Produced
from ._ranks import combine, pack_extras
from ._record_draft import NOTHING, Draft
from ._statistics import OwnRows, OwnStatistics
from ._step_inputs import StepInputs
from ._tables import Tables, TablesDraft, is_awaited
from ._timed import calm_numpy
from ._transfer import Known, Numbers, Transfer
from ._turn import Turn

__all__ = ["Measuring"]

_CPU = torch.device("cpu")


@dataclass
class _Seen:
    """What one rank saw of a step, in a layout that is the same on all ranks whatever each could see."""

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]
    scalars: dict[str, Tensor | float] | None
    tap: TapStats | None
    samples: float = 0.0
    loss: Tensor | float | None = None
    pieces: GradientPieces | None = None
    extras: tuple[str, ...] = ()
    own: OwnRows | None = None
    tables: TablesDraft | None = None
    before: Look | None = None
    is_sealed: bool = False
    layout: Layout | None = None
    is_fitting: bool = True


class Measuring:
    """Makes the draft of a record from what the meter sees and the trainer says.

    Attributes:
        kind: of the training.
        accord: what the ranks have agreed to exchange.
        num_failed_treatments: on this rank since the last exchange, rules that carry some among them; told to the
            other ranks with the next one.
        num_unproven: vetoed steps of this rank that moved something which is to end the training, likewise.

    Args:
        meter, guard, own, tables, produced: what measures.
        treats: something may ask for the norm of all on the device.
    """

    def __init__(
        self,
        meter: ModelMeter,
        guard: Guard,
        own: OwnStatistics | None,
        tables: Tables,
        produced: Produced,
        *,
        treats: bool = False,
    ) -> None:
        self.meter = meter
        self.produced = produced
        self.guard = guard
        self.own, self.tables = own, tables
        # Treatments ask for the norm of all on the device: what is on record is that one, to its last bit.
        self._needs_whole = treats
        self.num_failed_treatments = self.num_unproven = 0
        self._clock = perf_counter()
        self.accord = Accord(meter, guard)
        self._company = Company()
        self._others = LossOfOthers()
        self.kind = Kind(meter.options.kind)

    def measure(self, turn: Turn) -> Draft:
        """Measure one step before treatment, and send its numbers on their way to the host."""
        meter = self.meter
        meter.account.is_calm = False
        is_plain = turn.plan.is_plain and self.own is None
        draft = None
        if is_plain and (meter.tap is None or not meter.tap.armed) and not are_modes_on():
            draft = self._at_once(turn)
        if draft is None:
            with Aside():
                draft = self._packed(turn)
        return draft

    def _at_once(self, turn: Turn) -> Draft | None:
        """Measure a step at which norms alone are due, and the host has them by one call; None where it has not.

        Of a small model nearly all steps go this way, and each call of a function in it costs them as much as measuring
        a tensor: what is asked of other rooms elsewhere is written out here.
        """
        inputs, grads, losses = turn.inputs, turn.grads, turn.inputs.losses
        assert grads is not None
        params, look, known = grads.params, self.produced.take(grads), None
        is_sealed = look is not None and (inputs.scale is None or not _is_unscaled(inputs, grads))
        is_sealed = look is not None and is_sealed and look.holds(params, turn.tensors)
        if look is not None and is_sealed:
            turn.seals = look.seals
            if not self.produced.is_to_compare(inputs.step):
                known = look.on_host
        lent = None if known is not None or turn.tensors is None else self.meter.watched.lender.lend(turn.tensors)
        found = grads.measure_on_host(known, turn.tensors, lent)
        if found is None:
            return None
        norms, global_norm, _ = found
        numbers: dict[str, Any] = {"norms": norms, "global_norm": global_norm}
        if look is not None and known is None:
            numbers |= Transfer(self._produced(look, inputs, grads)).result()
        loss = losses[0] if len(losses) == 1 else None
        if type(loss) is Tensor and loss.is_cpu and loss.numel() == 1:
            loss = loss.item()
        if type(loss) is not float and losses:
            loss = self._losses(inputs, _CPU)[0]
            loss = float(loss) if isinstance(loss, Tensor) else loss
        if loss is not None:
            numbers["loss"] = loss
        numbers["samples"] = inputs.num_samples or (0 if inputs.batch is None else num_samples(inputs.batch))
        scalars = self._plain_scalars(inputs)
        if others := self._others.told(inputs.optimizer, loss):
            scalars |= {name: float(value) for name, value in others.items()}
        if turn.plan.statistics:
            scalars |= self.tables.at_once(turn.step, turn.plan.statistics)
        now, last = perf_counter(), self._clock
        self._clock, scalars["seconds"] = now, now - last
        kept = self.meter.were_kept(few_seals(params) if turn.seals is None else turn.seals, len(losses) or 1)
        if kept is not None:
            scalars["grads_kept"] = kept
        scalars.update(inputs.scalars)
        self.num_failed_treatments = 0
        # One that was used up inside backward has left zeros, where it has left anything.
        account = self.meter.account
        account.is_calm = has_all = bool(np.logical_and.reduce(norms))
        doubtful = () if has_all else account.doubtful(params)
        known_by = Known(numbers)
        return self._draft(turn, params, known_by, scalars, is_plain=True, is_sealed=is_sealed, doubtful=doubtful)

    @calm_numpy
    def _packed(self, turn: Turn) -> Draft:
        """Measure what is due and put it together over ranks: one vector travels, and one copy to the host."""
        inputs, grads, plan = turn.inputs, turn.grads, turn.plan
        assert grads is not None
        plain, extras = self._plain_scalars(inputs), self._rank_scalars(inputs, grads)
        seen = self._look(turn, grads, extras)
        # From here on the vector is on its way, or the ranks that it would go to are gone.
        turn.has_exchanged = True
        batch = self._combine(seen, grads)
        said = seen.layout
        if said is not None and self.accord.hear(turn.step, said, seen.sums["extras"], seen.sums["failed"]):
            grads = self._let_go(turn, seen)
        assert seen.pieces is not None
        found = grads.put_together(seen.pieces)
        parts: Measured = {"samples": seen.samples}
        if seen.loss is not None:
            parts["loss"] = seen.loss
        parts |= seen.sums | seen.maxima
        others = self._others.told(inputs.optimizer, seen.loss) if plan.is_alone else {}
        parts |= {f"batch/{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
        parts |= self._of_gradients(grads, seen.pieces, found)
        if found.absent is not None:
            parts["absent"] = found.absent
        if seen.before is not None:
            parts |= self._produced(seen.before, inputs, grads)
        own = None
        if self.own is not None and seen.is_fitting:
            own = self.own.draft(inputs.step, seen.own, plan.num_ranks)
        if own is not None:
            parts |= own.parts()
        if seen.tables is not None:
            self.tables.meet(turn, self.accord.agreed, seen.tables)
            parts |= seen.tables.parts
        if plan.is_alone:
            plain |= extras
        parts |= {f"batch/{k}": v for k, v in others.items() if not isinstance(v, float)}
        plain |= {k: v for k, v in others.items() if isinstance(v, float)}
        draft = self._draft(
            turn,
            grads.params,
            Transfer(parts, then=_concluded),
            plain | {k: v for k, v in batch.items() if not isinstance(v, Tensor)},
            extras=seen.extras,
            tap=seen.tap,
            loss_scale=(1.0 if inputs.scale is None else float(inputs.scale)) * self._num_parts,
            failed=seen.sums.get("failed"),
            loss=seen.loss if isinstance(seen.loss, Tensor) else None,
            has_details="histograms" in parts or any(map(is_awaited, plan.statistics)),
            num_ranks=plan.num_ranks,
            num_batches=self.accord.num_batches,
            tap_positions=None if seen.tap is None else self.meter.module_positions(),
            own=own,
            tables=seen.tables,
            is_sealed=seen.is_sealed,
            doubtful=self.meter.account.doubtful(grads.params),
            layout=seen.layout,
        )
        if found.absent is not None and is_host(found.absent.device):
            grads.lack_(torch.nonzero(found.absent)[:, 0].tolist())
        return draft

    def _of_gradients(self, grads: Gradients, pieces: GradientPieces, found: GradientMeasures) -> Measured:
        """Return what was found of the gradients, for the host to read."""
        parts: Measured = {"norms": grads.unread_norms}
        if self._needs_whole or isinstance(parts["norms"], Tensor):
            parts["global_norm"] = grads.global_norm
        if found.histograms is not None:
            parts |= {"details_sums": found.sums, "details_maxima": found.maxima, "histograms": found.histograms}
        elif pieces.apart is not None and pieces.counts is not None:
            zeros, largest = pieces.apart
            parts |= {"zeros": zeros, "largest": largest, "histograms": pieces.counts}
        return parts

    def _draft(
        self, turn: Turn, params: Sequence[Tensor], numbers: Numbers, scalars: dict[str, float], **measured: Any
    ) -> Draft:
        inputs, watched = turn.inputs, self.meter.watched
        unseen: Mapping[str, str] = NOTHING
        if params is not watched.held or watched.unheld or watched.strange:
            assert turn.grads is not None
            unseen = self._unseen(inputs, turn.grads, turn.optimizers)
        return Draft(
            step=inputs.step,
            index=watched.index,
            when=time(),
            epoch=inputs.epoch,
            batch_idx=inputs.batch_idx,
            lr=_largest_rate(turn.optimizers),
            scaler=inputs.scaler,
            clipper=inputs.clipper,
            between=self.produced.between,
            positions=watched.held_positions if params is watched.held else self.meter.positions(params),
            optimizer=inputs.optimizer or 0,
            unseen=unseen,
            is_without_backward=inputs.has_backward is False,
            numbers=numbers,
            scalars=scalars,
            **measured,
        )

    def _produced(self, look: Look, inputs: StepInputs, grads: Gradients) -> dict[str, Tensor | float]:
        """Return the norms before somebody changed the gradients."""
        before = look.of(grads, 1.0 if inputs.scale is None else float(inputs.scale))
        return {} if before is None else {"produced": before}

    def compare(self, turn: Turn) -> None:
        """Find out, before the first exchange, whether ranks have anything to exchange."""
        if not turn.plan.is_alone:
            self.accord.compare(turn.step)

    def hear_late(self, draft: Draft, step: int) -> None:
        """Take in what ranks said at a step whose numbers are taken up now; `step`: that was measured last."""
        if draft.layout is not None and not is_host(self.meter.device):
            said = draft.numbers.result()["extras"].tolist()
            self.accord.hear_late(step, draft.layout, said, draft.num_failed, since=draft.step)

    def _let_go(self, turn: Turn, seen: _Seen) -> Gradients:
        """Leave all that ranks with unlike models have put together; return the gradients that are seen: none."""
        turn.grads = grads = self.meter.gradients(turn.optimizers, turn.inputs.grad_scale)
        turn.tensors = turn.seals = seen.tap = seen.before = seen.own = None
        seen.is_fitting = False
        if seen.tables is not None:
            seen.tables.let_go()
        seen.sums.pop("tap_sums", None)
        seen.maxima.pop("tap_maxima", None)
        seen.pieces, seen.is_sealed = grads.pieces(), False
        return grads

    def give_up(self, turn: Turn) -> None:
        """Take part in a step's exchange with nothing to say, so that no rank waits for this one, and all know."""
        self.compare(turn)
        turn.has_exchanged = True
        step, grads = turn.step, turn.grads
        seen = self._nothing(turn)
        seen.sums["failed"] = constant(1.0, self.meter.device)
        if grads is not None and len(grads):
            width = 515 if turn.plan.histograms else 1
            shards = Shards(grads.tensors, grads.params)
            seen.own = None if self.own is None else self.own.blank_rows(step, len(grads))
            rows = torch.zeros(len(grads), width, dtype=wide_dtype(grads.device), device=grads.device)
            seen.pieces = GradientPieces(
                shards, rows, rows[:, :1].clone() if width > 1 else None, Row(rows[:, 0].clone())
            )
        self._combine(seen, grads)
        if grads is not None:
            self.tables.take_part(turn, self.accord.agreed)

    @property
    def _num_parts(self) -> int:
        stages = self.meter.watched.stages
        return 1 if stages is None else stages.pipeline.num_parts

    def _nothing(self, turn: Turn) -> _Seen:
        """Return what a rank that can measure nothing puts into the exchange: the plan's layout, with blanks."""
        ranks, device = turn.plan.num_ranks, self.meter.device
        seen = _Seen({}, {}, {} if turn.plan.modules else None, None)
        wide, layout = wide_dtype(device), self.accord.agreed
        if self.own is not None:
            seen.sums, seen.maxima = self.own.blank(turn.step, layout.num_modules)
        seen.sums |= self.tables.blank(turn.plan, layout)
        if ranks > 1:
            seen.sums |= {"samples": constant(0.0, device), "loss": torch.zeros(2, dtype=wide, device=device)}
            if layout.has_stages:
                seen.sums["counted"] = constant(0.0, device)
            seen.sums["failed"] = constant(0.0, device)
            seen.sums["treatments_failed"] = constant(float(self.num_failed_treatments > 0), device)
            seen.sums["unproven"] = constant(float(self.num_unproven > 0), device)
            seen.sums["extras"] = pack_extras({}, device)
            if seen.scalars is not None:
                self._put_modules(seen, self.meter.blank_modules(layout.num_modules))
        return seen

    def _put_modules(self, seen: _Seen, tap: TapStats | None) -> None:
        if tap is not None:
            seen.tap, seen.sums["tap_sums"], seen.maxima["tap_maxima"] = tap, tap.sums, tap.maxima

    def _look(self, turn: Turn, grads: Gradients, extras: dict[str, float]) -> _Seen:
        device, inputs, is_alone = self.meter.device, turn.inputs, turn.plan.is_alone
        sampled, (output, unread), loss = self.meter.armed, self.meter.take_output(), self.meter.take_loss()
        seen = self._nothing(turn)
        if not is_alone:
            self._fit(seen)
        seen.samples = float(inputs.num_samples or num_samples(inputs.batch))
        seen.loss, num_losses = self._losses(inputs, device, is_alone=is_alone)
        if not is_alone:
            self._share(seen, num_losses)
        if sampled:
            tap = self.meter.take_modules(is_alone=is_alone)
            # Beyond the plan of this step (a tap left armed) nothing may be added to the vector.
            if (seen.scalars is not None or is_alone) and seen.is_fitting:
                self._put_modules(seen, tap)
        if seen.scalars is not None:
            if unread is not None and inputs.outputs is None:
                self.guard.miss("the model's output", unread)
            self._take_batch(seen, inputs, output, loss, is_alone=is_alone)
        self._take_gradients(seen, turn, grads)
        assert seen.pieces is not None
        if self.own is not None:
            into = seen.sums, seen.maxima
            seen.own = self.own.look(inputs.step, grads, seen.pieces.shards, turn.optimizers, inputs.optimizer, into)
        layout = self.accord.agreed
        seen.tables = self.tables.look(turn, layout, seen.pieces, seen.sums, is_fitting=seen.is_fitting)
        if "extras" in seen.sums:
            seen.sums["extras"], seen.extras = pack_extras(extras, device, self.accord.say()), tuple(extras)
        return seen

    def _fit(self, seen: _Seen) -> None:
        """Find out whether this rank's model is the one that ranks have agreed on: else most of it stays blank."""
        seen.layout = self.accord.now
        seen.is_fitting = seen.layout == self.accord.agreed
        if not seen.is_fitting:
            seen.tap = None
            self.tables.forget()
            if self.own is not None:
                self.own.miss()

    def _take_batch(
        self, seen: _Seen, inputs: StepInputs, output: Prediction | None, loss: SeenLoss | None, *, is_alone: bool
    ) -> None:
        if self.guard.ok("numbers of the batch"):
            with self.guard("numbers of the batch"):
                seen.scalars = self._of_batch(inputs, output, loss)
                if is_alone:  # what one rank sees of its loss, another may not
                    self.kind.loss(seen.scalars)

    def _of_batch(self, inputs: StepInputs, output: Prediction | None, loss: SeenLoss | None) -> Scalars:
        """Return what can be said of batch, outputs and targets: as they were given, else as modules and loss show."""
        outputs = output if inputs.outputs is None else inputs.outputs
        targets, alone = inputs.targets, False
        if inputs.outputs is None and targets is None and loss is not None and loss.targets is not None:
            # What the loss compares, whatever form the batch has: the model's own output where it is that.
            targets = loss.targets
            same = output is not None and loss.outputs is not None and output.numel() == loss.outputs.numel()
            outputs = output if same else loss.outputs
            alone = not holds_targets(inputs.batch, targets.numel())
        tensors = (x for x in reversed(inputs.losses) if issubclass(type(x), Tensor))
        given = next((x for x in tensors if x.grad_fn is not None), None)
        form = loss.scalars if loss is not None else {} if given is None else form_scalars(given)
        found = {**batch_scalars(inputs.batch, outputs, targets, missed=self.guard.miss), **form}
        return found | {"targets_of_loss": 1.0} if alone else found

    def _take_gradients(self, seen: _Seen, turn: Turn, grads: Gradients) -> None:
        """Measure the gradients, where that was not done when backward was over."""
        look, has_details = self.produced.take(grads), turn.plan.histograms and len(grads) > 0
        is_as_seen = look is not None and not _is_unscaled(turn.inputs, grads)
        seen.is_sealed = look is not None and is_as_seen and look.holds(grads.params, turn.tensors)
        if look is not None and seen.is_sealed:
            turn.seals = look.seals
        if look is not None and seen.is_sealed and not self.produced.is_to_compare(turn.step):
            seen.pieces = look.pieces(grads, histograms=has_details)
        else:
            seen.pieces, seen.before = grads.pieces(histograms=has_details), look

    def _unseen(self, inputs: StepInputs, grads: Gradients, optimizers: Sequence[Optimizer]) -> dict[str, str]:
        watched = self.meter.watched
        if len(grads) == len(watched.params) and not (watched.unheld or watched.strange):
            return {}
        held = watched.held_by(optimizers)
        params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        params += [p for p in watched.held if id(p) in held and real_of(p) is not p]
        unread = {path: f"its gradient is neither measured nor treated: {why}" for path, why in grads.unread.items()}
        found = self.meter.account.unseen(watched, params, {id(p) for p in grads.params}) | unread
        if unread and "" in found:
            found[""] = next(iter(unread.values()))
        return found

    def _losses(
        self, inputs: StepInputs, device: torch.device, *, is_alone: bool = True
    ) -> tuple[Tensor | float | None, int]:
        """Return the mean of the losses that can be read, and their number."""
        if len(inputs.losses) == 1:
            loss = self._loss(inputs.losses[0], device, as_is=is_alone)
            return loss, int(loss is not None)
        known = [x for x in (self._loss(loss, device) for loss in inputs.losses) if x is not None]
        return _mean(known, device), len(known)

    def _loss(self, loss: Any, device: torch.device, *, as_is: bool = False) -> Tensor | float | None:
        try:
            return loss_value(loss, device, as_is=as_is)
        except Exception as error:
            self.guard.miss("the loss", error)
            return None

    def _share(self, seen: _Seen, num_losses: int) -> None:
        """Put what the host knows into the vector that travels over ranks."""
        device = self.meter.device
        seen.sums["samples"] = constant(seen.samples, device)
        if "counted" in seen.sums:
            seen.sums["counted"] = constant(float(seen.samples > 0), device)
        if seen.loss is not None:
            loss = seen.loss if isinstance(seen.loss, Tensor) else constant(seen.loss, device)
            seen.sums["loss"] = torch.stack([loss * num_losses, torch.full_like(loss, num_losses)])

    def _combine(self, seen: _Seen, grads: Gradients | None) -> dict[str, Tensor | float]:
        pieces = seen.pieces
        self.num_failed_treatments = self.num_unproven = 0
        held = (None, None) if pieces is None or not pieces.shards.groups else (pieces.rows, pieces.maxima)
        own = seen.own if pieces is not None and pieces.shards.groups else None
        rows, row_maxima = held if own is None else own.joined(*held)
        exchange = Exchange(None if pieces is None else pieces.shards)
        if exchange.groups and grads is not None:
            exchange.whole_among(*self.meter.whole_places(grads.params))
        batch = combine(
            seen.sums,
            seen.maxima,
            seen.scalars,
            self.meter.device,
            exchange=exchange,
            rows=rows,
            row_maxima=row_maxima,
        )
        if own is not None:
            own.part(rows, row_maxima, held)
        return batch

    def _rank_scalars(self, inputs: StepInputs, grads: Gradients) -> dict[str, float]:
        """Return what each rank knows for itself, and no rank may act on alone."""
        now = perf_counter()
        scalars = {"seconds": now - self._clock}
        self._clock = now
        kept = self.meter.were_kept(few_seals(grads.params), len(inputs.losses) or 1)
        if kept is not None:
            scalars["grads_kept"] = kept
        return scalars | inputs.scalars

    def _plain_scalars(self, inputs: StepInputs) -> dict[str, float]:
        scalars = {"num_trainable": float(self.meter.watched.index.num_trained)}
        if inputs.scale is not None:
            scalars["grad_scale"] = float(inputs.scale)
        if inputs.optimizer is not None:
            scalars["optimizer"] = float(inputs.optimizer)
        held, index, kind = self.meter.watched.held, self.meter.watched.index, self.kind
        others = self._company.step(id(held[0]) if held else 0)
        if others:
            scalars["others_step"] = float(others)
        if others or inputs.optimizer is not None or index is not kind.index:
            kind.step(index, inputs.optimizer, others)
        scalars.update(kind.scalars)
        return scalars


def _concluded(host: dict[str, Any]) -> None:
    """Add to numbers that have arrived what follows from them, which no kernel has to find."""
    host.setdefault("global_norm", np.float64(whole(host["norms"])))
    if "zeros" in host:
        counts = host["histograms"]
        host["details_sums"] = np.stack([host.pop("zeros"), counts[:, 255] + counts[:, 511]], axis=1)
        host["details_maxima"] = host.pop("largest")[:, None]


def _is_unscaled(inputs: StepInputs, grads: Gradients) -> bool:
    """Return whether a loss scale has been taken out of these gradients since backward: a loss scaler writes them by
    means that no version counter shows."""
    scale = grads.grad_scale
    return inputs.scale is not None and not isinstance(scale, Tensor) and scale == 1 and float(inputs.scale) != 1


def _mean(losses: Sequence[Tensor | float], device: torch.device) -> Tensor | float | None:
    """Return the mean of losses; a number where the host knows all of them, None of none."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor)]
    if not tensors:
        return sum(map(float, losses)) / len(losses) if losses else None
    if len(losses) == 1:
        return tensors[0]
    return torch.stack([x if isinstance(x, Tensor) else constant(x, device) for x in losses]).mean()


def _largest_rate(optimizers: Sequence[Optimizer]) -> float:
    largest = -math.inf
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if type(rate) is not float:
                rate = _rate(rate)
            if rate is not None and rate > largest:
                largest = rate
    return math.nan if largest == -math.inf else largest


def _rate(rate: Any) -> float | None:
    # A tensor rate on a device is left out rather than waited for; None and the like are no rates.
    try:
        return None if isinstance(rate, Tensor) and not is_host(rate.device) else float(rate)
    except Exception:
        return None
