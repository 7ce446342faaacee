"""What attention does while a model trains: the largest logit and the entropy of each head."""

from __future__ import annotations

from ._statistics import AttentionScores

__all__ = ["AttentionScores"]
