"""What is passed between the floors: plain, frozen, on the host. Needs numpy alone.

A `StepRecord` holds all that was measured at one optimizer step, as columns: one float per path of its `Index`.
Two things are kept apart in a column: a value that *is* nan, and a path that was not measured (its mask is False).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UnknownPathError

__all__ = [
    "MODULE",
    "NUM_BINS",
    "PARAMETER",
    "SCHEMA_VERSION",
    "SEVERITIES",
    "Finding",
    "Histogram",
    "Incident",
    "Index",
    "StepRecord",
    "TreatmentReport",
    "iter_scalars",
    "select_paths",
]

SCHEMA_VERSION = 1
"""Version of the run folder and of the packed tensors; readers refuse a higher one."""

PARAMETER = "parameter"
MODULE = "module"
SEVERITIES = ("info", "warning", "critical")
NUM_BINS = 512
"""Bins of an exponent histogram: 256 exponents, then 256 more for the negative values."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def select_paths(paths: Sequence[str], patterns: str | Sequence[str]) -> Bools:
    """Return which paths match any of the glob patterns (`*` crosses dots). `"*"` matches every path."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if "*" in patterns:
        return np.ones(len(paths), dtype=np.bool_)
    return np.fromiter((any(fnmatchcase(p, pattern) for pattern in patterns) for p in paths), np.bool_, len(paths))


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """The paths that a record's columns run over: parameters first, then modules, each in forward order where known.

    Attributes:
        paths: unique dotted names, as in `named_parameters()` and `named_modules()`.
        kinds: `"parameter"` or `"module"`, one per path.
        numel: elements of the parameter (whole tensor, when sharded); 0 for modules.
        shapes: of the parameter (whole tensor); () for modules.
        depth: place in forward order, from 0; a module and its own parameters are neighbours.
        types: class name of the module, or of the module that owns the parameter.
        in_optimizer: held by an optimizer (only those are measured for the step).
        trainable: `requires_grad`.
    """

    paths: tuple[str, ...]
    kinds: tuple[str, ...]
    numel: NDArray[np.int64]
    shapes: tuple[tuple[int, ...], ...]
    depth: NDArray[np.int64]
    types: tuple[str, ...] = ()
    in_optimizer: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    trainable: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))

    def __post_init__(self) -> None:
        n = len(self.paths)
        defaults = {
            "types": ("",) * n,
            "in_optimizer": self.is_parameter,
            "trainable": self.is_parameter,
        }
        for name, default in defaults.items():
            if len(getattr(self, name)) != n:
                object.__setattr__(self, name, default)
        for name in ("kinds", "numel", "shapes", "depth"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"Index has {n} paths, but {len(getattr(self, name))} `{name}`.")

    @classmethod
    def of_parameters(cls, paths: Sequence[str], numel: Sequence[int] | None = None) -> Index:
        """Return an index of parameters alone, in forward order: for tests, replay and logs of other programs."""
        sizes = np.asarray(numel if numel is not None else [1] * len(paths), np.int64)
        return cls(
            paths=tuple(paths),
            kinds=(PARAMETER,) * len(paths),
            numel=sizes,
            # Two dimensions, since rules leave biases (one dimension) out.
            shapes=tuple((int(n), 1) for n in sizes),
            depth=np.arange(len(paths), dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Path -> place in the columns."""
        return {p: i for i, p in enumerate(self.paths)}

    @cached_property
    def is_parameter(self) -> Bools:
        return np.fromiter((k == PARAMETER for k in self.kinds), np.bool_, len(self.kinds))

    @cached_property
    def is_module(self) -> Bools:
        return ~self.is_parameter

    @cached_property
    def ndim(self) -> NDArray[np.int64]:
        """Dimensions of each parameter; 0 for modules."""
        return np.fromiter((len(s) for s in self.shapes), np.int64, len(self.shapes))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Block of each path: up to and including its first number ("h.3.attn.c" -> "h.3"), else its first name."""
        return tuple(_block(p) for p in self.paths)

    def position(self, path: str) -> int:
        """Return the place of a path in the columns.

        Raises:
            UnknownPathError: the index has no such path.
        """
        try:
            return self.positions[path]
        except KeyError:
            raise UnknownPathError(path, self.paths, model_name="the record's index") from None

    def select(self, patterns: str | Sequence[str]) -> Bools:
        """Return which paths match any of the glob patterns; `*` crosses dots."""
        key = patterns if isinstance(patterns, str) else tuple(patterns)
        if key not in self._selections:
            self._selections[key] = select_paths(self.paths, patterns)
        return self._selections[key]

    @cached_property
    def _selections(self) -> dict[str | tuple[str, ...], Bools]:
        return {}

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, for files."""
        return {
            "paths": list(self.paths),
            "kinds": list(self.kinds),
            "numel": self.numel.tolist(),
            "shapes": [list(s) for s in self.shapes],
            "depth": self.depth.tolist(),
            "types": list(self.types),
            "in_optimizer": self.in_optimizer.tolist(),
            "trainable": self.trainable.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Index:
        return cls(
            paths=tuple(data["paths"]),
            kinds=tuple(data["kinds"]),
            numel=np.asarray(data["numel"], np.int64),
            shapes=tuple(tuple(s) for s in data["shapes"]),
            depth=np.asarray(data["depth"], np.int64),
            types=tuple(data["types"]),
            in_optimizer=np.asarray(data["in_optimizer"], np.bool_),
            trainable=np.asarray(data["trainable"], np.bool_),
        )


def _block(path: str) -> str:
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values by their binary exponent: the same bins for every layer, step and rank, so that sums merge.

    Bin `k` of the first 256 counts positive values of magnitude in `[2**(k-127), 2**(k-126))`; bin 0 zeros and
    denormals, bin 255 inf and nan. The second 256 bins count negative values in the same way.

    Args:
        counts: int64, shape (512,).
    """

    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.counts.shape != (NUM_BINS,):
            raise ValueError(f"a Histogram has {NUM_BINS} counts. Got shape {self.counts.shape}.")

    @cached_property
    def magnitude_counts(self) -> NDArray[np.int64]:
        """Counts by exponent without regard to sign, shape (256,)."""
        return self.counts[:256] + self.counts[256:]

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """Zeros and float32 denormals."""
        return int(self.magnitude_counts[0])

    @property
    def nonfinite(self) -> int:
        return int(self.magnitude_counts[255])

    def log10_buckets(self, max_buckets: int = 40) -> tuple[Floats, NDArray[np.int64]]:
        """Return edges (n+1,) in log10 of the magnitude and counts (n,), finite non-zero values alone.

        Neighbouring exponents are merged until at most `max_buckets` remain; the outer edges are those of the
        outermost filled bins. Both arrays are empty where every value is zero or non-finite.
        """
        finite = self.magnitude_counts[1:255]
        filled = np.flatnonzero(finite)
        if not len(filled):
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = int(filled[0]), int(filled[-1]) + 1
        width = -(-(high - low) // max_buckets)
        high = low + width * -(-(high - low) // width)
        padded = np.zeros(high - low, np.int64)
        part = finite[low : min(high, len(finite))]
        padded[: len(part)] = part
        counts = padded.reshape(-1, width).sum(axis=1)
        edges = (np.arange(low, high + 1, width) + 1 - 127) * np.log10(2.0)
        return edges, counts

    def merge(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreatmentReport:
    """What one treatment did to one step.

    Attributes:
        name: of the treatment, in snake case.
        rule: the rule it ran behind, or "" where it runs on every step.
        before: global norm before it, unscaled.
        after: global norm after it; nan where the step was vetoed.
        applied: it changed something (a clip that clipped, a skip that skipped).
        values: anything else it has to say, by name (`coefficient`, `limit`, `clipped_share`, ...).
    """

    name: str
    rule: str = ""
    before: float = float("nan")
    after: float = float("nan")
    applied: bool = True
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepRecord:
    """All that was measured at one optimizer step.

    Norms are L2, of gradients as the optimizer will use them: unscaled, accumulated, reduced over ranks, whole.
    A number may be inf or nan: that is a measurement, not an error.

    Attributes:
        step: optimizer steps taken before this one.
        epoch, batch_idx: as the trainer counts; -1 where it does not.
        num_samples: in this step's batches, all accumulated micro-batches together; 0 where unknown.
        time: seconds since the epoch, when the record was made.
        loss: mean over the accumulated micro-batches; nan where not given (then `has_loss` is False).
        lr: largest learning rate over the optimizers' groups.
        global_norm: before any treatment; over the parameters in the optimizer that have a gradient.
        global_norm_after: after all of gradwatch's treatments; equal to `global_norm` where there were none.
        index: what the columns run over.
        columns: name -> float64, shape (len(index),). A column that was not measured at this step is absent.
        masks: name -> bool, shape (len(index),): which paths the column holds a measurement for. Absent: all.
        scalars: what was measured once: `val_loss`, `grad_scale`, `num_overflows`, `output_variance`, ...
        histograms: parameter path -> exponent histogram of its gradient.
        treatments: what was done, in order.
        skipped: the optimizer was kept from moving anything at this step.
    """

    step: int
    index: Index
    epoch: int = -1
    batch_idx: int = -1
    num_samples: int = 0
    time: float = 0.0
    loss: float = float("nan")
    has_loss: bool = True
    lr: float = float("nan")
    global_norm: float = float("nan")
    global_norm_after: float = float("nan")
    columns: Mapping[str, Floats] = field(default_factory=dict)
    masks: Mapping[str, Bools] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    treatments: tuple[TreatmentReport, ...] = ()
    skipped: bool = False

    def __getitem__(self, key: tuple[str, str]) -> float:
        """Return one number: `record["grad_norm", "encoder.0.weight"]`.

        Raises:
            KeyError: the column was not measured at this step, or not for this path.
        """
        name, path = key
        column = self.columns.get(name)
        if column is None:
            raise KeyError(f"step {self.step} has no column {name!r}. It has {sorted(self.columns)}.")
        i = self.index.position(path)
        if not self.measured(name)[i]:
            raise KeyError(f"step {self.step} has no {name!r} for {path!r}: it was not measured (no gradient).")
        return float(column[i])

    def measured(self, name: str) -> Bools:
        """Return which paths the column holds a measurement for; none where the column is absent."""
        if name not in self.columns:
            return np.zeros(len(self.index), np.bool_)
        mask = self.masks.get(name)
        return np.ones(len(self.index), np.bool_) if mask is None else mask

    def rollup(self, by: str = "block", column: str = "grad_norm") -> dict[str, float]:
        """Return norms over modules, blocks or the model, from sums of squares (never from means of norms).

        Args:
            by: `"module"` (the module that owns the parameter), `"block"` or `"model"` (one key, "").
            column: a column of norms over parameters.
        """
        values, chosen = self.columns.get(column), self.measured(column) & self.index.is_parameter
        if values is None:
            return {}
        keys: dict[str, Sequence[str]] = {
            "module": [p.rpartition(".")[0] for p in self.index.paths],
            "block": self.index.blocks,
            "model": [""] * len(self.index),
        }
        groups: dict[str, list[float]] = {}
        for i in np.flatnonzero(chosen).tolist():
            groups.setdefault(keys[by][i], []).append(float(values[i]))
        # hypot by scaling: squares of values below 1e-162 or above 1e154 leave float64.
        return {k: _norm(np.asarray(v)) for k, v in groups.items()}


def _norm(values: Floats) -> float:
    largest = float(np.max(np.abs(values)))
    if not 0 < largest < np.inf:
        return largest
    return largest * float(np.sqrt(np.sum((values / largest) ** 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a rule reports at one step for one path (`""`: the whole model). Prints as the sentence a user reads."""

    rule: str
    step: int
    path: str = ""
    value: float = float("nan")
    limit: float = float("nan")
    severity: str = "warning"
    name: str = ""
    message: str = ""

    def __str__(self) -> str:
        where = self.path or "whole model"
        what = self.message or f"{self.value:.3g}, limit {self.limit:.3g}"
        return f"step {self.step}, {where}: {self.name or self.rule} ({what})"


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Findings of one rule grouped over paths and steps, with a beginning and an end.

    Attributes:
        rule: class name of the rule in snake case (`exploding`, `non_finite`).
        name: given in the rules file, else the rule's.
        severity: info, warning or critical.
        paths: every path that fired, in the order of the rule (forward for activations, backward for gradients).
        first_path: where it began, where that means something; "" for the whole model.
        first_step, last_step: of the findings.
        value, limit: at the worst finding.
        treatments: names of the treatments and actions that ran for it.
        advice: what usually causes it and what to try, in order.
        message: one sentence that says what was seen.
        resolved: it is over; `resolved_step` says since when.
        count: steps at which it fired.
        labels: the rule's own labels.
        details: anything else (autopsy, files written beside it), plain values.
    """

    rule: str
    first_step: int
    last_step: int
    name: str = ""
    severity: str = "warning"
    paths: tuple[str, ...] = ()
    first_path: str = ""
    value: float = float("nan")
    limit: float = float("nan")
    treatments: tuple[str, ...] = ()
    advice: str = ""
    message: str = ""
    resolved: bool = False
    resolved_step: int | None = None
    count: int = 1
    id: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        where = (self.first_path or "whole model") + more
        what = self.message or f"{self.value:.3g}, limit {self.limit:.3g}"
        done = f" -> {', '.join(self.treatments)}" if self.treatments else ""
        return f"[{self.severity}] step {self.first_step}: {self.name or self.rule} in {where} ({what}){done}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; non-finite floats as the strings "nan", "inf" and "-inf", so that JSON stays JSON."""
        return {f: _plain(getattr(self, f)) for f in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Incident:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        for name in ("paths", "treatments"):
            known[name] = tuple(known.get(name, ()))
        for name in ("value", "limit"):
            known[name] = float(known.get(name, "nan"))
        return cls(**known)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else str(float(value))
    if isinstance(value, np.integer):
        return int(value)
    return value


def iter_scalars(record: StepRecord) -> Iterator[tuple[str, float]]:
    """Yield every scalar of a record with its name: loss, lr, the global norms, then `scalars`."""
    if record.has_loss:
        yield "loss", record.loss
    yield "lr", record.lr
    yield "global_norm", record.global_norm
    yield "global_norm_after", record.global_norm_after
    yield from record.scalars.items()
