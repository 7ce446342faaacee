"""Whether an optimizer's step was announced, so that its gradients have been measured when it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.optim import Optimizer

__all__ = ["Announced"]


class Announced:
    """Told of every optimizer step by the gates, and of those to come by the engine.

    Attributes:
        measure: called with an optimizer whose step nobody announced, before it moves anything; None: it is counted.
        settled: called when such a step is over.
        num_missed: steps that nobody announced, and that were not measured.
    """

    def __init__(self) -> None:
        self._expected: set[int] = set()
        self._alone: set[int] = set()
        self.measure: Callable[[Optimizer], None] | None = None
        self.settled: Callable[[Optimizer], None] | None = None
        self.num_missed = 0

    def expect(self, optimizers: Iterable[Optimizer]) -> None:
        """Say that the gradients of these have been measured, and that they step next."""
        self._expected.update(map(id, optimizers))

    def forget(self) -> None:
        """Say that the step which was announced is over."""
        self._expected.clear()

    def stepping(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, and not in the midst of a backward."""
        if id(optimizer) not in self._expected:
            if self.measure is None:
                self.num_missed += 1
                return
            self._alone.add(id(optimizer))
            self.measure(optimizer)

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        if id(optimizer) in self._alone:
            self._alone.discard(id(optimizer))
            self._expected.discard(id(optimizer))
            if self.settled is not None:
                self.settled(optimizer)

    def close(self) -> None:
        self.measure = self.settled = None
