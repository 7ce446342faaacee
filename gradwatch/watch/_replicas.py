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
from ..stats import Gradients
from ..torchside import Aside, StandIn, checksum, moved, wide_dtype, world_size
from ._contributions import BROUGHT, HELD, Contributions, farther_rank
from ._model_meter import ModelMeter
from ._options import is_due
from ._paths import Watched
from ._ranks import rank_of_this

__all__ = [
    "COPIES",
    "OF_COPIES",
    "RANKS",
    "ROWS",
    "Replicas",
    "are_copies",
    "odd_rank",
    "replica_column",
    "replica_scalars",
]

COPIES = "comparing the ranks' copies"
"""What fails where this does."""
RANKS, ROWS = "replicas/ranks", "replicas/rows"
"""Names of what travels: sums that have a row for each rank, and that have one for each parameter."""
OF_COPIES = (RANKS, ROWS, BROUGHT, HELD)
_WIDE, _NARROW = 20, 8
"""Bits of a checksum that one number holds, in floats of eight bytes and of four: their squares, summed over thousands
of ranks (hundreds), are exact."""
_WIDTH = 6


class Replicas:
    """Compares weights, and gradients after their reduction, over the ranks, bit by bit.

    A flipped bit in a weight of one rank shows in no norm of a gradient: ranks average gradients of different networks
    and all get the same one. Integer sums over the stored bits show every one of them (see `checksum`). Of each
    parameter two whole numbers travel, and their squares: where all ranks have the same, the sum of the squares tells.
    Of each rank there is one over all parameters. Pieces of sharded tensors are nobody's copies: a model that holds any
    is left out.

    Args:
        meter: what is watched.
    """

    def __init__(self, meter: ModelMeter) -> None:
        self._meter = meter
        self._after: Tensor | None = None
        self._contributions, self._step = Contributions(), -1

    def begin(self, step: int, every: int | None) -> None:
        """Say that a step's forward passes begin; may be said once per micro-batch. Of two ranks none is in the
        majority: there what each brings to the gradients is taken in, where these are compared."""
        if step == self._step:
            return
        self._step = step
        if is_due(step, every) and world_size() == 2:
            self._contributions.listen(self._weights())

    def forget(self) -> None:
        """Take off what listens. May be called twice."""
        self._contributions.forget()

    def stepped(self, step: int, every: int | None, *, one_by_one: bool) -> None:
        """Keep what the optimizer has left, where that is compared with what the next step finds.

        Args:
            step: that is over.
            every: optimizer steps between two comparisons.
            one_by_one: several optimizers step each on its own in one step.
        """
        self._after = None
        if is_due(step + 1, every) or (one_by_one and is_due(step, every)):
            self._after = self._whole(self._codes(self._weights()))

    def blank(self, num_ranks: int, num_params: int) -> dict[str, Tensor]:
        """Return the sums of a rank that has nothing to say of that many parameters."""
        device, wide = self._meter.device, wide_dtype(self._meter.device)
        return {
            RANKS: torch.zeros(num_ranks, _WIDTH, dtype=wide, device=device),
            ROWS: torch.zeros(num_params, 8, dtype=wide, device=device),
            **(self._contributions.blank(num_params, device) if num_ranks == 2 else {}),
        }

    def look(self, grads: Gradients, into: dict[str, Tensor]) -> None:
        """Put this rank's checksums where they travel. Reads nothing back."""
        by_id = {id(p): grad for p, grad in zip(grads.params, grads.tensors, strict=True)}
        weights = self._weights()
        of_weights = self._codes(weights)
        of_grads = self._codes([by_id.get(id(p)) if p is not None else None for p in weights])
        wholes = self._whole(of_weights), self._whole(of_grads)
        changed = torch.zeros_like(wholes[0][0])
        if self._after is not None and self._after.device == changed.device:
            changed = (self._after != wholes[0]).any().to(changed.dtype)
        into[RANKS][rank_of_this()] = torch.stack([*wholes[0], *wholes[1], changed, torch.ones_like(changed)])
        both = [_parts(of_weights), _parts(of_grads)]
        if HELD in into:
            into[BROUGHT], into[HELD][rank_of_this()] = self._contributions.take(weights, by_id, self._meter.device)
        into[ROWS] = torch.cat([part for codes in both for part in (codes, codes.square())], dim=1)

    @property
    def _num(self) -> int:
        return sum(kind == PARAMETER for kind in self._meter.watched.index.kinds)

    def _weights(self) -> list[Tensor | None]:
        """Return the parameters in the index's order; None for those that are no copies of other ranks' ones."""
        watched = self._meter.watched
        found: list[Tensor | None] = [None] * self._num
        apart = frozenset(getattr(self._meter.model, "_ddp_params_and_buffers_to_ignore", ()))
        for position, path, p in (*watched.params, *watched.unheld):
            if path not in apart and position < len(found) and _is_plain(p):
                found[position] = p
        return found

    def _codes(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return a checksum of each, int64, shape (n,); 0 for None."""
        device = self._meter.device
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


def replica_scalars(host: Mapping[str, Any]) -> dict[str, float]:
    """Return how many ranks differ from most, in weights and in gradients, and which one; nothing where that was not
    compared on all of them."""
    ranks = host.get(RANKS)
    if ranks is None or not (ranks[:, _WIDTH - 1] == 1).all():
        return {}
    found = {}
    named = []
    for name, first in (("replicas_differ", 0), ("replica_gradients_differ", 2)):
        codes = [tuple(row) for row in ranks[:, first : first + 2].tolist()]
        count = len(codes) - max(Counter(codes).values())
        found[name] = float(count)
        if count:
            named.append(odd_rank(codes, ranks[:, 4]) if name == "replicas_differ" else _odd_gradients(codes, host))
    if named:
        found["replica_rank"] = float(named[0])
    return found


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


def _odd_gradients(codes: Sequence[Any], host: Mapping[str, Any]) -> int:
    """Return the rank whose gradients are not those of most, of two not what both brought."""
    if len(codes) != 2:
        return odd_rank(codes, np.zeros(len(codes)))
    found = replica_column(host)
    return -1 if found is None else farther_rank(host, found[0][found[1] % 2 == 1])


def replica_column(host: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Return positions in the index, and what differs there over ranks: 1 the gradient, 2 the weight, 3 both."""
    rows, ranks = host.get(ROWS), host.get(RANKS)
    if rows is None or ranks is None or not (ranks[:, _WIDTH - 1] == 1).all():
        return None
    positions = np.flatnonzero(rows[:, :2].any(axis=1))
    sums = rows[positions].astype(np.int64).astype(object)  # of many ranks the squares leave 64 bits
    weights, gradients = (
        (len(ranks) * sums[:, first + 2 : first + 4] != sums[:, first : first + 2] ** 2).any(axis=1) for first in (0, 4)
    )
    return positions, gradients + 2.0 * weights
