"""Optimizers that a veto must hold for: torch's, those of libraries that are installed, and kinds of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Case", "cases"]


class Case(NamedTuple):
    """One optimizer, and how a loop steps it.

    Attributes:
        name: as it stands in the table.
        make: of a model.
        how: `step`, `closure` (the step runs forward and backward) or `two calls` (first_step, second_step).
        embedding: the model is an embedding with sparse gradients.
    """

    name: str
    make: Callable[[nn.Module], Any]
    how: str = "step"
    embedding: bool = False


def cases(device: torch.device) -> Iterator[Case]:
    """Yield every optimizer that can be had here."""
    yield from _of_torch(device)
    yield from _of_libraries()
    yield from _own()


_FLAGS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": ({}, {"amsgrad": True}, {"weight_decay": 0.1}),
    "AdamW": ({}, {"amsgrad": True}),
    "RMSprop": ({}, {"centered": True, "momentum": 0.9}),
    "Adagrad": ({}, {"weight_decay": 0.1}),
}
_NAMES = [
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


def _of_torch(device: torch.device) -> Iterator[Case]:
    for name in _NAMES:
        cls = getattr(torch.optim, name, None)
        if cls is None:
            continue
        for settings in _FLAGS.get(name, ({},)):
            for way in _ways(cls, settings, device):
                yield Case(_named(f"torch {name}", {**settings, **way}), _maker(cls, {"lr": 1e-2, **settings, **way}))
    if hasattr(torch.optim, "Muon"):
        yield Case("torch Muon", lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-2))
    yield Case("torch SparseAdam", lambda m: torch.optim.SparseAdam(list(m.parameters()), lr=1e-2), embedding=True)
    for search in (None, "strong_wolfe"):
        make = _maker(torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4, "line_search_fn": search})
        yield Case(f"torch LBFGS {search or ''}".strip(), make, "closure")


def _ways(cls: Any, settings: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the implementations that a class has here: torch says no to the others."""
    for way in ({"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}):
        if "capturable" in way and device.type == "cpu":
            continue
        try:
            cls([nn.Parameter(torch.zeros(1, device=device))], lr=1e-2, **settings, **way)
        except Exception:
            continue
        yield way


def _maker(cls: Any, settings: dict[str, Any]) -> Callable[[nn.Module], Any]:
    return lambda model: cls(model.parameters(), **settings)


def _named(name: str, settings: dict[str, Any]) -> str:
    words = [k if v is True else "for loop" if k == "foreach" else f"{k} {v:g}" for k, v in settings.items()]
    return f"{name} {', '.join(words)}".strip()


_LIBRARIES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "transformers.optimization": (("Adafactor", {}), ("Adafactor", {"lr": 1e-2, "relative_step": False, "beta1": 0.9})),
    "schedulefree": (("AdamWScheduleFree", {}), ("SGDScheduleFree", {"lr": 0.1}), ("RAdamScheduleFree", {})),
    "prodigyopt": (("Prodigy", {}),),
    "lion_pytorch": (("Lion", {}),),
    "dadaptation": (("DAdaptAdam", {}), ("DAdaptSGD", {}), ("DAdaptAdaGrad", {})),
    "torchao.optim": (("AdamW8bit", {}), ("AdamW4bit", {}), ("AdamWFp8", {})),
    "bitsandbytes.optim": (("AdamW8bit", {}), ("Lion8bit", {}), ("AdamW", {}), ("PagedAdamW", {})),
}


def _of_libraries() -> Iterator[Case]:
    for module, classes in _LIBRARIES.items():
        try:
            found = import_module(module)
        except Exception:
            continue
        library = module.partition(".")[0]
        for name, settings in classes:
            if hasattr(found, name):
                make = partial(_lenient, getattr(found, name), settings)
                yield Case(_named(f"{library} {name}", settings), make)
    yield from _wrapped_schedule_free()
    yield from _of_pytorch_optimizer()


def _wrapped_schedule_free() -> Iterator[Case]:
    try:
        wrapper = import_module("schedulefree").ScheduleFreeWrapper
    except Exception:
        return

    def make(model: nn.Module) -> Any:
        optimizer = wrapper(torch.optim.SGD(model.parameters(), lr=0.1), momentum=0.9)
        optimizer.train()
        return optimizer

    yield Case("schedulefree ScheduleFreeWrapper(SGD)", make)


_NEEDS_CLOSURE = ("lbfgs",)


def _of_pytorch_optimizer() -> Iterator[Case]:
    try:
        library = import_module("pytorch_optimizer")
        names = sorted(library.get_supported_optimizers())
    except Exception:
        return
    for name in names:
        cls = library.load_optimizer(name)
        how = "closure" if name in _NEEDS_CLOSURE else "step"
        yield Case(f"pytorch_optimizer {cls.__name__}", partial(_lenient, cls, {}), how)
    for name in ("Lookahead", "TRAC", "OrthoGrad", "ScheduleFreeWrapper"):
        wrapper = getattr(library, name, None)
        if wrapper is not None:
            yield Case(f"pytorch_optimizer {name}(AdamW)", partial(_wrapped, wrapper))


def _lenient(cls: Any, settings: dict[str, Any], model: nn.Module) -> Any:
    parameters: Any = list(model.parameters())
    if "uon" in cls.__name__ or cls.__name__ == "AdaGO":
        parameters = [
            {"params": [p for p in parameters if (p.dim() == 2) == two], "use_muon": two} for two in (True, False)
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = cls(parameters, **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def _wrapped(wrapper: Any, model: nn.Module) -> Any:
    optimizer = wrapper(torch.optim.AdamW(model.parameters(), lr=1e-2))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


class MuonLike(torch.optim.Optimizer):
    """Takes a missing gradient for zeros, and moves by momentum and decay all the same."""

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["decay"]).add_(buffer, alpha=-group["lr"])


class Unseen(torch.optim.Optimizer):
    """Writes to `.data`, which moves no version counter, counts in an attribute, and draws noise."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.num_steps, self.log = 0, []

    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        self.log.append(self.num_steps)
        for group in self.param_groups:
            for p in group["params"]:
                noise = torch.randn_like(p.data) * 1e-4
                grad = 0.0 if p.grad is None else p.grad
                p.data = p.data - group["lr"] * (grad + noise) / self.num_steps**0.5


class TwoPass(torch.optim.Optimizer):
    """Runs its closure twice, the second time at weights that are worse; can't do without gradients."""

    def __init__(self, params: Any, lr: float = 0.05, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.norm() for p in self._params() if p.grad is not None]).norm()
        for p in self._params():
            if p.grad is not None:
                self.state[p]["shift"] = p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12))
                p.add_(self.state[p]["shift"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in self._params():
            p.sub_(self.state[p]["shift"]).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step(zero_grad=True)
        loss = closure()
        self.second_step()
        return loss


class SharpnessAware(torch.optim.Optimizer):
    """Two passes around an optimizer of another class, held under a name of its own."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **settings: Any) -> None:
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = 0.05 / (torch.stack([p.grad.norm() for p in params]).norm() + 1e-12)
        for p in params:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class SlowAndFast:
    """A Lookahead that is no torch optimizer: it pulls the weights back every third step, when the other is done."""

    def __init__(self, fast: torch.optim.Optimizer, every: int = 3) -> None:
        self.fast, self.every, self.count = fast, every, 0
        self.slow = [p.detach().clone() for group in fast.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.fast.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.fast.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.fast.step()
        self.count += 1
        if self.count % self.every == 0:
            params = (p for group in self.param_groups for p in group["params"])
            for slow, p in zip(self.slow, params, strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class Several:
    """One optimizer for weights, another for biases, stepped as one."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = [
            torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.05, momentum=0.9),
            MuonLike([p for p in model.parameters() if p.dim() == 1]),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.inner:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.inner:
            optimizer.step()


class Derived(torch.optim.Adam):
    """Decays all weights after Adam's own step, with or without gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 1e-3)
        return loss


class CountsForAll(torch.optim.Optimizer):
    """Its rate falls with the steps that all of its kind have taken."""

    num_steps = 0

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})
        CountsForAll.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        CountsForAll.num_steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / CountsForAll.num_steps)


def _with_hook(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    params = list(model.parameters())
    optimizer.register_step_post_hook(lambda *_: [p.data.mul_(0.999) for p in params])
    return optimizer


def _overridden(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inner, params = optimizer.step, list(model.parameters())

    def step(closure: Any = None) -> Any:
        loss = inner(closure)
        with torch.no_grad():
            torch._foreach_mul_(params, 0.999)
        return loss

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def _own() -> Iterator[Case]:
    yield Case("Muon-like: None is zero", lambda m: MuonLike(m.parameters()))
    yield Case("writes to .data, counts, draws noise", lambda m: Unseen(m.parameters()))
    yield Case("two passes, by a closure", lambda m: TwoPass(m.parameters()), "closure")
    yield Case("two passes, by two calls", lambda m: TwoPass(m.parameters()), "two calls")
    for base, settings in ((torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), (MuonLike, {"lr": 0.02})):
        name, make = base.__name__, lambda m, b=base, s=settings: SharpnessAware(m.parameters(), b, **s)
        yield Case(f"SAM({name}), by two calls", make, "two calls")
        yield Case(f"SAM({name}), by a closure", make, "second closure")
    yield Case("Lookahead-like, no torch optimizer", lambda m: SlowAndFast(torch.optim.Adam(m.parameters(), lr=1e-2)))
    yield Case("two optimizers stepped as one", Several)
    yield Case("a subclass of Adam that decays", lambda m: Derived(m.parameters(), lr=1e-2))
    yield Case("counts on its class", lambda m: CountsForAll(m.parameters()))
    yield Case("SGD with a hook that decays", _with_hook)
    yield Case("Adam, its step replaced", _overridden)
