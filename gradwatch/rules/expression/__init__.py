"""Rules as one line of text: `grad_norm > 5 * median(grad_norm, 200)`. Parsed to allowed nodes alone; no eval."""

from __future__ import annotations

from ._parse import parse
from ._rule import Expression
from ._vocabulary import COLUMNS, FUNCTIONS, SCALARS, is_column, is_scalar, known_names

__all__ = ["COLUMNS", "FUNCTIONS", "SCALARS", "Expression", "is_column", "is_scalar", "known_names", "parse"]
