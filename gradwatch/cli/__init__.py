"""The command line: `gradwatch demo | summary | report | watch | replay | test | check | compare | doctor`.

Data goes to stdout, talk to stderr. Each command's imports happen when it runs: `gradwatch summary` needs no torch.
"""

from __future__ import annotations

from ._main import main
from ._outcome import FINE, FOUND, UNSEEN, USAGE

__all__ = ["FINE", "FOUND", "UNSEEN", "USAGE", "main"]
