"""Whether ranks hold the same weights and the same gradients, to the last bit, and which of them is the odd one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import PARAMETER
from ..stats import At, Ranks, is_due
from ..torchside import Aside, StandIn, checksum, moved, wide_dtype, world_size
from ._contributions import BROUGHT, HELD, Contributions, farther_rank
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._options import MeasureOptions
from ._paths import Watched

__all__ = ["Replicas", "are_copies", "odd_rank"]

_WIDE, _NARROW = 20, 8
"""Bits of a checksum that one number holds, in floats of eight bytes and of four: their squares, summed over thousands
of ranks (hundreds), are exact."""
_WIDTH = 6


class Replicas(Measurement):
    """Compares weights, and gradients after their reduction, over the ranks, bit by bit.

    A flipped bit in a weight of one rank shows in no norm of a gradient: ranks average gradients of different networks
    and all get the same one. Integer sums over the stored bits show every one of them (see `checksum`). Of each
    parameter two whole numbers travel, and their squares: where all ranks have the same, the sum of the squares tells.
    Of each rank there is one over all parameters. Pieces of sharded tensors are nobody's copies: a model that holds any
    is left out.
    """

    part = "comparing the ranks' copies"
    gives = ("replicas_differ", "replica_gradients_differ", "replica_rank", "replica_differs")
    of_ranks = of_params = True

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self.every = meter.options.replicas_every or 1
        self._after: Tensor | None = None
        self._contributions, self._step = Contributions(), -1

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.replicas_every is not None

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        if not ranks.has_copies:
            return {}
        brought = self._contributions.tables(ranks.num_params) if ranks.num == 2 else {}
        return {"ranks": (ranks.num, _WIDTH), "rows": (ranks.num_params, 8), **brought}

    def begin(self, step: int) -> None:
        """Of two ranks none is in the majority: there what each brings to the gradients is taken in, where these are
        compared."""
        if step == self._step or not are_copies(self.meter.watched):
            return
        self._step = step
        if world_size() == 2:
            self._contributions.listen(self._weights())

    def forget(self) -> None:
        self._contributions.forget()

    def stepped(self, step: int, *, one_by_one: bool) -> None:
        """Keep what the optimizer has left, where that is compared with what the next step finds."""
        if world_size() == 1 or not are_copies(self.meter.watched):
            return
        self._after = None
        if is_due(step + 1, self.every) or (one_by_one and is_due(step, self.every)):
            self._after = self._whole(self._codes(self._weights()))

    def look(self, view: StepView, tables: dict[str, Tensor]) -> None:
        if not tables:
            return
        grads = view.gradients
        by_id = {id(p): grad for p, grad in zip(grads.params, grads.tensors, strict=True)}
        weights = self._weights()
        of_weights = self._codes(weights)
        of_grads = self._codes([by_id.get(id(p)) if p is not None else None for p in weights])
        wholes = self._whole(of_weights), self._whole(of_grads)
        changed = torch.zeros_like(wholes[0][0])
        if self._after is not None and self._after.device == changed.device:
            changed = (self._after != wholes[0]).any().to(changed.dtype)
        tables["ranks"][view.rank] = torch.stack([*wholes[0], *wholes[1], changed, torch.ones_like(changed)])
        both = [_parts(of_weights), _parts(of_grads)]
        if HELD in tables:
            tables[BROUGHT], tables[HELD][view.rank] = self._contributions.take(weights, by_id, self.meter.device)
        tables["rows"] = torch.cat([part for codes in both for part in (codes, codes.square())], dim=1)

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        """How many ranks differ from most, in weights and in gradients, and which one; and of each parameter what does.
        Nothing where that was not compared on all ranks."""
        ranks = found.get("ranks")
        if ranks is None or not (ranks[:, _WIDTH - 1] == 1).all():
            return {}
        told: dict[str, float | At] = {}
        column, named = _by_parameter(found["rows"], len(ranks)), []
        for name, first in (("replicas_differ", 0), ("replica_gradients_differ", 2)):
            codes = [tuple(row) for row in ranks[:, first : first + 2].tolist()]
            count = len(codes) - max(Counter(codes).values())
            told[name] = float(count)
            if count:
                is_weight = name == "replicas_differ"
                named.append(odd_rank(codes, ranks[:, 4]) if is_weight else _odd_gradients(codes, found, column))
        if named:
            told["replica_rank"] = float(named[0])
        return told | {"replica_differs": column}

    @property
    def _num(self) -> int:
        return sum(kind == PARAMETER for kind in self.meter.watched.index.kinds)

    def _weights(self) -> list[Tensor | None]:
        """Return the parameters in the index's order; None for those that are no copies of other ranks' ones."""
        watched = self.meter.watched
        found: list[Tensor | None] = [None] * self._num
        apart = frozenset(getattr(self.meter.model, "_ddp_params_and_buffers_to_ignore", ()))
        for position, path, p in (*watched.params, *watched.unheld):
            if path not in apart and position < len(found) and _is_plain(p):
                found[position] = p
        return found

    def _codes(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return a checksum of each, int64, shape (n,); 0 for None."""
        device = self.meter.device
        with Aside():
            nothing = torch.zeros((), dtype=torch.int64, device=device)
            plain = [t is not None and _is_plain(t) for t in tensors]
            sums = [
                moved(checksum(t.detach()), device) if t is not None and is_plain else nothing
                for t, is_plain in zip(tensors, plain, strict=True)
            ]
            return torch.stack(sums) if sums else nothing[None]

    def _whole(self, codes: Tensor) -> Tensor:
        return _parts(checksum(codes)[None])[0]


def _is_plain(tensor: Tensor) -> bool:
    if isinstance(tensor, StandIn) or type(tensor.data) is not Tensor or tensor.is_meta:
        return False
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _parts(codes: Tensor) -> Tensor:
    """Return the low bits of whole numbers (n,) as two numbers each, (n, 2), in the widest floats.

    Of two checksums that differ by one flipped bit, the lowest bit that differs is among these, where floats have eight
    bytes.
    """
    wide = wide_dtype(codes.device)
    bits = _WIDE if wide is torch.float64 else _NARROW
    mask = (1 << bits) - 1
    return torch.stack([codes & mask, (codes >> bits) & mask], dim=1).to(wide)


def are_copies(watched: Watched) -> bool:
    """Return whether each rank holds a whole copy of all parameters."""
    return not (watched.is_in_pieces or watched.strange or watched.stages is not None or watched.zero is not None)


def odd_rank(codes: Sequence[Any], changed: Sequence[float] | NDArray[np.float64]) -> int:
    """Return the one rank that differs; -1 where it can't be told.

    Args:
        codes: of each rank.
        changed: 1 for a rank whose weights are not those that its own optimizer has left.
    """
    common, count = Counter(codes).most_common(1)[0]
    odd = [rank for rank, code in enumerate(codes) if code != common]
    if 2 * count > len(codes):
        return odd[0] if len(odd) == 1 else -1
    written = [rank for rank, flag in enumerate(changed) if flag]
    return written[0] if len(written) == 1 else -1


def _odd_gradients(codes: Sequence[Any], found: Mapping[str, Any], column: At) -> int:
    """Return the rank whose gradients are not those of most, of two not what both brought."""
    if len(codes) != 2:
        return odd_rank(codes, np.zeros(len(codes)))
    return farther_rank(found, column.places[column.values % 2 == 1])


def _by_parameter(rows: NDArray[np.float64], num_ranks: int) -> At:
    """Return places in the index, and what differs there over ranks: 1 the gradient, 2 the weight, 3 both."""
    places = np.flatnonzero(rows[:, :2].any(axis=1))
    sums = rows[places].astype(np.int64).astype(object)  # of many ranks the squares leave 64 bits
    weights, gradients = (
        (num_ranks * sums[:, first + 2 : first + 4] != sums[:, first : first + 2] ** 2).any(axis=1) for first in (0, 4)
    )
    return At(places, gradients + 2.0 * weights)
