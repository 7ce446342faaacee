"""What a record can hold: every column and scalar with its meaning, told once; here what there is to know of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError
from ._column_table import BUILT_IN, FAMILIES
from ._index import MODULE, PARAMETER

__all__ = [
    "KINDS",
    "SCALAR",
    "SCALES",
    "Column",
    "add_column",
    "column_of",
    "columns",
    "heading",
    "is_scalar_name",
    "own_columns",
    "snake_case",
    "told_columns",
]

SCALAR = "scalar"
KINDS = (PARAMETER, MODULE, SCALAR)
SCALES = ("log10", "linear", "share", "count")
COMBINES = ("norm", "max")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Column:
    """What there is to know of one column, or of one number per step.

    Attributes:
        name: on record and in expressions.
        kind: `"parameter"` or `"module"`: one number per path of that kind; `"scalar"`: one per step.
        meaning: one sentence.
        label: what a picture calls it; by default the name with spaces.
        short: the same at the head of a table; by default the label.
        unit: `"s"`, `"steps"`, ...; "" for a plain number.
        scale: how it is drawn: `"log10"` of its size, `"linear"`, `"share"` (linear from 0 to 1) or `"count"`.
        combine: what stands for several rows at once: `"norm"` (root of the sum of squares) or `"max"`.
        guide: a usual size, drawn as a line.
        signed: the sign matters, so that the largest of several says nothing.
        when: how often it is measured.
        absent: what makes it absent at a step at which it is due, or always.
        in_report: a report shows it.
    """

    name: str
    kind: str
    meaning: str
    label: str = ""
    short: str = ""
    unit: str = ""
    scale: str = "log10"
    combine: str = "max"
    guide: float | None = None
    signed: bool = False
    when: str = "every step"
    absent: str = ""
    in_report: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _WORD.fullmatch(self.name):
            raise ConfigError(f"a column's name is one word of letters, digits and underscores. Got {self.name!r}.")
        for setting, known in (("kind", KINDS), ("scale", SCALES), ("combine", COMBINES)):
            if getattr(self, setting) not in known:
                raise ConfigError(
                    f"`{setting}` of column {self.name!r} is one of {', '.join(known)}. Got {getattr(self, setting)!r}."
                )
        if not self.label:
            object.__setattr__(self, "label", self.name.replace("_", " "))
        if not self.short:
            object.__setattr__(self, "short", self.label)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Column | None:
        """Return what `to_json` was called on; None where the data are not that."""
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except (AttributeError, TypeError, ConfigError):
            return None


_BUILT_IN = {entry["name"]: Column(**entry) for entry in BUILT_IN}
_OWN: dict[str, Column] = {}


def snake_case(name: str) -> str:
    """Return "non_finite" for "NonFinite"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def columns(*kinds: str, own: bool = True) -> Iterator[Column]:
    """Yield the columns of these kinds (all where none is given), the built-in ones first, in the order of pictures.

    Args:
        kinds: `"parameter"`, `"module"`, `"scalar"`.
        own: the user's too.
    """
    for column in (*_BUILT_IN.values(), *(own_columns() if own else ())):
        if not kinds or column.kind in kinds:
            yield column


def heading(name: str) -> str:
    """Return what stands at the head of a table's column."""
    known = column_of(name)
    return name if known is None else known.short


def column_of(name: str) -> Column | None:
    """Return what is known of a column or scalar; None of one that nobody has told of."""
    return _BUILT_IN.get(name) or _OWN.get(name)


def own_columns() -> tuple[Column, ...]:
    """Return what was told of with `add_column`."""
    return tuple(_OWN.values())


def add_column(column: Column) -> None:
    """Tell of a column or scalar of one's own: it becomes a word of expressions, and pictures know how to draw it.

    Telling again replaces what was told.

    Raises:
        ConfigError: one of that name is built in.
    """
    if _BUILT_IN.get(column.name) == column:
        return  # told already: a statistic that comes with gradwatch
    if column.name in _BUILT_IN or (column.kind != SCALAR and is_scalar_name(column.name)):
        raise ConfigError(f"{column.name!r} is built in: a column of one's own needs a name of its own.")
    _OWN[column.name] = column


def is_scalar_name(name: str) -> bool:
    """Return whether a name stands for one number per step: one told of, or of a family such as `val_...`."""
    known = column_of(name)
    return known.kind == SCALAR if known is not None else name.startswith(tuple(FAMILIES))


def told_columns(meta: Mapping[str, Any]) -> dict[str, Column]:
    """Return what a run's meta says of columns that are not built in, by name."""
    options = meta.get("options")
    written = options.get("columns", ()) if isinstance(options, Mapping) else ()
    found = [Column.from_json(entry) for entry in written] if isinstance(written, (list, tuple)) else []
    return {column.name: column for column in found if column is not None}
