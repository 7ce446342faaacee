"""What a notebook shows of a run, and a cell that shows it while it trains.

HTML, SVG and PNG in the text of a cell: no script, no file, no package. Only a live cell needs IPython.
"""

from __future__ import annotations

from ._card import RunCard
from ._curves import lies_on
from ._live import LiveCell, in_notebook
from ._series import Series

__all__ = ["LiveCell", "RunCard", "Series", "in_notebook", "lies_on"]
