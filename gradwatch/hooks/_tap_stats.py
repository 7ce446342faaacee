"""What a tap gathers: sums and maxima per module that merge over calls, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..stats import extent, host_extent, host_moments, moments
from ..torchside import home, is_host, moved, sent, wide_dtype

__all__ = ["MAXIMA", "SUMS", "Ledger", "Memo", "TapStats", "measured_extent", "measured_moments"]

SUMS = (
    "output_sum",
    "output_sumsq",
    "output_zeros",
    "output_nonfinite",
    "grad_sumsq",
    "grad_nonfinite",
    "input_nonfinite",
    "saturated",
    "silent",
    # How many elements the above were taken over: known on the host, and summed over ranks with the rest.
    "output_numel",
    "grad_numel",
    "input_numel",
    "saturated_numel",
    "units",
)
"""Columns of `TapStats.sums`, merged by addition."""
MAXIMA = ("output_absmax", "grad_absmax")
"""Columns of `TapStats.maxima`, merged by maximum."""
_S = {name: i for i, name in enumerate(SUMS)}
_OUTPUT_NUMEL, _GRAD_NUMEL = _S["output_numel"], _S["grad_numel"]
_INPUT_NUMEL, _INPUT_NONFINITE = _S["input_numel"], _S["input_nonfinite"]

Found = Tensor | tuple[float, ...]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TapStats:
    """Statistics of n modules, on the device; read `sums` and `maxima` back together with whatever else is read.

    Attributes:
        paths: of the modules.
        sums: float64, shape (n, len(SUMS)); ranks merge by addition.
        maxima: float64, shape (n, len(MAXIMA)); ranks merge by maximum.
        known: sums and maxima that only the host knows, and that are not in these; None where all are.
    """

    paths: tuple[str, ...]
    sums: Tensor
    maxima: Tensor
    known: tuple[Floats, Floats] | None = None

    @classmethod
    def blank(cls, paths: Sequence[str], device: torch.device) -> TapStats:
        """Return statistics of nothing seen, which add nothing to those of other ranks."""
        wide = wide_dtype(device)
        sums = torch.zeros(len(paths), len(SUMS), dtype=wide, device=device)
        return cls(tuple(paths), sums, torch.zeros(len(paths), len(MAXIMA), dtype=wide, device=device))

    def to_columns(
        self, sums: Floats, maxima: Floats, *, grad_scale: float = 1.0
    ) -> tuple[dict[str, Floats], dict[str, Bools]]:
        """Return columns over `paths`, and which of their entries hold a measurement.

        Args:
            sums: the host's copy of `sums`, perhaps merged over ranks.
            maxima: the host's copy of `maxima`.
            grad_scale: what gradients are still multiplied by.

        Returns:
            name -> float64 (n,), name -> bool (n,). An entry that was not measured is nan and its mask False; a
            column in which no entry was measured is left out.
        """
        if self.known is not None:
            sums, maxima = sums + self.known[0], np.maximum(maxima, self.known[1])
        s = {name: sums[:, i].astype(np.float64) for name, i in _S.items()}
        outputs, grads = s["output_numel"], s["grad_numel"]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            mean = s["output_sum"] / outputs
            square = s["output_sumsq"] / outputs
            # Of equal elements the difference is rounding, and may be negative; nan stays nan.
            variance = np.where(square - mean**2 < 1e-12 * square, 0.0, square - mean**2)
            found: dict[str, tuple[Floats, Bools]] = {
                "output_rms": (np.sqrt(square), outputs > 0),
                "output_mean": (mean, outputs > 0),
                "output_std": (np.sqrt(variance), outputs > 0),
                "output_absmax": (maxima[:, 0].astype(np.float64), outputs > 0),
                "output_zero_fraction": (s["output_zeros"] / outputs, outputs > 0),
                "output_nonfinite": (s["output_nonfinite"], outputs > 0),
                "input_nonfinite": (s["input_nonfinite"], s["input_numel"] > 0),
                "saturated_fraction": (s["saturated"] / s["saturated_numel"], s["saturated_numel"] > 0),
                "silent_fraction": (s["silent"] / s["units"], s["units"] > 0),
                "grad_output_norm": (np.sqrt(s["grad_sumsq"]) / grad_scale, grads > 0),
                "grad_output_absmax": (maxima[:, 1] / grad_scale, grads > 0),
                "grad_output_nonfinite": (s["grad_nonfinite"], grads > 0),
            }
        kept = {name: pair for name, pair in found.items() if pair[1].any()}
        columns = {name: np.where(mask, values, np.nan) for name, (values, mask) in kept.items()}
        return columns, {name: mask for name, (_, mask) in kept.items()}


class Memo:
    """What was measured of tensors that are still there, unchanged: a container returns what its last child did, and
    most inputs are outputs. Holds weak references only."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[ref[Tensor], int, Any]] = {}

    def find(self, tensor: Tensor) -> Any:
        """Return what was kept for this very tensor, or None."""
        kept = self._seen.get(id(tensor))
        if kept is None or kept[0]() is not tensor or kept[1] != (-1 if tensor.is_inference() else tensor._version):
            return None
        return kept[2]

    def keep(self, tensor: Tensor, value: Any) -> None:
        self._seen[id(tensor)] = (ref(tensor), -1 if tensor.is_inference() else tensor._version, value)

    def clear(self) -> None:
        self._seen.clear()


def measured_moments(tensor: Tensor) -> Found:
    """Return moments of a tensor of any kind: plain numbers on the CPU, a tensor elsewhere."""
    return host_moments(tensor) if is_host(tensor.device) else moments(tensor)


def measured_extent(tensor: Tensor) -> Found:
    """Return the extent of a tensor of any kind: plain numbers on the CPU, a tensor elsewhere."""
    return host_extent(tensor) if is_host(tensor.device) else extent(tensor)


class Ledger:
    """Adds up statistics by row: on the host for CPU tensors, else on the tensors' own device, unread."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.clear()

    def clear(self) -> None:
        # Lists: adding a number to an array costs as much as measuring a small tensor.
        self._host = [[0.0] * len(SUMS) for _ in range(self._rows)]
        self._host_max = [[0.0] * len(MAXIMA) for _ in range(self._rows)]
        self._device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.empty = True

    def add_output(self, row: int, numel: int, found: Found) -> None:
        """Add moments of a tensor among a module's outputs."""
        self.empty = False
        host = self._host[row]
        host[_OUTPUT_NUMEL] += numel
        if isinstance(found, Tensor):
            sums, maxima = self._on(found.device)
            sums[row, :4] += found[:4]
            maxima[row, 0] = torch.maximum(maxima[row, 0], found[4])
            return
        host[0] += found[0]
        host[1] += found[1]
        host[2] += found[2]
        host[3] += found[3]
        self._host_max[row][0] = max(self._host_max[row][0], found[4])

    def add_grad(self, row: int, numel: int, found: Found) -> None:
        """Add the extent of the gradient w.r.t. an output of a module."""
        self.empty = False
        host = self._host[row]
        host[_GRAD_NUMEL] += numel
        if isinstance(found, Tensor):
            sums, maxima = self._on(found.device)
            sums[row, 4:6] += found[:2]
            maxima[row, 1] = torch.maximum(maxima[row, 1], found[2])
            return
        host[4] += found[0]
        host[5] += found[1]
        self._host_max[row][1] = max(self._host_max[row][1], found[2])

    def add_input(self, row: int, numel: int, nonfinite: Tensor | float) -> None:
        """Add the number of non-finite elements of a tensor among a module's inputs."""
        if isinstance(nonfinite, Tensor):
            self.add(row, "input_nonfinite", nonfinite)
        else:
            self._host[row][_INPUT_NONFINITE] += nonfinite
        self._host[row][_INPUT_NUMEL] += numel
        self.empty = False

    def add(self, row: int, name: str, value: Tensor | float) -> None:
        """Add a number, or a 0-dim tensor, to one sum."""
        self.empty = False
        if isinstance(value, Tensor) and not is_host(value.device):
            self._on(value.device)[0][row, _S[name]] += value
        else:
            self._host[row][_S[name]] += float(value)

    def take(self, paths: Sequence[str], *, apart: bool = False) -> TapStats:
        """Return everything added so far on one device, and begin again; `apart`: what the host knows stays there."""
        here = home(sums for sums, _ in self._device.values())
        wide = wide_dtype(here)
        if apart and len(self._device) == 1:
            ((sums, maxima),) = self._device.values()
            known = np.asarray(self._host).reshape(-1, len(SUMS)), np.asarray(self._host_max).reshape(-1, len(MAXIMA))
            self.clear()
            return TapStats(tuple(paths), sums, maxima, known)
        sums = sent(torch.tensor(self._host, dtype=wide).reshape(-1, len(SUMS)), here)
        maxima = sent(torch.tensor(self._host_max, dtype=wide).reshape(-1, len(MAXIMA)), here)
        for more_sums, more_maxima in self._device.values():
            sums += moved(more_sums, here, wide)
            maxima = torch.maximum(maxima, moved(more_maxima, here, wide))
        self.clear()
        return TapStats(tuple(paths), sums, maxima)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._device:
            wide = wide_dtype(device)
            self._device[device] = (
                torch.zeros(self._rows, len(SUMS), dtype=wide, device=device),
                torch.zeros(self._rows, len(MAXIMA), dtype=wide, device=device),
            )
        return self._device[device]
