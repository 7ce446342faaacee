"""The words of the language; columns and scalars are those that a record can hold."""

from __future__ import annotations

from ...records import MODULE, PARAMETER, SCALAR, column_of, columns, is_scalar_name

__all__ = [
    "COLUMNS",
    "ELEMENTWISE",
    "FUNCTIONS",
    "REDUCTIONS",
    "SCALARS",
    "TRAILING",
    "is_column",
    "is_scalar",
    "known_names",
]

COLUMNS = frozenset(column.name for column in columns(PARAMETER, MODULE, own=False))
"""One number per path. Beside these, the user's own."""

SCALARS = frozenset(column.name for column in columns(SCALAR, own=False))
"""One number per step. Beside these, every `val_...` and `surgery_...`, and the user's own."""

TRAILING = ("median", "mean", "std", "max", "min", "quantile", "ema", "lag", "rate")
"""Functions of the past: of x and a number of measurements. The present is not among them."""

REDUCTIONS = ("max_over", "min_over", "mean_over", "median_over", "norm_over", "share_over", "any_over", "all_over")
"""Functions over paths."""

ELEMENTWISE = ("abs", "log", "sqrt")

FUNCTIONS = (*TRAILING, *REDUCTIONS, *ELEMENTWISE, "over")


def is_column(name: str) -> bool:
    """Return whether a name stands for one number per path."""
    known = column_of(name)
    return known is not None and known.kind != SCALAR


def is_scalar(name: str) -> bool:
    """Return whether a name may stand for one number per step."""
    return is_scalar_name(name)


def known_names() -> list[str]:
    """Return all names that an expression may read, for suggestions."""
    return [column.name for column in columns()]
