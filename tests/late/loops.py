"""A plain loop of the smallest size, told as a story."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch import Watch

from .places import Place
from .story import Story

__all__ = ["Loop", "adamw", "faults", "fused", "momentum", "net", "sgd", "still", "tell"]

Factor = Callable[[int], float]


def net() -> nn.Sequential:
    """Return the model of most scenarios."""
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)


def still(params: Any) -> torch.optim.Optimizer:
    """An optimizer that no spike can lead astray."""
    return torch.optim.SGD(params, lr=1e-9)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def fused(params: Any) -> torch.optim.Optimizer:
    """An optimizer that reads `found_inf` on the device: nobody has to wait for a veto."""
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def faults(at: dict[int, float]) -> Factor:
    """Return what the loss is multiplied by at each step: 1 where nothing is said."""
    return lambda step: at.get(step, 1.0)


SPIKE = faults({12: 1e4})
NAN = faults({6: math.nan})


class Loop:
    """One training, watched.

    Attributes:
        watch: to ask anything of.
        requests: what reached the user's code, with the step at which it did.
    """

    def __init__(
        self,
        place: Place,
        *,
        model: Callable[[], nn.Module] = net,
        optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
        scale: float | None = None,
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.place = place
        self.model = model()
        self.x, self.y = torch.randn(16, 6), torch.randint(0, 3, (16,))
        self.model, self.x, self.y = self.model.to(place.device), self.x.to(place.device), self.y.to(place.device)
        self.optimizer = optimizer(self.model.parameters())
        self.scaler = None
        if scale is not None:
            self.scaler = torch.amp.GradScaler(place.device.type, init_scale=scale, growth_interval=10**6)
        self.loss = loss or (lambda m, x, y: nn.functional.cross_entropy(m(x), y))
        self.requests: list[tuple[str, int]] = []
        self.step = 0
        self.end = ""
        self.options = {"rules": [], "activations_every": None, "updates_every": None, "histograms_every": None}
        self.options |= {"on_checkpoint": lambda name: self.requests.append(("checkpoint", self.step))} | options
        self.watch = self.make_watch()

    def make_watch(self) -> Watch:
        """Return a fresh watch over the same training."""
        return Watch(self.model, self.optimizer, scaler=self.scaler, **self.options)

    def notified(self, incident: Any) -> None:
        """For `Notify`."""
        self.requests.append((f"notify of {incident.rule} at {incident.first_step}", self.step))

    def once(self, factor: float = 1.0) -> None:
        """Train one step."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model, self.x, self.y) * factor
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        self.watch.step(loss=loss, batch=(self.x, self.y))
        self.passed()

    def passed(self) -> None:
        """Say that a step is over."""
        self.step += 1
        self.place.tick()

    def run(self, steps: int, factor: Factor = lambda step: 1.0) -> Loop:
        """Train so many steps inside a `with`, and keep how it ended."""
        with self.ending(), self.watch:
            self.steps(steps, factor)
        return self

    def steps(self, steps: int, factor: Factor = lambda step: 1.0) -> None:
        """Train so many steps."""
        for _ in range(steps):
            self.once(factor(self.step))

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Keep what the body raises as the end of the story."""
        try:
            yield
        except Exception as error:
            self.end = f"{type(error).__name__}: {error}"

    def story(self, **said: Any) -> Story:
        """Return what the run left behind."""
        completion = self.watch.session.engine.completion
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return Story(
            incidents=self.watch.incidents,
            records=self.watch.history,
            requests=self.requests,
            end=self.end,
            skipped=completion.num_skipped,
            overflows=completion.num_overflows,
            weights=[t.detach().cpu().numpy() for t in tensors],
            said={"notes": self.watch.session.notes, **said},
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Let warnings pass: scenarios are of runs in which something is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tell(scenario: Callable[[Place], Story], place: Place) -> Story:
    """Run a scenario at a place."""
    with quiet():
        return scenario(place)
