"""Units of a module's output, a fixed sample of them, as rows of samples."""

from __future__ import annotations

from torch import Tensor

from ..torchside import wide_dtype

__all__ = ["rows_of_units"]


def rows_of_units(outputs: tuple[Tensor, ...], most: int, *, samples: int | None = None) -> Tensor | None:
    """Return the first of a module's outputs that has units, as (samples, units), wide; None where there is none.

    A unit is an entry of dimension 1 where there are more than three dimensions, else of the last one; a sample is an
    element of the batch at one place.

    Args:
        outputs: of one call.
        most: units that are kept, spread over all.
        samples: rows that are kept, spread over all; None: all.
    """
    found = next((t for t in outputs if t.dim() > 1 and t.shape[1 if t.dim() > 3 else -1]), None)
    if found is None:
        return None
    units = found.movedim(1, -1) if found.dim() > 3 else found
    step = -(-units.shape[-1] // most)
    rows = units[..., ::step].reshape(-1, len(range(0, units.shape[-1], step)))
    if samples is not None and len(rows) > samples:
        rows = rows[:: -(-len(rows) // samples)]
    return rows.to(wide_dtype(rows.device))
