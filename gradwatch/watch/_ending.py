"""The ends of a run: hooks off, records written, whatever fails or interrupts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from .._closing import Surroundings, end_all, insist, why_ended
from ._guard import Guard

if TYPE_CHECKING:
    from ._session import Session

__all__ = ["Ending", "end_guarded"]


def end_guarded(guard: Guard, *steps: Callable[[], object]) -> None:
    """Take every step, each under guard: a device that has failed says so at every call, and hooks come off all the
    same."""
    end_all(*(partial(_one, guard, step) for step in steps))


def _one(guard: Guard, step: Callable[[], object]) -> None:
    with guard("closing"):
        step()


class Ending:
    """How one session ends: well, or by an exception; once, and to the end where Ctrl-C falls into it."""

    def __init__(self, session: Session, *first: Callable[[], object]) -> None:
        """`first`: what else is to be closed, before all."""
        self._session, self._first = session, first
        self._surroundings = Surroundings()
        self._finished = False
        self._why = ""

    def __call__(self, scalars: Mapping[str, float], *, error: BaseException | None = None) -> BaseException | None:
        """Take hooks off, let rules judge the whole run unless an exception ended it, write what is left.

        Args:
            scalars: what was learnt after the last step.
            error: what ended the run; None: whatever is on its way to the user now, as in a `finally`. Nothing that
                fails here takes its place.

        Returns:
            What ended the run; None where it came to its end.
        """
        error = self._surroundings.error() if error is None else error
        if error is None:
            insist(partial(self._run, scalars))
            return None
        self._finished, self._why = True, self._why or why_ended(error)
        try:
            insist(partial(self._run, scalars))
        except Exception as ours:
            self._session.engine.guard.failed.setdefault("closing", f"{type(ours).__name__}: {ours}")
        return error

    def _run(self, scalars: Mapping[str, float]) -> None:
        end_all(*self._first, self._session.engine.take_off, partial(self._finish, scalars), self._close)

    def _finish(self, scalars: Mapping[str, float]) -> None:
        if self._finished or self._session.closed:
            return
        self._finished = True
        try:
            self._session.finish(scalars)
        except BaseException as error:
            self._why = why_ended(error)
            raise

    def _close(self) -> None:
        self._session.close(self._why)
