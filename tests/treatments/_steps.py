"""What the tests of treatments share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradwatch.requests import Request
from gradwatch.stats import Gradients


@dataclass
class Step:
    """A context that keeps what was asked of it."""

    step: int = 0
    optimizers: tuple = ()
    rule: str = ""
    trigger: Any = True
    limit: Any = None
    findings: tuple = ()
    can_read: bool = True
    vetoes: list = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def veto(self, flag: Any = True, *, reason: str = "") -> None:
        self.vetoes.append((flag, reason))

    def request(self, request: Request) -> None:
        self.requests.append(request)


def gradients(*tensors: Any, params: Any = None, grad_scale: float = 1.0, paths: Any = None) -> Gradients:
    """Return `Gradients` of parameters "a", "b", ... whose .grad are these tensors."""
    tensors = [torch.as_tensor(t) for t in tensors]
    values = [torch.ones_like(t) for t in tensors] if params is None else params
    named = []
    for path, tensor, value in zip(paths or "abcdefgh", tensors, values, strict=False):
        param = nn.Parameter(torch.as_tensor(value).clone())
        param.grad = tensor.clone()
        named.append((path, param))
    return Gradients.collect(named, grad_scale=grad_scale)
