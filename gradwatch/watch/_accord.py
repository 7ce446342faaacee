"""What ranks have agreed to exchange, while their models may change: on all of them alike, or on one alone.

The vector of a step has one length on all ranks, and parts of it are as long as the lists of parameters and modules.
A rank whose model has changed can't know whether those of the others have, too. It goes on in the layout that was
agreed on, with blanks where that does not fit any more, and says in the same vector, among numbers that are always
there, what its model looks like now. Once all ranks are heard to say the same, that is the layout from the next step
on; where they say different things, nothing that they could exchange is about the same.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._text import as_bytes
from ..torchside import is_host, wide_dtype
from ._guard import Guard
from ._model_meter import ModelMeter
from ._parallel import num_batches_at_once
from ._paths import Watched
from ._ranks import NUM_SAID, say_the_same, world_size
from ._replicas import are_copies

__all__ = ["Accord", "Layout", "layout_of"]

_APART = (
    "the ranks do not hold the same parameters and modules (experts, stages of a pipeline), and nothing says how they "
    "belong together. Give gradwatch a pipeline's schedule in the model's place, and experts as DTensors over a mesh"
)
_APART_SINCE = (
    "from step {} on the ranks do not hold the same parameters and modules: something was added, replaced or removed "
    "on some of them, not on all. Change the model on all ranks at the same step"
)


class Layout(NamedTuple):
    """What the exchange of a step is made for.

    Attributes:
        check: of the names and shapes of all parameters and modules, and of the rest; above 1.
        num_params: in the index.
        num_modules: that are watched.
        has_copies: ranks hold copies of the same parameters.
        has_batches: each rank has batches of its own.
        has_stages: they are ranks of a pipeline.
    """

    check: int
    num_params: int
    num_modules: int
    has_copies: bool
    has_batches: bool
    has_stages: bool


_NOTHING = Layout(1, 0, 0, False, True, False)
"""Of a rank that has heard that models are unlike: its own says nothing to the others any more."""


def layout_of(watched: Watched, device: torch.device, *, has_batches: bool) -> Layout:
    """Return what the exchange about a model would be made for.

    Args:
        watched: the model.
        device: where numbers travel from.
        has_batches: each rank has batches of its own.
    """
    index, apart = watched.index, watched.strange
    parts = len(watched.modules), are_copies(watched), has_batches, watched.stages is not None
    rows = zip(index.paths, index.shapes, strict=True)
    text = "\n".join([f"{path} {shape} {path in apart}" for path, shape in rows])
    # Its square, summed over ranks, must be exact.
    most = 0xFFFFF if wide_dtype(device) is torch.float64 else 0xFF
    check = zlib.crc32(as_bytes(f"{text}\n{parts}")) % (most - 1) + 2
    return Layout(check, len(index.paths) - len(watched.modules), *parts)


class Accord:
    """Keeps what the ranks have agreed on, and hears what they say.

    Attributes:
        is_broken: ranks were heard to hold unlike models.

    Args:
        meter: of the model.
        guard: warns where nothing can be exchanged any more.
    """

    def __init__(self, meter: ModelMeter, guard: Guard) -> None:
        self._meter, self._guard = meter, guard
        # Weakly: what was watched before, with layers that the model has let go of, must not live on here.
        self._now: tuple[weakref.ref[Watched], Layout] | None = None
        self._num_batches: tuple[weakref.ref[Watched], int] | None = None
        self._agreed: Layout | None = None
        self._has_compared = self.is_broken = False

    @property
    def num_batches(self) -> int:
        """How many ranks work on batches of their own."""
        key = self._meter.watched
        if self._num_batches is None or self._num_batches[0]() is not key:
            found = num_batches_at_once(self._meter.model, [p for _, _, p in key.params])
            self._num_batches = (weakref.ref(key), found)
        return self._num_batches[1]

    @property
    def now(self) -> Layout:
        """The layout that fits the model as it is."""
        if self.is_broken:
            return _NOTHING
        watched = self._meter.watched
        if self._now is None or self._now[0]() is not watched:
            has_batches = self.num_batches == world_size()
            self._now = (weakref.ref(watched), layout_of(watched, self._meter.device, has_batches=has_batches))
        return self._now[1]

    @property
    def agreed(self) -> Layout:
        """The layout of what is exchanged, which the model as it is may not fit; of one rank, what fits it."""
        if self._agreed is None or world_size() == 1:
            self._agreed = self.now
        return self._agreed

    def compare(self, step: int) -> None:
        """Find out, before the first exchange, whether ranks hold the same parameters and modules, and measure the same
        ones of them: else nothing that they exchange would be about the same, or of the same length."""
        if self._has_compared:
            return
        self._has_compared = True
        if not say_the_same(str(self.now), self._meter.device):
            self._agreed = _NOTHING  # all ranks know
            self._break_off(_APART, step)

    def say(self) -> tuple[float, float, float]:
        """Return what this rank says with a step: what its model looks like, squared, too; and whether modules are to
        be looked at again at the next."""
        check, looks_again = float(self.now.check), float(self._meter.looks_again)
        self._meter.looks_again = False
        return check, check**2, looks_again

    def hear(self, step: int, said: Layout, extras: Tensor, failed: Tensor) -> bool:
        """Take in what all ranks said at a step, where the host has it; return whether they were found to be unlike.

        Args:
            step: that goes on.
            said: this rank's layout in it.
            extras: what travelled with it from all hosts, summed.
            failed: how many ranks could say nothing.
        """
        if not is_host(self._meter.device):
            return False
        return self._take_in(step, said, extras[-NUM_SAID:].tolist(), lambda: int(failed), since=step)

    def hear_late(self, step: int, said: Layout, extras: Sequence[float], num_failed: int, *, since: int) -> None:
        """Take in the same where the host has it late, when all ranks take up the numbers of that step.

        Args:
            step: that was measured last.
            said, extras: as above.
            num_failed: how many ranks could say nothing.
            since: the step that these are of.
        """
        self._take_in(step + 1, said, extras[-NUM_SAID:], lambda: num_failed, since=since)

    def _take_in(
        self, step: int, said: Layout, told: Sequence[float], num_failed: Callable[[], int], *, since: int
    ) -> bool:
        total, squares, look_again = told
        if look_again:
            self._meter.sample_until = max(self._meter.sample_until, step + 1)
        if world_size() * squares == total * total:
            # All that said anything: where nobody did, this rank is not here either.
            self._agreed = said
            return False
        if self.is_broken or (world_size() - num_failed()) * squares == total * total:
            return False
        self._break_off(_APART_SINCE.format(since), step)
        return True

    def _break_off(self, why: str, step: int) -> None:
        self.is_broken = True
        self._meter.stay_apart(why, step)
        self._guard.warn(f"nothing of the gradients is seen: {why}.")
