"""One vetoed step: gradients kept aside, and a proof afterwards that nothing has moved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._warn import one_line
from ..torchside import Aside, Samples, num_bytes, random_state, set_random_state, unlike
from ._family import Family
from ._undo import Undo

__all__ = ["Glimpse", "Kept", "Proof", "Veto"]


@dataclass(frozen=True)
class Proof:
    """What came of one vetoed step.

    Attributes:
        optimizer: class of the optimizer.
        moved: names of what had moved.
        left: names of what could not be put back.
        why: it could not, in a sentence; "".
    """

    optimizer: str
    moved: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    why: str = ""


SCHEDULED = frozenset(
    ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "momentum", "base_momentum", "max_momentum", "betas")
) | {"weight_decay"}
"""What schedulers write into parameter groups when the step is over."""


class Kept:
    """Gradients that a vetoed step is kept from.

    Args:
        zeros: gradients of zeros take their place, for optimizers of which it is not known what None is to them; else
            None does.
    """

    def __init__(self, *, zeros: bool = False) -> None:
        self._zeros = zeros
        self._held: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients of parameters away; those too that came since the last time."""
        with Aside():
            for p in parameters:
                self._take(p)

    def _take(self, p: Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        held = self._held.get(id(p))
        if held is not None and grad is held[2]:
            grad.zero_()  # a backward inside the step has added to it
            return
        stand_in = torch.zeros_like(grad) if self._zeros else None
        self._held[id(p)] = (p, grad, stand_in)
        p.grad = stand_in

    def hand_back(self) -> None:
        """Give parameters their gradients again: who looks at them afterwards finds them."""
        for key, (p, grad, stand_in) in list(self._held.items()):
            # An optimizer that takes a gradient away when it has used it does so at this step, too.
            if p.grad is not None or stand_in is None:
                p.grad = grad
            del self._held[key]


class Veto:
    """Keeps optimizers from moving anything, and takes back what they have moved all the same.

    Of those that are known to be clean every gradient is None, and checksums prove it, or copies where these are
    quicker. Others get gradients of zeros,
    which none can be without, and everything is put back from copies; where these would take more than the limit, they
    get None, and what has moved is told.

    Attributes:
        was_settled: a step has come, and is over.
        is_late: weights are not what they are to be again: the optimizer is in the midst of its own algorithm.

    Args:
        family: the optimizers.
        limit_bytes: for copies.
        name_of: the name of a parameter.
        spared: entries of parameter groups that are changed for the step by gradwatch itself.
        parts: what the optimizers move beside what their groups show now, in several calls that make one step: such
            gradients give way to None alone, since zeros would move what is passed on before anything is put back.
    """

    def __init__(
        self,
        family: Family,
        *,
        limit_bytes: int,
        name_of: Callable[[Tensor], str | None],
        spared: frozenset[str] = frozenset(),
        parts: Sequence[Tensor] = (),
    ) -> None:
        self._family, self._spared = family, spared
        self._trusts = family.is_clean
        self._undo: Undo | None = None
        self._why_blind = ""
        with self._blind_where_it_fails():
            zeros = 0 if self._trusts else sum(num_bytes(p.grad) for p in _with_grad(family))
            limit = max(limit_bytes - zeros, 0)
            self._undo = Undo(
                family.members, limit_bytes=limit, name_of=name_of, only_on_host=self._trusts, parts=parts
            )
        is_undone = self._undo is not None and self._undo.is_complete
        self._kept = Kept(zeros=not self._trusts and is_undone and not parts)
        self._random: Any = None
        self._after: Glimpse | None = None
        self._is_begun = self._left = False
        self.was_settled = self.is_late = False

    @contextmanager
    def _blind_where_it_fails(self) -> Iterator[None]:
        """What can't be compared is told, and ends no step of the user's."""
        try:
            yield
        except Exception as error:
            self._undo, self._why_blind = None, one_line(error)

    def hide(self, *, in_step: bool = False) -> None:
        """Take the gradients away; `in_step`: an optimizer's step has begun."""
        if in_step and not self._is_begun:
            self._is_begun = True
            if self._undo is not None:
                self._undo.accept(SCHEDULED)
        if in_step and self._random is None and not self._trusts:
            self._random = random_state(), random.getstate(), np.random.get_state()
        self._kept.take(self._family.parameters)

    def drop(self) -> None:
        """Give the gradients back without a proof: another veto takes this one's place."""
        self._kept.hand_back()

    def settle(self, *, is_seen: bool = True) -> Proof:
        """Prove that nothing has moved, once the step is over; put back what has. Gradients are there again.

        Args:
            is_seen: the step is just over; else schedulers may have stepped since.
        """
        self._put_random_back()
        self.was_settled = True
        spared = self._spared if is_seen else SCHEDULED | self._spared
        moved, left = self._compared(spared, puts_back=not self.is_late)
        self._kept.hand_back()
        self._left = bool(left) or self._undo is None
        self._family.learned = self._family.learned or self._left
        self._after = Glimpse(self._family, of_all=True)
        why = "the decision fell in the midst of the optimizer's own algorithm" if left and self.is_late else ""
        return self._proof(moved, left, why)

    def look_again(self) -> Proof:
        """Prove that nothing has moved since; put it back where a wrapper may have moved it whose step does not tell of
        itself."""
        if self._left:
            return Proof(self._family.name)  # told already
        if self._family.ends_unseen and not self.is_late:
            return self._proof(*self._compared(SCHEDULED, puts_back=True))
        if self._after is not None and self._after.still_holds():
            return Proof(self._family.name)
        moved, _ = self._compared(frozenset(), puts_back=False, parameters_only=True)
        return self._proof(moved, moved, "it was moved when the optimizer's step was over, by something else")

    def _compared(
        self, spared: frozenset[str], *, puts_back: bool, parameters_only: bool = False
    ) -> tuple[list[str], list[str]]:
        """Return the names of what had moved, and of what is not what it was still."""
        moved: list[str] = []
        left: list[str] = []
        with self._blind_where_it_fails():
            if self._undo is not None:
                moved = left = self._undo.moved(spared=spared, parameters_only=parameters_only)
                if moved and puts_back:
                    left = self._undo.put_back(spared=spared)
        return moved, left

    def _proof(self, moved: list[str], left: list[str], why: str = "") -> Proof:
        name = self._family.name
        if self._undo is None:
            return Proof(name, tuple(moved), ("what can't be compared",), self._why_blind)
        if left:
            return Proof(name, tuple(moved), tuple(left), why or self._why_left())
        unreadable = self._undo.unreadable
        if unreadable:
            names = tuple(entry.partition(":")[0] for entry in unreadable)
            return Proof(name, tuple(moved), names, f"it can't be read: {unreadable[0]}")
        return Proof(name, tuple(moved))

    def _why_left(self) -> str:
        if self._trusts:
            return "the optimizer was taken for one that moves nothing; copies are made from now on"
        if self._undo is not None and self._undo.is_complete:
            return "what was put back did not stay"
        return "copies would take more than `memory_limit_mb`"

    def _put_random_back(self) -> None:
        if self._random is None:
            return
        (torchs, pythons, numpys), self._random = self._random, None
        set_random_state(torchs)
        random.setstate(pythons)
        np.random.set_state(numpys)


def _with_grad(family: Family) -> list[Any]:
    return [p for p in family.parameters if p.grad is not None]


class Glimpse:
    """A few numbers of some parameters, by which it shows that an optimizer is in the midst of its own algorithm."""

    def __init__(self, family: Family, *, of_all: bool = False) -> None:
        some = family.parameters
        self._some = some if of_all else some[:2] + some[2:][-2:]
        self._then = self._now()

    def _now(self) -> list[Tensor]:
        # Anew each time: somebody may have set a parameter's `.data`.
        return Samples(self._some, 16).now()

    def still_holds(self) -> bool:
        """Return whether they are the same still; a host read."""
        now = self._now()
        return [row.shape for row in now] == [row.shape for row in self._then] and not bool(unlike(self._then, now))
