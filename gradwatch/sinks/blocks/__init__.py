"""Blocks: many records of one index, packed column by column. What the run folder's files consist of.

The format is described in `docs/formats.md`. Encoding and decoding are exact: a record comes back bit by bit,
except for the payload bits of a nan.
"""

from __future__ import annotations

from ._block import FOLDER_SCHEMA, Block, journal_files, segment_files
from ._check import is_sound
from ._decode import bare, column, histograms, measured, records, scalar, thin
from ._encode import encode, superseded
from ._scan import Damage, scan

__all__ = [
    "FOLDER_SCHEMA",
    "Block",
    "Damage",
    "bare",
    "column",
    "encode",
    "histograms",
    "is_sound",
    "journal_files",
    "measured",
    "records",
    "scalar",
    "scan",
    "segment_files",
    "superseded",
    "thin",
]
