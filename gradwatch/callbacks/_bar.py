"""The global norm among a progress bar's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["NumberInBar"]

_ABSENT = object()


class NumberInBar:
    """Shows one number in a Lightning progress bar, for as long as it is attached.

    `LightningModule.log(prog_bar=True)` would put it among `trainer.callback_metrics` too, where scripts look for
    what they logged themselves.

    Args:
        name: shown before the number.
        read: returns the number, or None where there is none yet; called whenever the bar is drawn.
    """

    def __init__(self, name: str, read: Callable[[], float | None]) -> None:
        self._name, self._read = name, read
        self._bar: Any = None
        self._before: Any = _ABSENT

    def attach(self, bar: Any) -> None:
        """Begin to show the number in a bar; in none, where the Trainer has none."""
        self.detach()
        metrics = getattr(bar, "get_metrics", None)
        if metrics is not None:
            self._bar, self._before = bar, vars(bar).get("get_metrics", _ABSENT)
            bar.get_metrics = partial(_with_number, metrics, self._name, self._read)

    def detach(self) -> None:
        """Leave the bar as it was."""
        bar = self._bar
        if bar is None:
            return
        if self._before is _ABSENT:
            vars(bar).pop("get_metrics", None)
        else:
            bar.get_metrics = self._before
        self._bar = None

    def __getstate__(self) -> dict[str, Any]:
        # A bar holds its Trainer: a copy of the callback that shows the number does not want that.
        return {**self.__dict__, "_bar": None, "_before": None}


def _with_number(
    metrics: Callable[..., dict[str, Any]], name: str, read: Callable[[], float | None], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    shown, number = metrics(*args, **kwargs), read()
    # In front, as Lightning's own: what the script logged stays the end of the line.
    return shown if number is None else {name: number, **shown}
