"""One watched run: the engine with its sinks, its incident lines and its state. Shared by every adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._version import __version__
from ..errors import ConfigError
from ..protocols import Request, RunMeta, Sink
from ..records import Incident, StepRecord
from ..sinks import RunFolder, SafeSinks
from ._batch import num_samples
from ._draft import StepInputs
from ._engine import ALARMS, Engine, StepOutcome
from ._flight import write_flight
from ._news import IncidentTarget, news_sink
from ._paths import clean_path, unwrap
from ._ranks import is_writer, world_size
from ._settings import Settings
from ._summary import summarize
from ._tasks import Tasks, wants_tasks
from ._unseen import unseen

__all__ = ["MAX_LINES", "Session"]

MAX_LINES = 30
"""Incident lines printed in one run; what comes after is in the summary and the run folder."""

_log = logging.getLogger("gradwatch")


class Session:
    """One run. Adapters tell it what happens; it tells the engine, the sinks and the user.

    Args:
        model: as the user has it; wrappers are taken off.
        optimizers: raw torch optimizers.
        settings: from `resolve`.
        sinks: where records go, beside the run folder.
        run_dir: folder for the run's files, or None.
        log_every: cadence of sinks that do not choose their own.
        say: shows one line to the user.
        on_incident: told of incidents, in a thread of its own: a callable, or an http(s) address (see `news_sink`).
        start_step: optimizer steps taken before this run (a resumed one).
    """

    def __init__(  # noqa: PLR0913 - a door: flat names, resolved at once
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        settings: Settings,
        *,
        sinks: Sequence[Sink] = (),
        run_dir: str | Path | None = None,
        log_every: int = 50,
        say: Callable[[str], None] | None = None,
        on_incident: IncidentTarget | None = None,
        start_step: int = 0,
    ) -> None:
        self.settings = settings
        self.model = unwrap(model)
        # Lightning takes the compiled module apart, and keeps the compiler's context on the one inside.
        self._is_compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiler_ctx", None) is not None
        self._say = say or _log.warning
        self._num_lines = 0
        self._said: set[tuple[int, str]] = set()
        self._news: dict[tuple[int, str], Incident] = {}
        self._closed = False
        self.tasks: Tasks | None = None
        self._tasks_state: Any = None
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.engine = Engine(
            self.model,
            optimizers,
            book=settings.book,
            treatments=settings.treatments,
            options=settings.options,
            on_incident=self._incident,
            on_record=self._record,
        )
        chosen = list(sinks) if is_writer() else []
        if self.run_dir is not None and is_writer():
            chosen.insert(0, RunFolder(self.run_dir))
        if on_incident is not None and is_writer():
            chosen.append(news_sink(on_incident))
        self.sinks = SafeSinks(chosen, log_every=log_every, on_error=settings.options.on_error)
        self.sinks.open(self._meta(start_step))

    def _meta(self, start_step: int) -> RunMeta:
        options = {k: getattr(self.settings.options, k) for k in self.settings.options.__dataclass_fields__}
        options["rules"] = [rule.name for rule in self.settings.book.rules]
        options["treatments"] = [t.name for t in self.settings.treatments]
        options["world_size"] = world_size()
        return RunMeta(
            name=self.settings.name,
            run_dir=None if self.run_dir is None else str(self.run_dir),
            started=time.time(),
            options=options,
            versions={"gradwatch": __version__, "torch": torch.__version__},
            model=type(self.model).__name__,
            start_step=start_step,
        )

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now, in the order in which they began."""
        return self.engine.judge.incidents

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, oldest first; bounded."""
        return list(self.engine.completion.history)

    @property
    def notes(self) -> list[str]:
        """What gradwatch could not see, or has switched off."""
        notes = [f"{part} was switched off: {why}" for part, why in self.engine.guard.failed.items()]
        notes += [f"sink {name} was switched off: {error}" for name, error in self.sinks.failed.items()]
        if self._is_compiled and self.settings.options.activations_every is not None:
            notes.append("the model is compiled: what hooks on modules should measure is not seen there")
        notes += unseen(self.engine.meter, self.engine.judge)
        return notes

    def summary(self) -> str:
        """Return the table of layers and the incidents, as text."""
        return summarize(self.history, self.incidents, num_skipped=self.engine.completion.num_skipped, notes=self.notes)

    def _record(self, record: StepRecord) -> None:
        self.sinks.push(record)
        if self._news:
            self._tell()

    def _incident(self, incident: Incident) -> None:
        # Told when the step is complete: by then it stands with it what was done about it.
        self._news[incident.id, incident.rule] = incident

    def _tell(self) -> None:
        news, self._news = self._news, {}
        now = {(i.id, i.rule): i for i in self.incidents}
        for key in news:
            incident = now.get(key, news[key])
            if key not in self._said and incident.rule in ALARMS:
                incident = self._record_flight(incident)
            self.sinks.incident(incident)
            if key in self._said and not incident.resolved:
                continue
            if key not in self._said and incident.severity != "info" and is_writer():
                self._print(incident)
            self._said.add(key)

    def _record_flight(self, incident: Incident) -> Incident:
        if self.run_dir is None or not is_writer() or len(self._said) >= MAX_LINES:
            return incident
        with self.engine.guard("the flight recorder"):
            autopsy = self.engine.autopsy
            path = write_flight(self.run_dir, incident, self.history, autopsy.modules if autopsy else ())
            details = {"flight_recorder": path.name}
            self.engine.judge.explain(incident, details)
            return replace(incident, details={**incident.details, **details})
        return incident

    def _print(self, incident: Incident) -> None:
        if self._num_lines < MAX_LINES:
            self._say(f"gradwatch {incident}")
        elif self._num_lines == MAX_LINES:
            self._say("gradwatch: further incidents are not printed; see the summary.")
        self._num_lines += 1

    def begin(self, lightning_module: Any = None) -> None:
        """Begin to collect task losses, where surgery or conflict diagnosis is asked for.

        Args:
            lightning_module: whose `training_step` returns them; None in loops that call `backward({...})` or `split`.
        """
        options = self.settings.options
        if not wants_tasks(self.settings.surgery, options.conflicts_every, self.settings.book.rules):
            return
        named = [(clean_path(n), p) for n, p in self.model.named_parameters()]
        tasks = self.tasks = Tasks(
            self.settings.surgery, named, conflicts_every=options.conflicts_every, module=lightning_module
        )
        self.engine.meter.is_muted = lambda: tasks.tasks.probing
        if self._tasks_state is not None:
            tasks.load_state_dict(self._tasks_state)

    def before_forward(self, step: int) -> None:
        """Say that a micro-batch begins."""
        if self.tasks is not None:
            self.tasks.begin(step)
        self.engine.before_forward(step)

    def before_backward(self, loss: Tensor, *, scale: float = 1.0, parts: int = 1) -> None:
        """Say that backward comes next: task gradients are probed here.

        Args:
            loss: what backward will be called on.
            scale: the loss scaler's, that `loss` is already multiplied by.
            parts: accumulated micro-batches, that it is already divided by.
        """
        self.engine.before_backward(scale)
        if self.tasks is not None:
            self.tasks.before_backward(loss, scale / parts)

    def after_backward(self, *, last: bool, scale: float = 1.0, parts: int = 1, batch_size: float = 1.0) -> None:
        """Say that one micro-batch's backward is over; `last`: the optimizer steps next."""
        if self.tasks is not None:
            self.tasks.after_backward(last=last, grad_scale=scale / parts, batch_size=batch_size)

    def step(self, inputs: StepInputs, optimizers: Sequence[Optimizer] | None = None) -> StepOutcome:
        """Measure, judge and treat, with what surgery has to say put on record."""
        if self.tasks is not None:
            inputs.scalars = inputs.scalars | self.tasks.report()
        return self.engine.after_backward(inputs, optimizers)

    def after_step(self) -> None:
        self.engine.finish_step()

    def optimizer_number(self, optimizer: Optimizer) -> int:
        """Return which of the run's optimizers this is."""
        return next((i for i, o in enumerate(self.engine.optimizers) if o is optimizer), 0)

    def count_samples(self, batch: Any) -> int:
        return num_samples(batch)

    def carry_out(self, request: Request) -> None:
        """Do what needs no trainer: lower learning rates, notify."""
        if request.kind == "lower_learning_rate":
            values = request.values
            self.engine.rates.lower(values["factor"], values.get("steps"), name=str(values.get("rule", "")))
        elif request.kind == "surgery" and self.tasks is not None:
            self.tasks.switch(request.values["surgery"])
        elif request.kind == "notify":
            with self.engine.guard("notifying"):
                request.values["target"](request.values["incident"])

    def take_requests(self) -> list[Request]:
        """Return what rules asked for that were judged after their step, once."""
        requests = list(self.engine.completion.late_requests)
        self.engine.completion.late_requests.clear()
        return requests

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for a number of steps (a data switch, a new schedule)."""
        self.engine.judge.annotate(text, silence=silence, paths=paths, rules=rules)
        # With the step: a replay must keep still over the same steps.
        self.sinks.annotate(text=text, silence=silence, paths=paths, rules=rules)

    def state_dict(self) -> dict[str, Any]:
        state = self.engine.state_dict()
        if self.tasks is not None:
            state["surgery"] = self.tasks.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise ConfigError(f"gradwatch's state is a mapping made by `state_dict()`. Got {type(state).__name__}.")
        self.engine.load_state_dict(state)
        self._tasks_state = state.get("surgery")
        if self.tasks is not None and self._tasks_state is not None:
            self.tasks.load_state_dict(self._tasks_state)

    def finish(self, scalars: Mapping[str, float] | None = None) -> None:
        """End the run well: the last records, rules that judge the whole run, the summary.

        Args:
            scalars: what was learnt after the last step (a last validation).
        """
        scalars = scalars or {}
        self.engine.finish(scalars)
        if scalars:
            self.sinks.annotate(closing=dict(scalars))
        self._tell()
        self.sinks.summary(self.summary())

    def close(self) -> None:
        """Take everything off the model, write what is left. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.tasks is not None:
            self.tasks.close()
        self.engine.close()
        self._tell()
        self.sinks.flush()
        self.sinks.close()
