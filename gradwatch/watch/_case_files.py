"""Case files: what is known of an incident, gathered when it opens, and once more when the steps after it are over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from ..records import CaseFile, Incident, StepRecord, WhatIf, with_cases
from ..sinks import SafeSinks, batch_name
from ._batches import Batches, Fetched
from ._case_numbers import LONGEST_LOOK, gathered, with_ids
from ._engine import Engine
from ._loaders import samples_of
from ._ranks import is_writer, rank_and_size
from ._what_ifs import WhatIfs

__all__ = ["MAX_BATCHES", "MAX_CASES", "CaseFiles"]

MAX_CASES = 32
"""Incidents of one run that get a case file, the first ones."""
MAX_BATCHES = 8
"""Batches that are saved in one run."""
AFTER = 16
"""Steps after an incident that belong to its case."""


class CaseFiles:
    """Makes the case files of one run.

    Args:
        engine: that measures and judges.
        saves_batches: save the batch of an incident beside its case file.
        what_ifs: tries the training again at the first critical incident; None: nobody does.

    Attributes:
        say: shows one line to the user.
        folder: of the run; "" where it has none.
    """

    def __init__(self, engine: Engine, *, saves_batches: bool, what_ifs: WhatIfs | None = None) -> None:
        self._what_ifs = what_ifs
        self.say: Callable[[str], object] = lambda line: None
        self.folder = ""
        self._engine = engine
        self.batches = Batches(keeps=saves_batches, limit_bytes=engine.options.memory_limit_bytes // 4)
        self.loader: Callable[[], Any] = lambda: None
        self._cases: dict[tuple[int, str, int], CaseFile] = {}
        self._waiting: dict[tuple[int, str, int], Fetched] = {}
        self._open: set[tuple[int, str, int]] = set()
        self._early: list[Incident] = []
        self._num_saved = 0
        self._is_over = False

    @property
    def is_waiting(self) -> bool:
        """Whether a case is to be told more of."""
        return bool(self._open or self._early)

    @property
    def cases(self) -> list[CaseFile]:
        return list(self._cases.values())

    def with_cases(self, incidents: Sequence[Incident]) -> list[Incident]:
        return with_cases(incidents, self.cases)

    def take_loader(self, loader: Any) -> None:
        """Say which loader the batches come from, for as long as it lives."""
        try:
            self.loader = weakref.ref(loader)
        except TypeError:
            self.loader = lambda: None

    def open(self, incident: Incident, sinks: SafeSinks) -> None:
        """Gather what is known of an incident that has opened; as soon as its step is on record: of steps that are
        judged together the findings come before the records."""
        key = _key(incident)
        if key in self._cases or len(self._cases) >= MAX_CASES or not is_writer():
            return
        history = self._engine.completion.history
        if not self._is_over and not (history and history[-1].step >= incident.first_step):
            self._early.append(incident)
            return
        rank, num_ranks = rank_and_size()
        case = gathered(incident, self._history(), self._engine.autopsy, self._engine.alarmed)
        case = replace(case, rank=rank, num_ranks=num_ranks, what_if=self._tried(incident), folder=self.folder)
        self._open.add(key)
        self._cases[key] = self._with_batch(key, self._with_samples(case))
        sinks.case(self._cases[key], self._take_batch(key))

    def _tried(self, incident: Incident) -> WhatIf | None:
        """Return what would cure an incident, where that is asked for, and it is the first critical one."""
        if self._what_ifs is None or not self._what_ifs.is_open or incident.severity != "critical":
            return None
        self._engine.is_replaying = True  # another model's hooks may see these forwards, too
        found = None
        try:
            with self._engine.guard("what would cure it"):
                found = self._what_ifs.answer(incident)
                self.say(f"what if ({incident.name or incident.rule}): {found.sentence()}")
        finally:
            self._engine.is_replaying = False
        return found

    def follow(self, step: int, sinks: SafeSinks) -> None:
        """Say that a step is on record: cases of which enough has passed are completed."""
        self._open_early(sinks)
        for key in list(self._open):
            if step >= self._cases[key].step + AFTER:
                self._complete(key, sinks)
            elif key in self._waiting and self._waiting[key].ready:
                self._arrived(key)
                sinks.case(self._cases[key], self._take_batch(key))

    def finish(self, sinks: SafeSinks) -> None:
        """Complete every case: the run is over."""
        self._is_over = True
        self._open_early(sinks)
        for key in list(self._open):
            self._complete(key, sinks)
        self.batches.clear()

    def _open_early(self, sinks: SafeSinks) -> None:
        early, self._early = self._early, []
        for incident in early:
            self.open(incident, sinks)

    def _complete(self, key: tuple[int, str, int], sinks: SafeSinks) -> None:
        self._open.discard(key)
        incidents = {_key(i): i for i in self._engine.judge.incidents}
        case = self._cases[key]
        incident = incidents.get(key)
        if incident is not None:
            fresh = gathered(incident, self._history(), self._engine.autopsy, self._engine.alarmed)
            later = [*_WORST, *(name for name in _LATER if getattr(fresh, name))]
            case = replace(case, **{name: getattr(fresh, name) for name in later})
        if key in self._waiting:
            self._waiting[key].wait()
        self._cases[key] = replace(case, complete=True)
        if key in self._waiting:
            self._arrived(key)
        if incident is not None:
            told = self.with_cases(list(incidents.values()))
            self._cases[key] = next((i.case for i in told if _key(i) == key and i.case), self._cases[key])
        sinks.case(self._cases[key], self._take_batch(key))

    def _history(self) -> list[StepRecord]:
        history = self._engine.completion.history
        return list(islice(history, max(0, len(history) - LONGEST_LOOK), None))

    def _with_samples(self, case: CaseFile) -> CaseFile:
        samples: tuple[int, ...] = ()
        how = ""
        loader = self.loader()
        if loader is not None:
            samples, how = samples_of(loader, case.batch_idx, case.num_samples, case.epoch)
        return with_ids(case, samples, how)

    def _with_batch(self, key: tuple[int, str, int], case: CaseFile) -> CaseFile:
        seen = self.batches.of(case.step)
        if seen is None:
            notes = () if case.sample_ids else ("which samples: nobody tells (see the page on case files)",)
            return replace(case, notes=(*case.notes, *notes))
        saves = bool(seen.batches) and self._num_saved < MAX_BATCHES
        self._num_saved += saves
        self._waiting[key] = Fetched(seen, saves=saves)
        if self._waiting[key].ready:
            self._cases[key] = case
            self._arrived(key)
            return self._cases[key]
        return case

    def _arrived(self, key: tuple[int, str, int]) -> None:
        """Take up what has come from the device."""
        fetched, case = self._waiting[key], self._cases[key]
        samples = fetched.samples()
        if samples and (not case.num_samples or len(samples) == case.num_samples):
            names = " and ".join(f"`{name}`" for name in fetched.names)
            case = with_ids(case, samples, f"{names} of the batch")
        if fetched.has_batch:
            case = replace(case, batch_file=batch_name(case))
        self._cases[key] = replace(case, notes=(*case.notes, *fetched.left_out))

    def _take_batch(self, key: tuple[int, str, int]) -> bytes | None:
        if key not in self._waiting or not self._waiting[key].ready:
            return None
        case = self._cases[key]
        about = {"rule": case.rule, "step": str(case.step), "epoch": str(case.epoch), "batch_idx": str(case.batch_idx)}
        return self._waiting.pop(key).packed(about)


_WORST = ("value", "bar", "worst_path", "worst_step")
"""A number, where and when it was, and its bar: of one finding, so that none stays behind when another is worse."""
_LATER = (
    *("curves", "steps", "layers", "histograms", "treatments"),
    *("born_in", "phase", "modules", "flight_recorder"),
)
"""What is known better when the steps after an incident are over, where it is known at all."""


def _key(incident: Incident) -> tuple[int, str, int]:
    return incident.id, incident.name or incident.rule, incident.first_step
