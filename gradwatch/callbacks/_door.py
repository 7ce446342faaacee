"""What a callback shows of its session, during a run and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._markup import Text
from ..records import Incident, Incidents, StepRecord, Verdict, judge_run
from ..report import write_report, write_session
from ..watch import Session, summarize
from ._elsewhere import Elsewhere

__all__ = ["SessionDoor"]


class SessionDoor:
    """Incidents, history, summary and report of `self._session`, which is None until training begins; of the run folder
    where it began in launched processes."""

    _session: Session | None
    _elsewhere: Elsewhere
    _starter = "trainer.fit"
    _registered: Mapping[str, Any] = {}

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now."""
        if self._session is not None:
            return self._session.incidents
        run = self._elsewhere.read()
        return Incidents([] if run is None else run.incidents)

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, oldest first; bounded."""
        if self._session is not None:
            return self._session.history
        run = self._elsewhere.read()
        return [] if run is None else list(run.records())

    @property
    def run_dir(self) -> Path | None:
        """Where this run's files are."""
        return self._elsewhere.ask() if self._session is None else self._session.run_dir

    def verdict(self) -> Verdict:
        """Return whether all is well, or why that can't be said; see `gradwatch.verdict`."""
        if self._session is not None:
            return self._session.verdict()
        run = self._elsewhere.read()
        return judge_run() if run is None else run.verdict()

    def __repr__(self) -> str:
        watched = "no training has begun" if self._session is None else f"watches {type(self._session.model).__name__}"
        return f"<{type(self).__name__}: {watched}>"

    def _repr_html_(self) -> str:
        if self._session is not None:
            return self._session.card().html()
        run = self._elsewhere.read()
        return judge_run()._repr_html_() if run is None else run._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.summary())

    def summary(self) -> str:
        """Return a text table of layers, and the incidents with advice."""
        if self._session is not None:
            return Text(self._session.summary(), self._session.card().html)
        run = self._elsewhere.read()
        if run is not None:
            told = str(run.summary) or summarize(list(run.records()), list(run.incidents), verdict=run.verdict())
            return Text(told, run._repr_html_)
        if self._elsewhere.began:
            return "gradwatch: the training ran in processes of its own, and left no run folder that can be read here."
        return "gradwatch: no training has begun."

    def report(self, path: str | Path) -> Path:
        """Write the run as one self-contained file (.html, .md, .json or .png).

        Raises:
            RuntimeError: no training has begun.
        """
        if self._session is None:
            run = self._elsewhere.read()
            if run is not None:
                return write_report(run, path)
            raise RuntimeError(f"there is nothing to report: call `report` during or after `{self._starter}`.")
        written = write_session(self._session, path)
        self._session.sinks.report(written)
        return written

    def record(self, **values: Any) -> None:
        """Put numbers of your own on the next step's record; see `Watch.record`. Nothing before training begins."""
        if self._session is not None:
            self._session.record(values)

    def register(self, **objects: Any) -> None:
        """Let more go back with the training when a `Rollback` takes it back; see `Watch.register`."""
        self._registered = {**self._registered, **objects}
        if self._session is not None:
            self._session.register(objects)

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for `silence` optimizer steps."""
        if self._session is not None:
            self._session.annotate(text, silence=silence, paths=paths, rules=rules)
