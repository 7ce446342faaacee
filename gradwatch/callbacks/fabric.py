"""Lightning Fabric's events in, the engine's calls out."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._closing import end_all, insist
from .._markup import Text
from .._warn import warn
from ..errors import ConfigError, TrainingStopped
from ..records import HEALTHY, NOT_ENOUGH_SEEN, NOT_HEALTHY, Incident, Incidents, StepRecord, Verdict, judge_run
from ..sinks import sinks_for_loggers
from ..torchside import StepHook, weakly
from ..treatments import MicroBatchSurgery
from ..watch import (
    Forward,
    IncidentTarget,
    Look,
    RunDir,
    ScaleReader,
    Stepper,
    Tasks,
    Watch,
    checked_run_dir,
    incident_target,
    look,
    look_at,
    raw_optimizer,
    resolve,
    run_dir_of,
    tasks_of,
    unwrap,
)
from ._backward_end import BackwardEnd, Pass
from ._say import fitted, say

__all__ = ["GradWatch"]

_Batch = TypeVar("_Batch")


def _nothing() -> None:
    """Return what is known of a loader before there is one."""


class GradWatch:
    """Watches the training loops of a Fabric without a line in them, and acts if asked.

    ```python
    fabric = Fabric(callbacks=[GradWatch()])
    model, optimizer = fabric.setup(model, optimizer)
    for x, y in loader:
        loss = loss_fn(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    ```

    Every optimizer that steps parameters of a module that was set up gets a `Watch` of its own at its first step; the
    modules of step 0 have run by then, and are sampled from step 1 on. `fabric.call("watch", optimizer)` after the
    setup begins in good time; with several optimizers, `fabric.call("watch", first, second)`, they share one.
    Gradients are judged and treated as they come to `optimizer.step`, that is after `fabric.clip_gradients`, with the
    norm before it on record as `global_norm`; a line `fabric.call("on_before_optimizer_step", optimizer)` ahead of the
    clip moves judgement and treatments there. The loss is
    known where the module returns it (as a scalar, or as `loss` in a mapping), or from
    `fabric.call("on_before_backward", loss)`. `fabric.call("on_train_end")`, `close()` or a `with` end the run.

    Which batch it was stands on record where the loop says so: `for batch in watch.batches(loader)`, with this callback
    as `watch`, or `fabric.call("on_train_epoch_start")` and `fabric.call("on_train_batch_start", batch, batch_idx)`.

    `fabric.save` and `fabric.load` take the object in their state.

    Args:
        rules: `"observe"`, `"default"`, `"autoclip"`, a rules file, a list of rules or a `RuleBook`.
        run_dir: folder for records and incidents; None: `<name>` beside the first logger's files, or none without
            one; False: none.
        on_incident: told of incidents in a thread of its own: a callable, an http(s) address or `"module:function"`.
        on_checkpoint: called with a file name when a rule asks for a checkpoint.
        name: of this callback: its tags begin with it.
        verbose: print the summary at the end.
        **options: `treatments`, `sinks`, `log_every`, `live` as in `Watch`, and those of `MeasureOptions`. `surgery` is
            between the task losses that are handed to `gradwatch.split(a=..., b=...)`, of the first model that was set
            up.

    Raises:
        ConfigError: a setting that can't be, with the nearest valid names.
        TrainingStopped: from `optimizer.step`, where a rule or treatment asks for a stop.
    """

    def __init__(
        self,
        rules: Any = "default",
        *,
        run_dir: RunDir = None,
        on_incident: IncidentTarget | None = None,
        on_checkpoint: Callable[[str], object] | None = None,
        name: str = "gradwatch",
        verbose: bool = True,
        **options: Any,
    ) -> None:
        # Checked here, resolved by each Watch.
        self._settings = resolve(rules=rules, name=name, **options)
        if isinstance(self._settings.surgery, MicroBatchSurgery):
            raise ConfigError(
                "`surgery` between micro-batches must know which backward is the last of a step before a clip looks at "
                "gradients, and Fabric tells of no such thing. It works in Watch and in the callbacks of Lightning and "
                "Hugging Face; surgery between task losses works here too."
            )
        told = {"on_incident": incident_target(on_incident), "on_checkpoint": on_checkpoint}
        self._given = {"rules": rules, "name": name, **told, **options}
        self._run_dir, self._verbose = checked_run_dir(run_dir), verbose
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes get the callback as it was before any setup.
        return {"_given": self._given, "_run_dir": self._run_dir, "_verbose": self._verbose}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._fabric: Any = None
        self._ends: dict[int, tuple[nn.Module, BackwardEnd]] = {}
        self._watches: dict[int, Watch] = {}
        self._waiting: list[dict[str, Any]] = []
        self._untold: list[Callable[[Watch], None]] = []
        self._tasks: tuple[nn.Module, Tasks] | None = None
        self._collecting = ExitStack()
        self._measured: set[int] = set()
        self._num_closures = 0
        self._hook: Any = None
        self._scale = ScaleReader()
        self._first_look: Look | None = None
        self._epoch = self._batch_idx = -1
        self._loader: Callable[[], Any] = _nothing
        self._first_batch: Any = None
        self._forget()

    def _forget(self) -> None:
        self._passes: list[Pass] = []
        self._losses: list[Tensor] = []

    @property
    def watches(self) -> list[Watch]:
        """One for each optimizer that has stepped, or for those that were named together."""
        return list(dict.fromkeys(self._watches.values()))

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now, of one optimizer after the other."""
        return Incidents(i for w in self.watches for i in w.incidents)

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, of one optimizer after the other; bounded."""
        return [r for w in self.watches for r in w.history]

    def summary(self) -> str:
        """Return a text table of layers, and the incidents with advice, for each optimizer."""
        told = "\n\n".join(w.summary() for w in self.watches) or "gradwatch: no optimizer has stepped."
        return Text(told, self._repr_html_)

    def verdict(self) -> Verdict:
        """Return whether all is well, or why that can't be said; of several optimizers, the worst."""
        told = [w.verdict() for w in self.watches] or [judge_run()]
        return min(told, key=lambda v: (NOT_HEALTHY, NOT_ENOUGH_SEEN, HEALTHY).index(v.state))

    def _repr_html_(self) -> str:
        return "".join(w._repr_html_() for w in self.watches) or judge_run()._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.summary())

    def record(self, **values: Any) -> None:
        """Put numbers of your own on the next step's record, of every optimizer; see `Watch.record`."""
        self._tell(lambda watch: watch.record(**values))

    def register(self, **objects: Any) -> None:
        """Let more go back with the training when a `Rollback` takes it back; see `Watch.register`."""
        self._tell(lambda watch: watch.register(**objects))

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for `silence` optimizer steps."""
        self._tell(lambda watch: watch.annotate(text, silence=silence, paths=paths, rules=rules))

    def _tell(self, tell: Callable[[Watch], None]) -> None:
        if not self._watches:
            self._untold.append(tell)  # the first one is made when its optimizer steps
        for watch in self.watches:
            tell(watch)

    def report(self, path: str | Path) -> Path:
        """Write the run of the first optimizer as one self-contained file (.html, .md, .json or .png).

        Raises:
            RuntimeError: no optimizer has stepped.
        """
        if not self._watches:
            raise RuntimeError("there is nothing to report: no optimizer has stepped.")
        return self.watches[0].report(path)

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        self._fabric = fabric
        model = unwrap(module)
        if id(model) not in self._ends:
            end = BackwardEnd(model, self._on_backward_end, partial(self._look, model))
            self._ends[id(model)] = model, end
            self._collect_tasks(model, end)
        if self._hook is None:
            self._hook = StepHook.of(self._before_step).hang(register_optimizer_step_pre_hook)

    def _collect_tasks(self, model: nn.Module, end: BackwardEnd) -> None:
        """Let `split` be heard from the first model's first step on, whose Watch is made when it is over."""
        if self._tasks is None and any(p.requires_grad for p in model.parameters()):
            tasks = tasks_of(self._settings, model)
            if tasks is not None:
                self._tasks = model, tasks
                self._collecting.enter_context(tasks.collecting())
        end.is_muted = weakly(self._is_muted, False)

    def _is_muted(self) -> bool:
        probes = self._tasks is not None and self._tasks[1].tasks.probing
        return probes or any(w.session.engine.is_replaying for w in self.watches)

    def watch(self, *optimizers: Any) -> None:
        """Begin before the first step. Optimizers named together share one `Watch`, and may step in turns.

        Raises:
            ConfigError: they hold no parameter of a module that was set up.
        """
        if self._make([Stepper(o).raw for o in optimizers]) is None:
            raise ConfigError("these optimizers hold no parameter of a module that went through `fabric.setup`.")

    def batches(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """Give the batches of an epoch, and count them; see `Watch.batches`."""
        self.on_train_epoch_start()
        with suppress(TypeError):  # one that can't be pointed at tells no samples
            self._loader = weakref.ref(loader)
        for batch_idx, batch in enumerate(loader):
            self.on_train_batch_start(batch, batch_idx)
            yield batch
        self._batch_idx = -1

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        self._epoch, self._batch_idx = self._epoch + 1, -1

    def on_train_batch_start(self, batch: Any, batch_idx: int = -1, *args: Any, **kwargs: Any) -> None:
        self._batch_idx = batch_idx
        for watch in self.watches:
            if not watch.session.closed:
                watch.session.see(batch)
        # The first one is made when its optimizer steps.
        self._first_batch = None if self._watches else batch

    def _look(self, model: nn.Module, batch: Any, outputs: Any) -> Forward:
        batch = batch if len(batch) != 1 or isinstance(batch, Mapping) else batch[0]
        watches = [w for w in self.watches if w.session.model is model and not w.session.closed]
        # Of the first step there is no Watch yet.
        watch = next((w for w in watches if w.session.engine.meter.armed), watches[0] if watches else None)
        return look(batch, outputs) if watch is None else watch.session.look(batch, outputs)

    def _on_backward_end(self, seen: Pass) -> None:
        if not self._num_closures:
            self._measured.clear()  # one whose step has raised
        if not any(seen is known for known in self._passes):  # backward may run through one forward again
            self._passes.append(seen)
        # Of its first step there is no Watch yet: what a clip ahead of it would hide is looked at here.
        known = {id(w.session.model) for w in self.watches}
        new = [m for m, _ in self._ends.values() if id(m) not in known]
        with suppress(Exception):
            self._first_look = look_at(p for m in new for p in m.parameters()) if new else None

    def on_before_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        raw = Stepper(optimizer).raw
        self._measure(raw)
        self._measured.add(id(raw))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if id(optimizer) in self._measured:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._measure(optimizer)
            # A step that calls the one it inherits comes here twice.
            self._measured.add(id(optimizer))
            return None

        def measured() -> Any:
            self._num_closures += 1
            try:
                result = closure()
            except BaseException:
                if id(optimizer) in self._measured:
                    self.on_after_optimizer_step(None, optimizer)  # nobody else says that this step is over
                raise
            finally:
                self._num_closures -= 1
            if id(optimizer) in self._measured:
                self._forget()  # called again within its step
            else:
                self._measure(optimizer)
                self._measured.add(id(optimizer))
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": measured}
        return (args[0], measured, *args[2:]), kwargs

    def _measure(self, optimizer: Optimizer) -> None:
        watch = self._watches.get(id(optimizer)) or self._make([optimizer])
        if watch is None:
            return
        last = self._passes[-1] if self._passes else None
        losses = self._all_losses(watch)
        watch.at(epoch=self._epoch, batch_idx=self._batch_idx, loader=self._loader())
        for seen in self._passes[:-1]:
            watch.micro_batch(batch=seen.seen)
        for loss in losses[:-1]:
            watch.micro_batch(loss)
        alone = optimizer if len(watch.optimizers) > 1 else None
        watch.after_backward(losses[-1] if losses else None, batch=last and last.seen, optimizer=alone)
        self._forget()

    def _all_losses(self, watch: Watch) -> list[Tensor]:
        if self._losses:
            return self._losses
        scaler, found = watch.scaler, [p for p in self._passes if p.loss is not None and p.weight is not None]
        scale = self._scale.read(scaler)
        # What reaches backward counts, whatever it was divided by.
        return [p.loss * p.weight * (len(found) / scale) for p in found if p.loss is not None and p.weight is not None]

    def _make(self, optimizers: Sequence[Optimizer]) -> Watch | None:
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        models = [m for m, _ in self._ends.values() if any(id(p) in held for p in m.parameters())]
        if not models:
            return None  # not of this Fabric
        number = len(self.watches)
        given = dict(self._given)
        given["name"] = name = given["name"] + (f"-{number + 1}" if number else "")
        if given.get("sinks") is None:
            given["sinks"] = sinks_for_loggers(self._fabric.loggers, name=name)
        scaler = getattr(self._fabric.strategy.precision, "scaler", None)
        watch = Watch(models[0], optimizers, scaler=scaler, run_dir=self._folder(name), **given)
        if self._tasks is not None and self._tasks[0] is watch.session.model:
            watch.session.collect(self._tasks[1])
        if number < len(self._waiting):
            watch.load_state_dict(self._waiting[number])
        watch.session.engine.produced.give(self._first_look)
        self._watches |= dict.fromkeys(map(id, optimizers), watch)
        if self._first_batch is not None:
            watch.session.see(self._first_batch)
        self._first_batch = None
        untold, self._untold = self._untold, []
        for tell in untold:
            tell(watch)
        return watch

    def _folder(self, name: str) -> Path | None:
        if isinstance(self._run_dir, (str, os.PathLike)):
            return Path(self._run_dir) if name == self._given["name"] else Path(self._run_dir, name)
        log_dir = next((x.log_dir for x in self._fabric.loggers if getattr(x, "log_dir", None)), None)
        return run_dir_of(self._run_dir, name, None if log_dir is None else Path(log_dir))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        raw = raw_optimizer(optimizer)
        self._measured.discard(id(raw))
        watch = self._watches.get(id(raw))
        if watch is not None and not watch.session.closed:
            try:
                watch.after_step()
            except TrainingStopped:
                self.close()
                raise

    def on_validation_end(self, *args: Any, **metrics: Any) -> None:
        for watch in self.watches:
            watch.validation(**metrics)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._end(next((a for a in (*args, *kwargs.values()) if isinstance(a, BaseException)), None))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of every Watch, in the order in which their optimizers stepped first."""
        return {"watches": [w.state_dict() for w in self.watches] or self._waiting}

    def load_state_dict(self, state: Any) -> None:
        """Go on from a `state_dict`; one that can't be gone on from gives one warning, and all begins afresh."""
        watches = state.get("watches") if isinstance(state, Mapping) else None
        if not isinstance(watches, (list, tuple)):
            warn(
                "gradwatch: the state in the checkpoint is none of gradwatch's. It begins afresh, the training goes on."
            )
            watches = []
        self._waiting = list(watches)
        for watch, memory in zip(self.watches, self._waiting, strict=False):
            watch.load_state_dict(memory)

    def close(self) -> None:
        """Take every hook off, write what is left, print the summary. May be called twice."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        was_open = any(not w.session.closed for w in self.watches)
        watches = [partial(w.__exit__, None if error is None else type(error), error, None) for w in self.watches]
        insist(partial(end_all, self._let_go, *watches))
        if was_open and self._verbose and self._fabric.is_global_zero:
            say(fitted(self.summary()))

    def _let_go(self) -> None:
        hooks = [end.close for _, end in self._ends.values()] + ([] if self._hook is None else [self._hook.remove])
        end_all(*hooks)
        self._hook, self._ends, self._tasks = None, {}, None
        self._collecting.close()
        self._first_batch = None
        self._forget()

    def __enter__(self) -> GradWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([] if error is None else [Exception])):
            self._end(error)
