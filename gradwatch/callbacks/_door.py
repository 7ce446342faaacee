"""What a callback shows of its session, during a run and after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..records import Incident, StepRecord
from ..report import write_session
from ..watch import Session

__all__ = ["SessionDoor"]


class SessionDoor:
    """Incidents, history, summary and report of `self._session`, which is None until training begins."""

    _session: Session | None
    _starter = "trainer.fit"

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far, as they stand now."""
        return [] if self._session is None else self._session.incidents

    @property
    def history(self) -> list[StepRecord]:
        """The recent records, oldest first; bounded."""
        return [] if self._session is None else self._session.history

    @property
    def run_dir(self) -> Path | None:
        """Where this run's files are."""
        return None if self._session is None else self._session.run_dir

    def summary(self) -> str:
        """Return a text table of layers, and the incidents with advice."""
        return "gradwatch: no training has begun." if self._session is None else self._session.summary()

    def report(self, path: str | Path) -> Path:
        """Write the run as one self-contained file (.html, .md, .json or .png).

        Raises:
            RuntimeError: no training has begun.
        """
        if self._session is None:
            raise RuntimeError(f"there is nothing to report: call `report` during or after `{self._starter}`.")
        written = write_session(self._session, path)
        self._session.sinks.report(written)
        return written

    def annotate(
        self, text: str, *, silence: int = 0, paths: str | Sequence[str] = "*", rules: str | Sequence[str] = "*"
    ) -> None:
        """Put a note on record, and keep rules silent for `silence` optimizer steps."""
        if self._session is not None:
            self._session.annotate(text, silence=silence, paths=paths, rules=rules)
