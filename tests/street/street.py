"""What a program of the street is given: steps to take, and something to watch with (in the bare arm, nothing)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import process_time
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["ARMS", "PROGRAMS", "Program", "Street", "Unwatched", "program"]

EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1}
ARMS: dict[str, dict[str, Any]] = {
    "bare": {},
    "default": {},
    "everything": {**EVERYTHING, "run_dir": "gradwatch-run"},
    "autoclip": {"rules": "autoclip"},
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program.

    Attributes:
        train: runs it; returns what it leaves behind: models and optimizers, in any nesting of tuples and lists.
        steps: of a run in the tests, long enough for a second sampled step where a step is cheap.
        long: of a run in the benchmark, long enough for rules to judge.
        saved: whether saved tensors can be counted (torch's function transforms refuse hooks on them).
        traced: `torch.compile` keeps stand-ins for tensors.
        told: words of the one line by which gradwatch may say what it can't read of this program's objects.
    """

    name: str
    train: Callable[[Street], Any]
    steps: int
    long: int
    saved: bool
    traced: bool
    told: str


PROGRAMS: dict[str, Program] = {}


def program(
    *, steps: int = 30, long: int = 200, saved: bool = True, traced: bool = False, told: str = ""
) -> Callable[[Callable[[Street], Any]], Any]:
    """Put a function on the street, under its own name."""

    def register(train: Callable[[Street], Any]) -> Callable[[Street], Any]:
        name = train.__name__
        PROGRAMS[name] = Program(name=name, train=train, steps=steps, long=long, saved=saved, traced=traced, told=told)
        return train

    return register


class Street:
    """One run of one program in one arm. Gradwatch is imported when a watch is asked for, not before."""

    def __init__(self, arm: str, steps: int, counted: int = 5) -> None:
        self.arm, self.steps = arm, steps
        self.watches: list[Any] = []
        self.losses: list[str] = []
        self.counting = ExitStack()
        self._counted = counted
        self._times: list[float] = []

    @property
    def is_bare(self) -> bool:
        return self.arm == "bare"

    def watch(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], **options: Any) -> Any:
        """A `Watch`, or in the bare arm a stand-in that only steps."""
        if self.is_bare:
            return Unwatched(optimizer, options.get("scaler"))
        from gradwatch import Watch

        return self._kept(Watch(model, optimizer, **options, **ARMS[self.arm]))

    def lightning(self) -> list[Any]:
        """Callbacks for a Trainer."""
        if self.is_bare:
            return []
        from gradwatch.callbacks import GradWatch

        return [self._kept(GradWatch(verbose=False, **ARMS[self.arm]))]

    def fabric(self) -> list[Any]:
        """Callbacks for a Fabric."""
        if self.is_bare:
            return []
        from gradwatch.callbacks.fabric import GradWatch

        return [self._kept(GradWatch(verbose=False, **ARMS[self.arm]))]

    def transformers(self) -> list[Any]:
        """Callbacks for a Hugging Face Trainer."""
        if self.is_bare:
            return []
        from gradwatch.callbacks.transformers import GradWatchCallback

        return [self._kept(GradWatchCallback(verbose=False, **ARMS[self.arm]))]

    def _kept(self, watch: Any) -> Any:
        self.watches.append(watch)
        return watch

    def note(self, *losses: Any) -> None:
        """One step is done; its losses, to the bit."""
        self.losses += [(loss.item() if isinstance(loss, Tensor) else float(loss)).hex() for loss in losses]
        self._times.append(process_time())
        if len(self._times) == self._counted:
            self.counting.close()

    @property
    def ms_per_step(self) -> float:
        """CPU time of a step, the steps under count left out."""
        times = self._times[self._counted :] or self._times
        return 1e3 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float("nan")

    @property
    def num_steps(self) -> int:
        return len(self._times)


class Unwatched:
    """What a program does without gradwatch: the optimizers' own steps."""

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer], scaler: Any) -> None:
        self._optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        self._scaler = scaler

    def step(self, loss: Any = None, *, optimizer: Optimizer | None = None, **given: Any) -> None:
        for each in self._optimizers if optimizer is None else [optimizer]:
            if self._scaler is None:
                each.step()
            else:
                self._scaler.step(each)
        if self._scaler is not None:
            self._scaler.update()

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """In place of what only a watch does."""

    after_backward = after_step = micro_batch = validation = annotate = close = nothing

    def __enter__(self) -> Unwatched:
        return self

    def __exit__(self, *error: object) -> None:
        pass
