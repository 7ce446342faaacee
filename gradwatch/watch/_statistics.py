"""The user's own statistics: measured with the step, merged over ranks in its exchange, finished with its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from ..protocols import Statistic
from ..stats import OF_CALLS, At, Gradients, Shards, View, is_due
from ..torchside import (
    Aside,
    Attended,
    WeakHook,
    in_backward,
    in_transform,
    is_traced,
    moved,
    shape_of,
    tensors_of,
    weakly,
    wide_dtype,
)
from ._columns import Columns
from ._ears import Ears
from ._finished import asked, finished
from ._guard import Guard
from ._model_meter import ModelMeter
from ._tables import part_of
from ._views import Views

__all__ = ["OwnRows", "OwnStatistics"]

Array = NDArray[np.float64]


@dataclass
class OwnRows:
    """What a step's statistics measured; the same layout on all ranks, whatever each could measure.

    Attributes:
        plan: the statistics that are due, in order.
        sums: shape (n, all their sums), a row for each gradient; the pieces of this rank.
        maxima: shape (n, all their maxima).
    """

    plan: tuple[Statistic, ...]
    sums: Tensor
    maxima: Tensor

    def joined(self, rows: Tensor | None, maxima: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return rows and maxima of the gradients' pieces with these beside them, to be merged as one."""
        rows = self.sums if rows is None else torch.cat([rows, moved(self.sums, rows.device, rows.dtype)], dim=1)
        if not self.maxima.shape[1]:
            return rows, maxima
        return rows, self.maxima if maxima is None else torch.cat([maxima, self.maxima.to(maxima.dtype)], dim=1)

    def part(self, rows: Tensor | None, maxima: Tensor | None, into: Sequence[Tensor | None]) -> None:
        """Take what was merged apart again; `into` are the gradients' own rows and maxima."""
        for merged, own, name in zip((rows, maxima), into, ("sums", "maxima"), strict=True):
            width = getattr(self, name).shape[1]
            if merged is not None and width:
                setattr(self, name, merged[:, merged.shape[1] - width :])
                if own is not None:
                    own.copy_(merged[:, : merged.shape[1] - width])


@dataclass
class _Outputs:
    """Sums and maxima per module of one statistic of outputs; the last column of the sums counts calls."""

    sums: Tensor
    maxima: Tensor


@dataclass
class OwnDraft:
    """A step's own statistics whose numbers are on their way; off: names of those that were switched off by then."""

    owner: OwnStatistics
    rows: OwnRows | None
    outputs: tuple[Statistic, ...]
    modules: NDArray[np.int64]
    num_ranks: int
    paths: tuple[str, ...]
    off: frozenset[str] = frozenset()

    def parts(self) -> dict[str, Tensor]:
        """Return what is to travel to the host, beside what was merged over ranks."""
        return {} if self.rows is None else {"own/sums": self.rows.sums, "own/maxima": self.rows.maxima}

    def put(self, host: Mapping[str, Array], held: Columns, scalars: dict[str, float], places: Any) -> None:
        """Finish the statistics, and put what comes of them on record; one that fails is switched off."""
        # Whatever happens here, the record comes.
        with self.owner.guard("statistics of one's own"):
            self._put_all(host, held, scalars, places)

    def _put_all(self, host: Mapping[str, Array], held: Columns, scalars: dict[str, float], places: Any) -> None:
        first_sum = first_maximum = 0
        for i, statistic in enumerate(() if self.rows is None else self.rows.plan):
            sums = host["own/sums"][:, first_sum : first_sum + statistic.num_sums]
            maxima = host["own/maxima"][:, first_maximum : first_maximum + statistic.num_maxima]
            first_sum, first_maximum = first_sum + statistic.num_sums, first_maximum + statistic.num_maxima
            # What a rank could not add is missing in the sums: then nobody knows.
            if host["own/given"][i] == self.num_ranks:
                self._finish(statistic, sums, maxima, held, scalars, places)
        for statistic in self.outputs:
            sums = host[f"own/outputs/{statistic.name}"]
            maxima = host.get(f"own/outputs/{statistic.name}/maxima", np.zeros((len(sums), 0)))
            ran = sums[:, -1] > 0
            if ran.any():
                self._finish(statistic, sums[ran, :-1], maxima[ran], held, scalars, self.modules[ran])

    def _finish(
        self, statistic: Statistic, sums: Array, maxima: Array, held: Columns, scalars: dict[str, float], places: Any
    ) -> None:
        # What was measured before it was switched off is finished; what can't be is not tried again.
        if statistic.name in self.off or statistic.name in self.owner.unfinished:
            return
        self.owner.unfinished.add(statistic.name)
        with self.owner.guard(part_of(statistic)):
            for name, value in finished(statistic, sums, maxima, places, self.paths).items():
                if isinstance(value, At):
                    held.put(name, value.places, value.values)
                else:
                    scalars[name] = value
            self.owner.unfinished.discard(statistic.name)


@dataclass
class OwnStatistics:
    """Measures them for one engine. Holds the hooks of those that look at outputs; `close()` gives them back.

    Attributes:
        unfinished: names of those whose numbers could not be finished.
    """

    statistics: Sequence[Statistic]
    meter: ModelMeter
    guard: Guard
    views: Views
    unfinished: set[str] = field(default_factory=set)
    _hooks: list[WeakHook] = field(default_factory=list)
    _hooked: Any = None
    _step: int = -1
    _listening: dict[str, _Outputs] = field(default_factory=dict)
    _ears: Ears | None = None

    def __post_init__(self) -> None:
        has_rows = [s for s in self.statistics if s.num_sums + s.num_maxima]
        self._of_rows = tuple(s for s in has_rows if not s.needs & (OF_CALLS | {"updates"}))
        self._of_outputs = tuple(s for s in self.statistics if s.needs & OF_CALLS)

    def due(self, step: int, among: Sequence[Statistic]) -> tuple[Statistic, ...]:
        """Return which are measured at a step: the same ones on all ranks."""
        return tuple(s for s in among if is_due(step, s.every))

    def begin(self, step: int) -> None:
        """Say that a step's forward passes begin; may be said once per micro-batch."""
        if not self._of_outputs or self._step == step:
            return
        if self._hooked is not self.meter.watched:
            self._hang()
        self._step = step
        due = self.due(step, self._of_outputs)
        self._listening = {s.name: self._blank(s, len(self.meter.watched.modules)) for s in due}
        if self._ears is not None and any("attention" in s.needs for s in due):
            self._ears.open()

    def _hang(self) -> None:
        self.close()
        self._hooked = self.meter.watched
        if any("attention" in s.needs for s in self._of_outputs):
            self._ears = Ears(self.meter, weakly(self._see_attention), self.guard)
        if not any("outputs" in s.needs for s in self._of_outputs):
            return
        modules = dict(self.meter.model.named_modules())
        for row, path in enumerate(self.meter.watched.modules):
            if not self.meter.has(path):
                continue
            hook = WeakHook(self, OwnStatistics._see, row, path)
            hook.hang(modules[self.meter.real_path(path)].register_forward_hook)
            self._hooks.append(hook)

    def _see(self, row: int, path: str, module: Any, args: Any, output: Any) -> None:
        listens = self._listening and self.meter.model.training and not self.meter.is_muted()
        if not listens or in_backward() or in_transform() or is_traced():
            return
        with Aside():
            tensors = [t.detach() for _, t in tensors_of(output) if t.is_floating_point() and t.numel()]
            if tensors:
                self._add_all("outputs", row, path, outputs=tensors)

    def _see_attention(self, row: int, path: str, attended: Attended) -> None:
        self._add_all("attention", row, path, attention=attended)

    def _add_all(self, what: str, row: int, path: str, **shown: Any) -> None:
        """Let all statistics that listen to this look at one call."""
        for statistic in self._of_outputs:
            kept = self._listening.get(statistic.name) if what in statistic.needs else None
            if kept is not None and self.guard.ok(part_of(statistic)):
                with self.guard(part_of(statistic)):
                    memory = self.views.memory_of(statistic, None, (path,), path)
                    self._add(statistic, kept, row, View(self._step, (path,), memory, **shown))

    def _add(self, statistic: Statistic, kept: _Outputs, row: int, view: View) -> None:
        sums, maxima = asked(statistic, view, 1)
        if sums is None and maxima is None:
            return
        device, wide = kept.sums.device, kept.sums.dtype
        kept.sums[row, -1] += 1
        if sums is not None:
            kept.sums[row, :-1] += moved(sums, device, wide)[0]
        if maxima is not None:
            kept.maxima[row] = torch.maximum(kept.maxima[row], moved(maxima, device, wide)[0])

    def miss(self) -> None:
        """Leave what was heard of outputs at this step: it is of other modules than what is exchanged."""
        self._listening = {}

    def _blank(self, statistic: Statistic, n: int) -> _Outputs:
        device = self.meter.device
        wide = wide_dtype(device)
        sums = torch.zeros(n, statistic.num_sums + 1, dtype=wide, device=device)
        return _Outputs(sums, torch.full((n, statistic.num_maxima), -torch.inf, dtype=wide, device=device))

    def blank(self, step: int, num_modules: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what this rank adds to the exchange where it has nothing to say: sums and maxima by name."""
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        plan, device = self.due(step, self._of_rows), self.meter.device
        if plan:
            sums["own/given"] = torch.zeros(len(plan), dtype=wide_dtype(device), device=device)
        for statistic in self.due(step, self._of_outputs):
            self._put(self._blank(statistic, num_modules), statistic, sums, maxima)
        return sums, maxima

    def _put(self, found: _Outputs, statistic: Statistic, sums: dict[str, Tensor], maxima: dict[str, Tensor]) -> None:
        sums[f"own/outputs/{statistic.name}"] = found.sums
        if statistic.num_maxima:
            maxima[f"own/outputs/{statistic.name}/maxima"] = found.maxima

    def blank_rows(self, step: int, n: int) -> OwnRows | None:
        """Return rows with nothing in them; None where no statistic of that kind is due."""
        plan, device = self.due(step, self._of_rows), self.meter.device
        if not plan:
            return None
        wide, widths = wide_dtype(device), (sum(s.num_sums for s in plan), sum(s.num_maxima for s in plan))
        zeros = torch.zeros(n, widths[0], dtype=wide, device=device)
        return OwnRows(plan, zeros, torch.full((n, widths[1]), -torch.inf, dtype=wide, device=device))

    def look(
        self,
        step: int,
        grads: Gradients,
        shards: Shards,
        optimizers: Sequence[Optimizer],
        number: int | None,
        into: tuple[dict[str, Tensor], dict[str, Tensor]],
    ) -> OwnRows | None:
        """Measure what is due, and put what travels over ranks by name into sums and maxima."""
        if self._hooked is not self.meter.watched:
            self.miss()  # heard of modules that were, while the model has changed since
        if self._step == step:
            for statistic in self.due(step, self._of_outputs):
                if statistic.name in self._listening:
                    self._put(self._listening[statistic.name], statistic, *into)
            self._listening = {}
            if self._ears is not None:
                self._ears.close()
        rows = self.blank_rows(step, len(grads))
        first_sum = first_maximum = 0
        for i, statistic in enumerate(() if rows is None else rows.plan):
            assert rows is not None
            if len(grads) and self.guard.ok(part_of(statistic)):
                with self.guard(part_of(statistic)):
                    view = self.views.of(statistic, step, grads, shards, optimizers, number)
                    sums, maxima = _asked(statistic, view, grads, shards)
                    if sums is not None:
                        rows.sums[:, first_sum : first_sum + statistic.num_sums] = sums
                    if maxima is not None:
                        rows.maxima[:, first_maximum : first_maximum + statistic.num_maxima] = maxima
                    if sums is not None or maxima is not None:
                        into[0]["own/given"][i] = 1.0
            first_sum, first_maximum = first_sum + statistic.num_sums, first_maximum + statistic.num_maxima
        return rows

    def draft(self, step: int, rows: OwnRows | None, num_ranks: int) -> OwnDraft | None:
        """Return what finishes the statistics of this step; None where none is due."""
        outputs = self.due(step, self._of_outputs)
        if rows is None and not outputs:
            return None
        paths = self.meter.watched.index.paths
        of_rows = () if rows is None else rows.plan
        off = frozenset(s.name for s in (*of_rows, *outputs) if not self.guard.ok(part_of(s)))
        return OwnDraft(self, rows, outputs, self.meter.module_positions(), num_ranks, paths, off)

    def close(self) -> None:
        """Take the hooks off. May be called twice."""
        for hook in self._hooks:
            hook.take_off()
        if self._ears is not None:
            self._ears.close()
        self._hooks, self._hooked, self._ears = [], None, None


def _asked(statistic: Statistic, view: View, grads: Gradients, shards: Shards) -> tuple[Tensor | None, Tensor | None]:
    """Return what `asked` does of gradients, which it is not to write to."""
    writes = _writes(grads)
    sums, maxima = asked(statistic, view, len(grads))
    if _writes(grads) != writes:
        raise RuntimeError(
            f"it wrote to gradients or parameters: those of step {view.step} are no longer what they were"
        )
    if sums is not None and statistic.whole:
        sums = _where_whole(sums, grads.params, shards)
    return sums, maxima


def _writes(grads: Gradients) -> list[int]:
    """Return how often each gradient and parameter was written to; nothing where that is not counted."""
    tensors = [*grads.tensors, *grads.params]
    return [t._version for t in tensors if not t.is_inference()]


def _where_whole(sums: Tensor, params: Sequence[Tensor], shards: Shards) -> Tensor:
    """Return the rows of parameters that are whole on this rank, nan for the others."""
    pairs = zip(params, shards.locals, strict=True)
    pieces = [i for i, (p, local) in enumerate(pairs) if local.numel() != shape_of(p).numel()]
    if pieces:
        sums = sums.clone()
        sums[pieces] = torch.nan
    return sums
