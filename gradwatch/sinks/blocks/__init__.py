"""Blocks: many records of one index, packed column by column. What the run folder's files consist of.

The format is described in `docs/formats.md`. Encoding and decoding are exact: a record comes back bit by bit,
except for the payload bits of a nan.
"""

from __future__ import annotations

from ._block import Block, scan, segment_files
from ._decode import column, histograms, measured, records, scalar, thin
from ._encode import encode

__all__ = ["Block", "column", "encode", "histograms", "measured", "records", "scalar", "scan", "segment_files", "thin"]
