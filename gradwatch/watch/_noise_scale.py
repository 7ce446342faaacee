"""The gradient noise scale: how large a batch is worth its price, from gradients of samples at a step now and then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..records import StepRecord
from ..stats import At, Number, Ranks
from ..torchside import sent
from ._carriers import taken_apart
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._options import MeasureOptions
from ._replays import Replay
from ._step_inputs import StepInputs

__all__ = ["NoiseScale", "Sums", "noise_line", "noise_sums"]

EVERY = 50
"""Optimizer steps between two measurements, and the powers of two before the first."""
WINDOW = 16
"""Measurements that an estimate is made of: one alone says little."""
MIN_COVERAGE = 0.9


class Sums(NamedTuple):
    """What samples' gradients add up to; sums of several micro-batches and ranks add up, too.

    Attributes:
        squares: squared norms of the samples' gradients, as parts of the whole one.
        square: squared norm of the whole one.
        size: samples.
    """

    squares: float
    square: float
    size: float


def noise_sums(
    model: nn.Module, replays: Sequence[Replay], params: Sequence[Tensor], inputs: StepInputs | None
) -> Sums:
    """Return the sums over this rank's micro-batches.

    Raises:
        ValueError: not every sample's norm could be told.
    """
    parts = [part for _, part in taken_apart(model, replays, params, inputs)]
    if any(part.method == "halving" or part.coverage < MIN_COVERAGE for part in parts):
        raise ValueError("not every sample's gradient could be told from the others'")
    squares = sum(float(np.square(part.norm).sum()) for part in parts)
    return Sums(squares, sum(float(part.projection.sum()) for part in parts), sum(len(part) for part in parts))


class _Share(NamedTuple):
    """What one measurement adds: the noise in the squared norm of a batch's gradient, that squared norm summed over the
    steps since the last one, and their number."""

    noise: float
    squares: float
    steps: int


class NoiseScale(Measurement):
    """Estimates the simple noise scale tr(S) / |G|^2 of a training, S being the covariance of the samples' gradients
    and G their mean, with its standard error.

    McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162, equation 2.9 and appendix
    A.1: both parts are unbiased estimates from gradients of a small and of a large batch, and are averaged apart. Here
    the small batch is one sample: norms of all samples' gradients are known, which tells more than those of ranks, of
    micro-batches or of halves. The large batches are those of all steps: their norms are on record. Where samples of a
    batch act on each other (batch normalisation), it is of the parts that they add to the gradient.

    Attributes:
        history: gives the records of earlier steps, oldest first, whose batches are as large.
    """

    part = "the gradient noise scale"
    unseen = "the gradient noise scale is not seen: {}"
    gives = ("noise_trace", "noise_squared_norm", "noise_batch_size", "noise_scale", "noise_scale_error")
    every = EVERY
    of_gradients = False
    reruns = is_light = True

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self.history: Callable[[], Iterable[StepRecord]] = tuple
        self._own: Sums | None = None
        self._found: deque[_Share] = deque(maxlen=WINDOW)
        self._heard = -1
        self._count = 0
        self._told: tuple[float, dict[str, float]] = (0.0, {})

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.noise_scale

    def begin(self, step: int) -> None:
        self._own = None

    def rerun(self, replays: Sequence[Replay], inputs: StepInputs) -> None:
        self._own = noise_sums(self.meter.model, replays, self.meter.watched.held, inputs)

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        return {"sums": (4,)} if ranks.num > 1 else {}

    def look(self, view: StepView, tables: dict[str, Tensor]) -> Mapping[str, Number]:
        own, self._own = self._own, None
        told = np.array([*(own or (0.0, 0.0, 0.0)), float(own is not None)])
        if tables:
            into = tables["sums"]
            tables["sums"] = sent(torch.from_numpy(told).to(into.dtype), into.device)
        self._count += 1
        past = np.array(self._squares(self.history()))
        return {"own": told, "squares": past, "count": float(self._count), "ranks": float(view.ranks.num)}

    def at_once(self, step: int) -> Mapping[str, float]:
        own, self._own = self._own, None
        return {} if own is None else self._take(own, self._squares(self.history()))

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        if "count" not in found:
            return {}
        if found["count"] != self._told[0]:
            # A record may be made twice, and counts once.
            *sums, known = (found["sums"] if "sums" in found else found["own"]).tolist()
            is_known = known == found["ranks"]
            self._told = found["count"], self._take(Sums(*sums), found["squares"].tolist()) if is_known else {}
        return self._told[1]

    def _take(self, sums: Sums, past: Sequence[float]) -> dict[str, float]:
        """Return numbers for the record, of sums over all ranks and the squared norms of the steps before."""
        if sums.size < 2 or not np.isfinite(sums.squares + sums.square):
            return {}
        size = sums.size
        # Per sample: a part of the whole gradient is one n-th of the sample's own.
        trace = (size * sums.squares - sums.square) * size / (size - 1)
        squares = [sums.square, *past]
        self._found.append(_Share(trace / size, float(np.sum(squares)), len(squares)))
        return {
            "noise_trace": trace,
            "noise_squared_norm": sums.square - trace / size,
            "noise_batch_size": size,
            **self._estimate(size),
        }

    def _squares(self, history: Iterable[StepRecord]) -> list[float]:
        """Return the squared norms of the steps that were not asked for before."""
        found = []
        for record in history:
            if record.step > self._heard:
                self._heard = record.step
                found.append(record.global_norm**2)
        return [square for square in found if np.isfinite(square)]

    def _estimate(self, size: float) -> dict[str, float]:
        """Return the ratio of the means, and its standard error by the jackknife."""
        found = np.asarray(self._found)
        whole = size * _ratio(found)
        if len(found) < 2 or not np.isfinite(whole):
            return {"noise_scale": whole, "noise_scale_error": float("nan")}
        without = np.array([size * _ratio(np.delete(found, i, 0)) for i in range(len(found))])
        spread = np.square(without - whole).sum()
        return {"noise_scale": whole, "noise_scale_error": float(np.sqrt((len(found) - 1) / len(found) * spread))}


def _ratio(found: NDArray[np.float64]) -> float:
    """Return noise over signal at this batch size; infinite where no signal is left."""
    noises, squares, steps = found.T
    # Each stands for the steps that it sums up: noise and signal of the same part of the training.
    noise = float(np.average(noises, weights=steps))
    signal = float(squares.sum() / steps.sum()) - noise
    return noise / signal if signal > 0 else float("inf")


def noise_line(history: Sequence[StepRecord]) -> list[str]:
    """Return what the last estimate says of the batch size, as a line; nothing where there is none."""
    last: Mapping[str, float] = next((r.scalars for r in reversed(history) if "noise_scale_error" in r.scalars), {})
    scale, size = last.get("noise_scale", np.nan), last.get("noise_batch_size", np.nan)
    if np.isnan(scale) or not size:
        return []
    if np.isinf(scale):
        return [f"critical batch: far above yours ({size:.0f} samples); the gradient is lost in its noise"]
    error = last["noise_scale_error"]
    spread = f" ± {error:.2g}" if np.isfinite(error) else ""
    ratio = scale / size
    times = f"about {ratio:.2g}x yours" if ratio >= 1 else f"about 1/{1 / ratio:.2g} of yours"
    return [f"critical batch {times}: gradient noise scale {scale:.3g}{spread} samples, batch {size:.0f}"]
