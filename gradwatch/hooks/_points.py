"""Hook points: where in a model a hook sits, and what a hook function is told when it fires."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..errors import HookError

if TYPE_CHECKING:
    from ._hook import Hook
    from ._patterns import Resolver
    from ._views import View

__all__ = [
    "ATTENTION_PORTS",
    "GRADIENT_OF",
    "MODULE_PORTS",
    "PAIR_PORTS",
    "PARAMETER_PORTS",
    "PORTS",
    "READ_AT",
    "HookPoint",
    "Point",
    "RawCall",
]

MODULE_PORTS = ("input", "output", "grad_output", "grad_input")
PARAMETER_PORTS = ("grad", "accumulated_grad")
PORTS = MODULE_PORTS + PARAMETER_PORTS
ATTENTION_PORTS = ("q", "k", "v", "scores", "peak", "pattern", "z", "result")
"""Of modules that attend, `result` of the projection that adds their heads up; see `_attention`. `peak` is the largest
score of each head, (batch, heads), told without keeping the scores; it can be read only."""
PAIR_PORTS = ("scores", "pattern")
"""Those with a number for each pair of positions: (batch, heads, queries, keys)."""
GRADIENT_OF = {"output": "grad_output", "input": "grad_at_input", **{p: f"grad_at_{p}" for p in ATTENTION_PORTS}}
"""Port -> where the gradient of the tensor there is shown: the total over all its consumers."""
READ_AT = {gradient: port for port, gradient in GRADIENT_OF.items()}
_AT_MODULES = frozenset(MODULE_PORTS)
BACKWARD_PORTS = frozenset({"grad_input", *READ_AT, *PARAMETER_PORTS})


class RawCall(NamedTuple):
    """Torch's own arguments of one call, for hooks with `raw=True`; `output` is None at the port `input`.

    At `grad_input`, `args` is torch's `grad_input` tuple and `output` its `grad_output` tuple.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class HookPoint(str):
    """A place where hooks can sit. It is its own name, as a string: `PATH:PORT`, or the alias it was found under.

    Attributes:
        path: of the module or parameter.
        port: one of `PORTS`, or of attention's: q, k, v, scores, peak, pattern, z, result.
        target: the module or parameter itself.
        aliases: other names of the same tensor.
        other_names: where a shared (tied) module or parameter appears elsewhere in the model.
        available: whether the model can offer it; if not, `reason` says why.
        view: how an alias shows the tensor (split into heads), or None.
        leaf: the one leaf that an alias means, or None for all.
        heads: how many heads a projection adds up, for the port `result`.
        writing: what a replacement does: `"replace"`, `"in_place"` (the tensor is shared with a residual branch, so
            every consumer must see it) or `"refuse"` (the model does not use the tensor any more).
    """

    path: str
    port: str
    target: Any
    named_by: Resolver | None = None
    other_names: tuple[str, ...] = ()
    reason: str = ""
    view: View | None = None
    leaf: str | None = None
    writing: str = "replace"
    heads: int | None = None

    def __new__(cls, path: str, port: str, target: Any = None, *, name: str | None = None) -> HookPoint:
        self = super().__new__(cls, f"{path}:{port}" if name is None else name)
        self.path, self.port, self.target = path, port, target
        return self

    @property
    def aliases(self) -> tuple[str, ...]:
        return () if self.named_by is None else self.named_by.aliases_of(self.path, self.port)

    @property
    def available(self) -> bool:
        return not self.reason

    @property
    def name(self) -> str:
        """The name as a plain string."""
        return str.__str__(self)

    @property
    def place(self) -> str:
        """`PATH:PORT`, also where the point was found under an alias."""
        return f"{self.path}:{self.port}"

    @property
    def is_parameter(self) -> bool:
        return self.port in PARAMETER_PORTS

    @property
    def module(self) -> nn.Module | None:
        """The module, for points of modules."""
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def layer(self) -> int | None:
        """The first number in the name: 4 for `blocks.4.attn:output`."""
        return layer_of(self)

    @property
    def site(self) -> tuple[str, int]:
        """What tells where torch is to call: a kind, and whose."""
        if self.port in _AT_MODULES:
            return "module", id(self.target)
        port = READ_AT.get(self.port, self.port)
        if port not in ATTENTION_PORTS:
            return "parameter" if self.is_parameter else "module", id(self.target)
        # torch's own attention has its output projection within; elsewhere that is a module of its own.
        projected = port == "result" and not isinstance(self.target, nn.MultiheadAttention)
        return "result" if projected else "attention", id(self.target)

    def unbound(self) -> HookPoint:
        """Return the point as names alone, which keeps no model: what a hook that has been taken off remembers."""
        found = HookPoint(self.path, self.port, name=self.name)
        found.other_names, found.leaf, found.writing = self.other_names, self.leaf, self.writing
        return found

    def __reduce__(self) -> Any:
        return (str, (self.name,))


def layer_of(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?=[.:]|$)", name)
    return int(found.group(1)) if found else None


class Point:
    """What a hook function is told: where and when it fires. A fresh one each time, safe to keep.

    Attributes:
        call: 0, 1, ... when the module runs more than once in one forward pass of the model.
        step: forward passes of the model before this one, or what `HookManager.step` was set to.
        is_recompute: activation checkpointing runs the forward again, within backward.
        leaf: which tensor of a nested input or output: `""` for a bare tensor, else as `1.0` or `logits`.
        hook: the `Hook` that fires.
    """

    __slots__ = ("call", "hook", "is_recompute", "leaf", "spot", "step")

    def __init__(self, spot: HookPoint, hook: Hook, call: int, step: int, is_recompute: bool, leaf: str) -> None:
        self.spot = spot
        self.hook = hook
        self.call = call
        self.step = step
        self.is_recompute = is_recompute
        self.leaf = leaf

    @property
    def name(self) -> str:
        """`PATH:PORT`, or the alias that the hook was added under."""
        return self.spot.name

    @property
    def path(self) -> str:
        return self.spot.path

    @property
    def port(self) -> str:
        return self.spot.port

    @property
    def module(self) -> Any:
        """The module; for ports of parameters, the parameter."""
        return self.spot.target

    @property
    def phase(self) -> str:
        """`"forward"` or `"backward"`."""
        return "backward" if self.spot.port in BACKWARD_PORTS else "forward"

    @property
    def layer(self) -> int | None:
        """The first number in the name: 4 for `blocks.4.attn:output`."""
        return layer_of(self.spot)

    def error(self, cause: BaseException) -> HookError:
        return HookError(self.hook.id, self.name, self.phase, cause)

    def __reduce__(self) -> Any:
        place = (self.path, self.port, self.name, self.call, self.step, self.is_recompute, self.leaf)
        return _point_again, place

    def __repr__(self) -> str:
        where = f"{self.name}[{self.leaf}]" if self.leaf else self.name
        return f"Point({where!r}, call={self.call}, step={self.step}{', recompute' if self.is_recompute else ''})"


def _point_again(*place: Any) -> Point:
    """Return a point that has been in another process: it says where and when, and knows neither module nor hook."""
    path, port, name, call, step, is_recompute, leaf = place
    return Point(HookPoint(path, port, name=name), None, call, step, is_recompute, leaf)  # type: ignore[arg-type]


def check_replacement(new: Any, old: Tensor) -> Tensor:
    """Return `new` if it can stand in for `old`: a tensor of the same shape, dtype and device.

    Raises:
        TypeError: it is no tensor. (A function that only looks must return None: torch would take `False` as output.)
        ValueError: shape, dtype or device differ.
    """
    if not isinstance(new, Tensor):
        raise TypeError(f"a hook function returns None or a tensor. Got {type(new).__name__}.")
    for what in ("shape", "dtype", "device"):
        if getattr(new, what) != getattr(old, what):
            given, wanted = getattr(new, what), getattr(old, what)
            given, wanted = (tuple(given), tuple(wanted)) if what == "shape" else (given, wanted)
            raise ValueError(f"a replacement keeps the {what}: {wanted}. Got {given}.")
    return new
