"""Checks of settings: each raises a ConfigError that says whose setting, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, suggest

__all__ = ["check_choice", "check_count", "check_number", "check_patterns"]


def check_number(
    owner: object,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> None:
    """Raise a ConfigError unless `value` is a number within the bounds; nan never is."""
    if optional and value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Each condition is one that nan fails; every number has at least one bound.
    if (
        is_number
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    ):
        return
    bounds = [(above, "above"), (at_least, "at least"), (below, "below"), (at_most, "at most")]
    words = " and ".join(f"{word} {bound:g}" for bound, word in bounds if bound is not None)
    or_none = ", or None" if optional else ""
    raise ConfigError(f"{type(owner).__name__}: `{name}` must be a number {words}{or_none}. Got {value!r}.")


def check_count(owner: object, name: str, value: Any, *, at_least: int, optional: bool = False) -> None:
    """Raise a ConfigError unless `value` is a whole number of at least `at_least`."""
    if optional and value is None:
        return
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return
    or_none = ", or None" if optional else ""
    what = f"a whole number of at least {at_least}{or_none}"
    raise ConfigError(f"{type(owner).__name__}: `{name}` must be {what}. Got {value!r}.")


def check_choice(owner: object, name: str, value: Any, known: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of the known names."""
    if value in known:
        return
    hint = suggest(str(value), known, otherwise=f"Known: {', '.join(known)}.")
    raise ConfigError(f"{type(owner).__name__}: `{name}` can't be {value!r}. {hint}")


def check_patterns(owner: object, name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a glob pattern or a list of them."""
    patterns = [value] if isinstance(value, str) else value
    if isinstance(patterns, (list, tuple)) and patterns and all(isinstance(p, str) for p in patterns):
        return
    raise ConfigError(
        f"{type(owner).__name__}: `{name}` must be a glob pattern such as 'encoder.*' or a list of them. Got {value!r}."
    )
