"""What a run's gradients would lose in other formats: read from the histograms on record, with advice in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._markup import Prints
from ..records import StepRecord
from ._exponents import lost, scale_exponents
from ._formats import FORMATS, Format, cast_loss, format_named

__all__ = ["FormatLoss", "PrecisionReport", "loss_table", "precision_report"]

_UNSCALED, _SCALED = ("bfloat16", "float16"), ("float8_e4m3", "float8_e5m2")
_FEW = 0.001
_LOSS_SCALES = range(25)
"""Exponents of the loss scales that are tried for float16."""


@dataclass(frozen=True)
class FormatLoss(Prints):
    """What all tensors together, and the worst of them, would lose in one format.

    Attributes:
        name: of the format; for float16 with a loss scale `"float16 x 2^16"`.
        share: of all entries that are not 0, the share that would become 0; nan where there are none.
        worst_share: of the tensor that would lose most.
        worst_path: its path; "" where no tensor loses anything.
        overflows: whether some entry would become infinite.
        error: relative error of all tensors together; nan where it was not measured.
    """

    name: str
    share: float
    worst_share: float
    worst_path: str
    overflows: bool = False
    error: float = float("nan")

    def __str__(self) -> str:
        error = "" if np.isnan(self.error) else f", relative error {self.error:.1e}"
        worst = f", of {self.worst_path} {_percent(self.worst_share)}" if self.worst_path else ""
        over = "; some entries would become infinite" if self.overflows else ""
        return f"{self.name:<16} {_percent(self.share):>7} become 0{worst}{error}{over}"


@dataclass(frozen=True)
class PrecisionReport(Prints):
    """What a run's gradients would lose if it switched formats.

    Attributes:
        num_steps: records with histograms that were read.
        losses: one for each format, in the order of `gradwatch.precision.FORMATS`.
        loss_scales: exponents of the smallest and the largest loss scale with which float16 keeps 99.9 % of the entries
            and none becomes infinite, at all of these steps; None where there is none.
    """

    num_steps: int
    losses: tuple[FormatLoss, ...]
    loss_scales: tuple[int, int] | None

    @property
    def advice(self) -> str:
        """What to do about float16, in a sentence."""
        if not self.num_steps:
            return "No histogram of gradients is on record: set `histograms_every`."
        if self.loss_scales is None:
            said = "float16: no single loss scale keeps 99.9 % of the gradients' entries; use bfloat16 or float32."
        else:
            low, high = self.loss_scales
            said = (
                f"float16: a loss scale of 2^{low} to 2^{high} loses less than 0.1 % and overflows nowhere; start at "
                f"2^{(low + high + 1) // 2}."
            )
        return said

    def __str__(self) -> str:
        head = f"Gradients in other formats, over {self.num_steps:,} steps with histograms:"
        return "\n".join([head, *(f"  {loss}" for loss in self.losses), self.advice])


def precision_report(records: Iterable[StepRecord]) -> PrecisionReport:
    """Return what the gradients of a run would lose in other formats: nothing is measured anew.

    float16 and bfloat16 as they are, float16 also with the best loss scale, 8 bits with one power of two per tensor and
    step. Formats with a scale per block can't be told from histograms: measure them by `GradientFormats`, or of tensors
    at hand by `loss_table`.

    Args:
        records: of one run, `watch.history` or `gradwatch.runs.read_run(...).records()`; those without histograms are
            passed over.
    """
    seen = _Seen()
    for record in records:
        if record.histograms:
            seen.add(record)
    losses = [seen.loss(name) for name in (*_UNSCALED, *_SCALED)]
    scales = seen.loss_scales()
    if scales is not None:
        losses.insert(2, seen.loss("float16", (sum(scales) + 1) // 2))
    return PrecisionReport(seen.num_steps, tuple(losses), scales)


def loss_table(tensors: Mapping[str, Tensor], formats: Iterable[str] = tuple(FORMATS)) -> tuple[FormatLoss, ...]:
    """Return what tensors at hand would lose in formats: gradients, weights, activations. Waits for the device.

    Args:
        tensors: by name; real, floating point, strided.
        formats: names, see `gradwatch.precision.FORMATS`.

    Raises:
        ConfigError: a format is unknown, or a tensor is of no floating point type.
    """
    rows = []
    for name in formats:
        to = format_named(name)
        found = {path: cast_loss(tensor, to) for path, tensor in tensors.items()}
        counts = np.array([[float(x.num_nonzero), float(x.num_underflows)] for x in found.values()]).reshape(-1, 2)
        error, square = (
            float(sum(getattr(x, n).cpu() for x in found.values())) for n in ("squared_error", "squared_sum")
        )
        over = any(bool(x.num_overflows) for x in found.values())
        rows.append(
            _summed(name, list(found), counts[:, 1], counts[:, 0], over, np.sqrt(error / square) if square else np.nan)
        )
    return tuple(rows)


def _summed(
    name: str, paths: list[str], num_lost: NDArray[np.float64], num: NDArray[np.float64], over: bool, error: float
) -> FormatLoss:
    shares = num_lost / np.maximum(num, 1)
    worst = int(shares.argmax()) if len(shares) else -1
    is_any = worst >= 0 and shares[worst] > 0
    total = float(num.sum())
    return FormatLoss(
        name,
        float(num_lost.sum()) / total if total else float("nan"),
        float(shares[worst]) if is_any else 0.0,
        paths[worst] if is_any else "",
        over,
        float(error),
    )


class _Seen:
    """Sums over the records of a run."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._paths: dict[str, int] = {}
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, record: StepRecord) -> None:
        self.num_steps += 1
        rows = [self._paths.setdefault(path, len(self._paths)) for path in record.histograms]
        counts = np.array([h.magnitude_counts for h in record.histograms.values()], np.float64)
        known = record.columns.get("grad_absmax")
        largest = [np.nan if known is None else known[record.index.position(path)] for path in record.histograms]
        self._steps.append((np.array(rows, np.int64), counts, np.array(largest, np.float64)))

    def loss(self, name: str, exponent: int = 0) -> FormatLoss:
        num, num_lost, over = self._lost(FORMATS[name], exponent)
        label = f"{name} x 2^{exponent}" if exponent else name
        return _summed(label, list(self._paths), num_lost, num, over, float("nan"))

    def _lost(self, to: Format, exponent: int) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
        num, num_lost, over = np.zeros(len(self._paths)), np.zeros(len(self._paths)), False
        for rows, counts, largest in self._steps:
            shares = lost(counts, to, scale_exponents(largest, to) if to.scaling else exponent)
            entries = counts[:, 1:255].sum(axis=1)
            np.add.at(num, rows, entries)
            np.add.at(num_lost, rows, np.where(entries > 0, shares[:, 0], 0) * entries)
            over |= bool((shares[:, 1] > 0).any()) and not to.scaling
        return num, num_lost, over

    def loss_scales(self) -> tuple[int, int] | None:
        fit = []
        for exponent in _LOSS_SCALES if self._steps else ():
            num, num_lost, over = self._lost(FORMATS["float16"], exponent)
            if not over and num.sum() and num_lost.sum() / num.sum() < _FEW:
                fit.append(exponent)
        return (fit[0], fit[-1]) if fit else None


def _percent(share: float) -> str:
    if np.isnan(share):
        return "-"
    return "0 %" if share == 0 else f"{100 * share:.2g} %" if share >= 1e-4 else "< 0.01 %"
