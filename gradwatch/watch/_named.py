"""Numbers that the user puts on record under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..records import SCALAR, Column, add_column, column_of, is_scalar_name, own_columns
from ._guard import Guard
from ._validation import as_number

__all__ = ["own_numbers"]


def own_numbers(values: Mapping[str, Any], guard: Guard) -> dict[str, float]:
    """Return those that are numbers, under names that can be; the others are told of once and left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        _put(found, name, value, guard)
    return found


def _put(found: dict[str, float], name: str, value: Any, guard: Guard) -> None:
    try:
        number = as_number(value)
        if column_of(name) is None and not is_scalar_name(name):
            add_column(Column(name=name, kind=SCALAR, meaning=f"`{name}`, as the user recorded it."))
        _refuse_built_in(name)
        found[name] = number
    except Exception as error:
        guard.miss(f"the number {name!r}", error)


def _refuse_built_in(name: str) -> None:
    if is_scalar_name(name) and name not in _own_scalars() and not name.startswith("val_"):
        raise ValueError("gradwatch records a number of this name itself")
    known = column_of(name)
    if known is not None and known.kind != SCALAR:
        raise ValueError("this is the name of a column: one number per path")


def _own_scalars() -> frozenset[str]:
    return frozenset(column.name for column in own_columns() if column.kind == SCALAR)
