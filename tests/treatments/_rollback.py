"""A training whose state is kept at every step by the test itself, to compare a return with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.rules import Expression
from gradwatch.treatments import Rollback

__all__ = ["Loop", "Net", "at", "copied", "equal", "optimizers"]


class Net(nn.Module):
    """Running statistics, dropout, a buffer that no state dict holds, a frozen weight, one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)
        self.middle, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.last_again = self.last
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.drop(torch.relu(self.norm(self.first(x)))) * self.frozen
        return self.last_again(torch.tanh(self.middle(x)))


class ByHand(torch.optim.Optimizer):
    """An optimizer with a count and a slow copy of its own, as users write them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "k": 0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    slow = self.state[p].setdefault("slow", [p.detach().clone(), 0])
                    p.sub_(group["lr"] * p.grad)
                    slow[1] += 1
                    if slow[1] % 3 == 0:
                        slow[0].lerp_(p, 0.5)
                        p.copy_(slow[0])


optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2), foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5),
    "by-hand": ByHand,
}


def copied(*parts: Any) -> Any:
    """Return a deep copy of what these hold: modules' tensors by name, optimizers' states, anything else's state."""
    return [_copied(part) for part in parts]


def _copied(part: Any) -> Any:
    if isinstance(part, nn.Module):
        held = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
        return {name: tensor.detach().clone() for name, tensor in held}
    if isinstance(part, torch.optim.Optimizer):
        own = {name: value for name, value in vars(part).items() if isinstance(value, int)}
        return copy.deepcopy(part.state_dict()), own
    return copy.deepcopy(part.state_dict())


def equal(a: Any, b: Any) -> bool:
    """Return whether two such copies are equal bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def at(*steps: int, name: str = "trouble", **settings: Any) -> Expression:
    """Return a rule that fires at these steps, with a rollback behind it."""
    condition = " or ".join(f"step == {step}" for step in steps)
    rollback = Rollback(**{"steps": 10, **settings})
    return Expression(condition, name=name, keep_firing_for=0, then=rollback)


class Loop:
    """A plain loop.

    Attributes:
        states: copies of everything after so many steps.
    """

    def __init__(
        self,
        *rules: Any,
        optimizer: str = "adamw",
        scaler: bool = False,
        data: torch.Generator | None = None,
        watched: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = optimizers[optimizer](p for p in self.net.parameters() if p.requires_grad)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7) if scaler else None
        self.data = data or torch.Generator().manual_seed(1)
        self.scheduler: Any = None
        self.average: Any = None
        self.step = 0
        self.states: dict[int, Any] = {}
        self.losses: list[float] = []
        self.batches: list[float] = []
        measured = {"activations_every": None, "updates_every": 7, "histograms_every": None}
        settings = {"scaler": self.scaler, **measured, **options}
        self.watch = Watch(self.net, self.optimizer, rules=list(rules), **settings) if watched else None

    @property
    def parts(self) -> list[Any]:
        return [p for p in (self.net, self.optimizer, self.scaler, self.average) if p is not None]

    def once(self, factor: float = 1.0) -> None:
        x = torch.randn(8, 6, generator=self.data)
        self.batches.append(float(x.sum()))
        loss = nn.functional.cross_entropy(self.net(x), (x.sum(1) > 0).long()) * factor
        self.losses.append(float(loss.detach()))
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.watch is not None:
            self.watch.step(loss=loss)
        elif self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        self.states[self.step] = copied(*self.parts)
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.net)

    def run(self, steps: int, factor: Callable[[int], float] = lambda step: 1.0) -> Loop:
        for _ in range(steps):
            self.once(factor(self.step))
        return self

    def same_as(self, step: int, *ignore: str) -> bool:
        """Whether everything is now what it was after so many steps."""
        return equal(self.states[self.step], self.states[step])
