"""What the Hugging Face Trainer's evaluations found, under the names that rules know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..watch import Guard, validation_scalars

__all__ = ["Evaluated"]

_TRAINERS = ("runtime", "per_second", "epoch", "num_input_tokens_seen", "total_flos", "compilation_time")
"""What the Trainer adds to the metrics of an evaluation."""


class Evaluated:
    """Names metrics `val_loss`, `val_<metric>`; of several data sets the first has these names too, as a lone one has,
    and each has `val_<data set>_loss`."""

    def __init__(self) -> None:
        self._first: str | None = None

    def scalars(self, metrics: Mapping[str, Any] | None, guard: Guard) -> dict[str, float]:
        """Return the numbers of one evaluation for the record of the next step."""
        if not metrics:
            return {}
        # The Trainer's own figures bear the prefix that all of this evaluation do: "eval", or "eval_<data set>".
        prefix = next((k.removesuffix("_runtime") for k in metrics if k.endswith("_runtime")), "eval")
        words = {k: k.removeprefix(f"{prefix}_") for k in metrics}
        own = {w: metrics[k] for k, w in words.items() if not any(part in w for part in _TRAINERS)}
        data_set = prefix.removeprefix("eval").strip("_")
        self._first = data_set if self._first is None else self._first
        found = validation_scalars(own, guard, known=own) if data_set == self._first else {}
        named = {f"{data_set}_{w}": value for w, value in own.items()} if data_set else {}
        return found | validation_scalars(named, guard, known=named)
