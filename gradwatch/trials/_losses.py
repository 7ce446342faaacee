"""Calls of torch's loss functions while a trial runs: seen as the user makes them, and changed on their way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["LossCall", "LossCalls", "Rewrite"]

NAMES = (
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "poisson_nll_loss",
    "kl_div",
)
# Not by the functions themselves: some of those that are called have no hash.
_FUNCTIONS = {id(getattr(functional, name)): name for name in NAMES}


@dataclass
class LossCall:
    """One call of a loss function.

    Attributes:
        name: of the function in `torch.nn.functional`.
        arguments: by name, `input` and `target` among them.
        value: what it gave.
    """

    name: str
    arguments: dict[str, Any]
    value: Any = None

    @property
    def outputs(self) -> Tensor:
        found: Tensor = self.arguments["input"]
        return found

    @property
    def targets(self) -> Tensor:
        found: Tensor = self.arguments["target"]
        return found

    @property
    def reduction(self) -> str:
        return str(self.arguments.get("reduction", "mean"))

    def run(self) -> Any:
        """Make it anew, of its arguments as they stand."""
        return getattr(functional, self.name)(**self.arguments)


Rewrite = Callable[[LossCall], LossCall]


@dataclass
class LossCalls(TorchFunctionMode):
    """While it is on, keeps the calls of loss functions as they were made, and makes them as they are to be.

    Attributes:
        rewrites: change a call.
        copies: id of a tensor -> what takes its place in whatever is called: a penalty may hold parameters themselves,
            which no module hands to it.
        calls: as the user made them, with the values as they came to be.
    """

    rewrites: list[Rewrite] = field(default_factory=list)
    copies: Mapping[int, Any] = field(default_factory=dict)
    calls: list[LossCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple([self._here(value) for value in args])
        kwargs = {key: self._here(value) for key, value in kwargs.items()} if kwargs else {}
        name = _FUNCTIONS.get(id(func))
        if name is None:
            return func(*args, **kwargs)
        call = LossCall(name, dict(inspect.signature(func).bind(*args, **kwargs).arguments))
        if not isinstance(call.arguments.get("input"), Tensor) or not isinstance(call.arguments.get("target"), Tensor):
            return func(*args, **kwargs)
        self.calls.append(call)
        made = call
        for rewrite in self.rewrites:
            made = rewrite(LossCall(made.name, dict(made.arguments)))
        call.value = func(*args, **kwargs) if made is call else made.run()
        return call.value

    def _here(self, value: Any) -> Any:
        found = self.copies.get(id(value))
        if found is not None:
            return found
        return type(value)(map(self._here, value)) if type(value) in (list, tuple) else value
