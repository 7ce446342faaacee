"""Keeps gradwatch's own failures from becoming the user's: one warning, and the part is off."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from .._warn import one_line, warn
from ..errors import GradwatchWarning, UnreadableError

__all__ = ["Guard"]


class Guard:
    """`with guard("update ratios"): ...` turns an exception into one warning, and switches that part off.

    Ask `ok(part)` before entering. With `on_error="raise"` exceptions pass.

    Attributes:
        failed: what is switched off -> why.
        stumbled: what failed, and is tried again where it is due again -> why.
        missed: what could not be read, and is tried again -> why.
        limits: what can't be done in this run, in sentences.
    """

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self.failed: dict[str, str] = {}
        self.stumbled: dict[str, str] = {}
        self.missed: dict[str, str] = {}
        self.limits: list[str] = []

    def __call__(self, part: str, cleanup: Callable[[], object] | None = None) -> _Guarded:
        return _Guarded(self, part, cleanup)

    def ok(self, part: str) -> bool:
        """Whether the part has not failed."""
        return part not in self.failed

    def report(self, part: str, error: BaseException) -> None:
        """Say once that a part has failed.

        Raises:
            BaseException: the error itself, with `on_error="raise"`.
        """
        if self._on_error == "raise":
            raise error
        if part not in self.failed:
            self.failed[part] = one_line(error)
            self.warn(f"{part} failed and is switched off, training goes on. {self.failed[part]}")

    def stumble(self, sentence: str, error: BaseException) -> None:
        """Say once what has failed that is not switched off: it is tried again where it is due again.

        Args:
            sentence: what failed, and what came of it.

        Raises:
            BaseException: the error itself, with `on_error="raise"`.
        """
        if self._on_error == "raise":
            raise error
        if sentence not in self.stumbled:
            self.stumbled[sentence] = one_line(error)
            self.warn(f"{sentence}, training goes on. {self.stumbled[sentence]}")

    def miss(self, what: str, error: BaseException | str) -> None:
        """Say once that something of the user's can't be read: that alone is left out, and nothing is switched off.

        Raises:
            UnreadableError: with `on_error="raise"`; the error itself, where there is one.
        """
        if self._on_error == "raise":
            raise error if isinstance(error, BaseException) else UnreadableError(f"{what} can't be read: {error}")
        if what not in self.missed:
            self.missed[what] = one_line(error)
            verb = "are" if what.startswith("numbers ") else "is"
            self.warn(f"{what} can't be read and {verb} left out. {self.missed[what]}")

    def limit(self, sentence: str, *, aloud: bool) -> None:
        """Put on record what can't be done in this run; `aloud`: with a warning, since something was asked for."""
        if sentence not in self.limits:
            self.limits.append(sentence)
            if aloud:
                self.warn(sentence)

    @property
    def notes(self) -> list[str]:
        """All of that, in sentences."""
        notes = [f"{part} was switched off: {why}" for part, why in self.failed.items()]
        notes += [f"{sentence}: {why}" for sentence, why in self.stumbled.items()]
        notes += [f"{what} could not be read: {why}" for what, why in self.missed.items()]
        return notes + self.limits

    def warn(self, message: str, category: type[Warning] = GradwatchWarning) -> None:
        warn(f"gradwatch: {message}", category, stacklevel=3)


class _Guarded:
    """One block under guard. A class: entering a generator costs a small model's step several times as much."""

    __slots__ = ("_cleanup", "_guard", "_part")

    def __init__(self, guard: Guard, part: str, cleanup: Callable[[], object] | None) -> None:
        self._guard, self._part, self._cleanup = guard, part, cleanup

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._guard.report(self._part, error)
        if self._cleanup is not None:
            self._cleanup()
        return True
