"""Keeps gradwatch's own failures from becoming the user's: one warning, and the part is off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import GradwatchWarning

__all__ = ["Guard"]


class Guard:
    """`with guard("update ratios"): ...` turns an exception into one warning, and switches that part off.

    Ask `ok(part)` before entering. With `on_error="raise"` exceptions pass.
    """

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self.failed: dict[str, str] = {}

    @contextmanager
    def __call__(self, part: str, cleanup: Callable[[], object] | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.report(part, error)
            if cleanup is not None:
                cleanup()

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
            self.failed[part] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"gradwatch: {part} failed and is switched off, training goes on. {type(error).__name__}: {error}",
                GradwatchWarning,
                stacklevel=3,
            )

    def warn(self, message: str, category: type[Warning] = GradwatchWarning) -> None:
        warnings.warn(f"gradwatch: {message}", category, stacklevel=3)
