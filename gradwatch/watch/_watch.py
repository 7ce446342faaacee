"""The door for plain training loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError, TrainingStopped
from ..protocols import Request, Sink, Treatment
from ..records import Incident, StepRecord
from ._autopsy import remember_forward
from ._batch import num_samples
from ._draft import StepInputs
from ._engine import StepOutcome
from ._news import IncidentTarget, incident_target
from ._scaler import ScaleReader, scale_left_in_gradients, unscale
from ._session import Session
from ._settings import resolve
from ._stepper import chosen, steppers

__all__ = ["Watch"]


class Watch:
    """Watches the gradients of a plain training loop, and acts if asked.

    ```python
    with Watch(model, optimizer, rules="default", run_dir="runs/1") as watch:
        for x, y in loader:
            loss = loss_fn(model(x), y)
            loss.backward()
            watch.step(loss=loss)            # measure, judge, treat, then optimizer.step() unless vetoed
            optimizer.zero_grad()
    ```

    Nothing is written on the model; hooks come off when the `with` ends, however it ends.

    Args:
        model: the model as it is trained; DDP, compile, Fabric and Accelerate wrappers are looked through.
        optimizer: one, or several that step together (or one at a time, with `step(optimizer=...)`); also as Fabric or
            Accelerate prepared them. While Accelerate accumulates, `step` waits for the last micro-batch.
        rules: `"observe"`, `"default"`, `"autoclip"`, a rules file, a list of rules or a `RuleBook`.
        scaler: a `torch.amp.GradScaler`, where one is used; `step` then calls its `step` and `update` too.
        treatments: for every step.
        surgery: a method's name or a `Surgery`, for `backward({...})` and `split(...)`.
        run_dir: folder for records and incidents; None writes nothing.
        sinks: where else records go.
        log_every: optimizer steps between two log entries of sinks without a cadence of their own.
        on_incident: told of incidents in a thread of its own: a callable (each one, when it opens and when it is over),
            an http(s) address that takes a POST of JSON, or `"module:function"`.
        on_checkpoint: called with a file name when a rule asks for a checkpoint.
        name: of the run; tags and state keys begin with it.
        options: `paths`, `every`, `activations_every`, `updates_every`, `histograms_every`, `backward`,
            `memory_limit_mb`, `on_error`, ...: see `MeasureOptions`.

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
    """

    def __init__(  # noqa: PLR0913 - a door: flat names, resolved at once
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        rules: Any = "default",
        scaler: Any = None,
        treatments: Treatment | Sequence[Treatment] = (),
        surgery: Any = None,
        run_dir: str | Path | None = None,
        sinks: Sequence[Sink] | None = None,
        log_every: int | None = None,
        on_incident: IncidentTarget | None = None,
        on_checkpoint: Callable[[str], object] | None = None,
        name: str = "gradwatch",
        paths: str | Sequence[str] = "*",
        every: int = 1,
        activations_every: int | None = 50,
        updates_every: int | None = 50,
        histograms_every: int | None = 100,
        backward: str = "tensor",
        memory_limit_mb: float = 256,
        on_error: str = "warn",
        **options: Any,
    ) -> None:
        settings = resolve(
            rules=rules,
            treatments=treatments,
            surgery=surgery,
            sinks=sinks,
            name=name,
            log_every=log_every,
            paths=paths,
            every=every,
            activations_every=activations_every,
            updates_every=updates_every,
            histograms_every=histograms_every,
            backward=backward,
            memory_limit_mb=memory_limit_mb,
            on_error=on_error,
            **options,
        )
        if not isinstance(model, nn.Module):
            raise ConfigError(f"`model` must be a torch.nn.Module. Got {type(model).__name__}.")
        self._steppers = steppers(optimizer)
        self.optimizers = tuple(s.raw for s in self._steppers)
        # One inside a wrapper is the wrapper's to step and update; one given here is ours.
        inner = next((s.scaler for s in self._steppers if s.scaler is not None), None)
        self.scaler = inner if scaler is None or not scaler.is_enabled() else scaler
        self._on_checkpoint = on_checkpoint
        self._step = 0
        self._extra: dict[str, float] = {}
        self._scale = ScaleReader()
        self._losses: list[Tensor] = []
        self._stack = ExitStack()
        self._micro_losses: list[Any] = []
        self._num_samples = 0
        self.session = Session(
            model,
            self.optimizers,
            settings,
            sinks=settings.sinks or (),
            run_dir=run_dir,
            log_every=log_every or 50,
            on_incident=incident_target(on_incident),
        )
        self.session.begin()
        self._forward_handle = (
            remember_forward(model, self.session.engine.remember) if settings.options.autopsy else None
        )
        self.session.before_forward(0)

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken so far, vetoed ones included."""
        return self._step

    def backward(
        self, losses: Mapping[str, Tensor] | Tensor, *, parts: int = 1, last: bool = True, batch_size: int = 1
    ) -> Tensor:
        """Run the backward of a loss, or of task losses with surgery between their gradients where that is on.

        Args:
            losses: of each task by name, still attached to the graph; or one loss, in which `split` may stand.
            parts: accumulated micro-batches, that the sum is divided by. A `scaler`'s scale comes on top.
            last: the optimizer steps after this micro-batch.
            batch_size: samples of the micro-batch, for the gradient noise scale.

        Returns:
            The sum, detached and without any scale; `step` takes it as the loss where it is given none.
        """
        scale = self._scale.read(self.scaler)
        factor = scale / parts
        if isinstance(losses, Tensor):
            total = losses
        elif self.session.tasks is None:
            total = sum(list(losses.values())[1:], start=next(iter(losses.values())))
        else:
            total = self.session.tasks.tasks.begin(losses)
        scaled = total * factor if factor != 1 else total
        self.session.before_backward(scaled, scale=scale, parts=parts)
        try:
            scaled.backward()
        finally:
            self.session.after_backward(last=last, scale=scale, parts=parts, batch_size=batch_size)
        self._losses.append(total.detach())
        return total.detach()

    def step(
        self,
        loss: Any = None,
        *,
        batch: Any = None,
        outputs: Any = None,
        targets: Any = None,
        optimizer: Optimizer | None = None,
    ) -> StepOutcome:
        """Measure, judge and treat the gradients in `.grad`, then let the optimizers step, unless vetoed.

        Args:
            loss: of this step, unscaled: a tensor or a number.
            batch, outputs, targets: for rules that look at them; all optional.
            optimizer: the one that steps now, where several step each on its own; None: all.

        Raises:
            TrainingStopped: a rule or treatment asked for a stop.
        """
        stepping = chosen(self._steppers, optimizer)
        if not all(s.is_syncing for s in stepping):
            # Accelerate accumulates: its optimizers would not move now.
            self.micro_batch(loss, batch)
            return StepOutcome()
        if self.scaler is not None:
            for s in stepping:
                unscale(self.scaler, s.raw)
        outcome = self.after_backward(loss, batch=batch, outputs=outputs, targets=targets, optimizer=optimizer)
        mine = self.scaler if all(s.scaler is None for s in stepping) else None
        for s in stepping:
            if mine is not None:
                mine.step(s.raw)
            else:
                s.step()
        if mine is not None:
            mine.update()
        self.after_step()
        self._refuse(outcome.requests)
        return outcome

    def micro_batch(self, loss: Any = None, batch: Any = None) -> None:
        """Hand over what a micro-batch gave whose gradients accumulate; the last one of a step is `step`'s."""
        self._micro_losses += [] if loss is None else [loss]
        self._num_samples += num_samples(batch)

    def after_backward(
        self,
        loss: Any = None,
        *,
        batch: Any = None,
        outputs: Any = None,
        targets: Any = None,
        optimizer: Optimizer | None = None,
    ) -> StepOutcome:
        """The first half of `step`, for those who step themselves: measure, judge, treat.

        Where the outcome says `skip`, the optimizer's next `step()` moves nothing.
        """
        stepping = [s.raw for s in chosen(self._steppers, optimizer)]
        scaler = self.scaler
        inputs = StepInputs(
            step=self._step,
            losses=self._micro_losses + (self._losses if loss is None else [loss]),
            batch=batch,
            outputs=outputs,
            targets=targets,
            num_samples=self._num_samples + num_samples(batch) if self._num_samples else 0,
            grad_scale=1.0 if scaler is None else scale_left_in_gradients(scaler, stepping[0]),
            scaler=scaler is not None,
            scale=None if scaler is None else self._scale.read(scaler),
            optimizer=None if optimizer is None else self.optimizers.index(stepping[0]),
            scalars=self._extra,
        )
        self._extra, self._losses, self._micro_losses, self._num_samples = {}, [], [], 0
        outcome = self.session.step(inputs, stepping)
        for request in outcome.requests:
            self._carry_out(request)
        return outcome

    def after_step(self) -> None:
        """The second half of `step`: call it after the optimizer has stepped."""
        self.session.after_step()
        self._step += 1
        self.session.before_forward(self._step)
        self._scale.begin(self.scaler)
        if self.session.engine.treats_errors:
            self.session.engine.before_backward(self._scale.read(self.scaler))
        late = self.session.take_requests()
        for request in late:
            self._carry_out(request)
        self._refuse(late)

    def validation(self, loss: Any = None, **metrics: Any) -> None:
        """Hand over validation values; they stand on the next step's record as `val_loss` and `val_<metric>`;
        after the last step, rules hear of them when the run ends."""
        given = metrics if loss is None else {"loss": loss, **metrics}
        for key, value in given.items():
            number = float(value.detach()) if isinstance(value, Tensor) else float(value)
            self._extra[key if key == "train_eval_loss" else f"val_{key}"] = number

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for `silence` steps (a data switch, a new schedule)."""
        self.session.annotate(text, silence=silence, paths=paths, rules=rules)

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now."""
        return self.session.incidents

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, oldest first; bounded."""
        return self.session.history

    def summary(self) -> str:
        """Return a text table of layers, and the incidents with advice."""
        return self.session.summary()

    def report(self, path: str | Path) -> Path:
        """Write the run as one self-contained file (.html, .md, .json or .png)."""
        from ..report import write_session

        written = write_session(self.session, path)
        self.session.sinks.report(written)
        return written

    def state_dict(self) -> dict[str, Any]:
        """Return windows, counters and the treatments' memory, as plain values and tensors."""
        # In a tuple: `torch.distributed.checkpoint` takes mappings apart, and then gives back no key but those that the
        # fresh one has already; a tuple it takes whole.
        return {"step": self._step, "memory": (self.session.state_dict(),)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, on as many ranks as one likes."""
        packed = isinstance(state, Mapping) and "memory" in state
        self.session.load_state_dict(state["memory"][0] if packed else state)
        self._step = int(state.get("step", 0))
        self.session.engine.meter.disarm()
        self.session.before_forward(self._step)

    def close(self) -> None:
        """Take every hook off, write what is left. May be called twice."""
        self._stack.close()
        if self._forward_handle is not None:
            self._forward_handle.remove()
        if not self.session.closed:
            self.session.finish(self._extra)
        self.session.close()

    def __enter__(self) -> Watch:
        if self.session.tasks is not None:
            self._stack.enter_context(self.session.tasks.collecting())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _carry_out(self, request: Request) -> None:
        self.session.carry_out(request)
        if request.kind == "checkpoint" and self._on_checkpoint is not None:
            with self.session.engine.guard("`on_checkpoint`"):
                self._on_checkpoint(str(request.values.get("filename", "gradwatch")))

    def _refuse(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.kind == "stop":
                raise TrainingStopped(request.reason)
