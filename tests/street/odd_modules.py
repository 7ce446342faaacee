"""Modules of odd forms: shared, recursive, scripted, hooked, complex, nested, with parts and buffers of any kind."""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches, digits, generator
from .street import Street, program


def train(street: Street, model: nn.Module, loss_of: Any, size: int = 16, lr: float = 1e-2, **given: Any):
    """The plainest of loops."""
    images, labels = digits()
    optimizer = given.get("optimizer", torch.optim.Adam)(model.parameters(), lr=lr)
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images.flatten(1), labels, size=size, steps=street.steps):
            optimizer.zero_grad(set_to_none=given.get("set_to_none", True))
            loss = loss_of(model, x, y)
            loss.backward()
            watch.step(loss=loss, batch=given.get("batch", lambda x, y: (x, y))(x, y))
            street.note(loss)
    return model, optimizer


Answer = namedtuple("Answer", ["scores", "hidden", "nothing"])


@dataclass
class Told:
    answer: Answer
    rest: dict[str, Any] = field(default_factory=dict)
    late: Any = field(init=False)


class ManyOutputs(nn.Module):
    """A dataclass that holds a named tuple that holds lists, an expanded scalar, a view, None; a field never set."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList([nn.Linear(64, 16) for _ in range(3)])
        self.head = nn.Linear(48, 10)
        self.level = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Told:
        hidden = [layer(x).relu() for layer in self.enter]
        scores = self.head(torch.cat(hidden, -1)) + self.level.expand(len(x), 10)
        return Told(
            Answer(scores, hidden, None), {"level": self.level.expand(1000), "column": scores[:, 0], 3: {x.shape}}
        )


@program()
def many_outputs(street: Street):
    return train(street, ManyOutputs(), lambda model, x, y: F.cross_entropy(model(x).answer.scores, y))


class InPlace(nn.Module):
    """Views of outputs that are changed in place, a buffer written in forward, an output that is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.nothing, self.drop = nn.Identity(), nn.Dropout(0.2, inplace=True)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.ones(32, dtype=torch.bool))
        self.register_buffer("soft", torch.ones(32, dtype=torch.bfloat16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        hidden = self.first(x.view(len(x), 1, 64))
        hidden.squeeze_(1)
        hidden[:, ::2].mul_(self.soft[::2])
        hidden = self.nothing(self.drop(hidden * 1.5))
        more = self.second(hidden)
        more += hidden
        more.masked_fill_(~self.mask, 0.0).clamp_(-3, 3)
        return self.head(more)


@program()
def in_place(street: Street):
    return train(street, InPlace(), lambda model, x, y: F.cross_entropy(model(x), y))


class Tree(nn.Module):
    """A module that calls itself, and holds one child under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.join, self.head = nn.Linear(4, 24), nn.Linear(48, 24), nn.Linear(24, 10)
        self.same = self.join
        self.tied = nn.Linear(24, 24, bias=False)
        self.tied.weight = nn.Parameter(self.join.weight[:, :24].detach().clone())
        self.again = nn.Linear(24, 24, bias=False)
        self.again.weight = self.tied.weight

    def fold(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            return self.enter(x).tanh()
        left, right = x.chunk(2, 1)
        which = self.join if x.shape[1] > 16 else self.same
        return which(torch.cat([self.fold(left), self.fold(right)], -1)).tanh()

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth:
            return self(x.flip(1), depth=depth - 1)
        return self.head(self.again(self.tied(self.fold(x))))


@program()
def recursive_and_shared(street: Street):
    return train(street, Tree(), lambda model, x, y: F.cross_entropy(model(x), y))


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through; saves nothing, marks an output as not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = x.round()
        kept = rounded != 0
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return rounded, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Tensor | None:
        return grad


class Reverse(torch.autograd.Function):
    """Turns gradients round (domain-adversarial training), changing its input in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.share * grad, None


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.domain = nn.Linear(64, 32), nn.Linear(32, 10), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, _ = Straight.apply(4 * self.trunk(x).tanh())
        return self.head(codes / 4), self.domain(Reverse.apply(codes, 0.1))


@program()
def custom_functions(street: Street):
    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores, domain = model(x)
        return F.cross_entropy(scores, y) + F.binary_cross_entropy_with_logits(domain[:, 0], (y > 4).float())

    return train(street, Adversarial(), loss_of)


class Spectral(nn.Module):
    """Complex weights, a complex output inside, a real one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(33, dtype=torch.complex64) / 8)
        self.mix = nn.Linear(33, 16, dtype=torch.complex64)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.fft.rfft(x) * self.filter.conj()).abs())


@program()
def complex_weights(street: Street):
    # SGD, since torch's Adam can't take a gradient with its conjugate bit set.
    return train(street, Spectral(), lambda model, x, y: F.cross_entropy(model(x), y), optimizer=torch.optim.SGD)


class Ragged(nn.Module):
    """A nested tensor goes through modules; what comes out is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.enter(rows)
        padded = torch.nested.to_padded_tensor(hidden, 0.0)
        return self.head(padded.relu().mean(1))


@program()
def nested_tensors(street: Street):
    draw = generator()

    def rows(x: Tensor) -> Tensor:
        sizes = torch.randint(4, 9, (len(x),), generator=draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.nested.nested_tensor([r.view(8, 8)[:n] for r, n in zip(x, sizes, strict=True)])

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(rows(x)), y)

    return train(street, Ragged(), loss_of, batch=lambda x, y: {"rows": rows(x), "labels": y})


class Lists(nn.Module):
    """Parameters in lists and dicts, an odd name, some of no element, of one, None, or without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(64, 16) / 8), nn.Parameter(torch.randn(16, 10) / 4)])
        self.more = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(10)), "of layer": nn.Parameter(torch.ones(1))})
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.fixed = nn.Parameter(torch.ones(10, dtype=torch.int8), requires_grad=False)
        self.register_parameter("bias", None)
        self.unused = nn.Parameter(torch.ones(3))
        self.wrapped = [nn.Linear(10, 10)]  # not a child

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.layers[0]).relu() @ self.layers[1]
        return (hidden + self.more["weight"]) * self.more["of layer"] * self.fixed + self.empty.sum()


@program()
def parameter_lists(street: Street):
    return train(street, Lists(), lambda model, x, y: F.cross_entropy(model(x), y), set_to_none=False)


@program()
def scripted(street: Street):
    """A part compiled by TorchScript, one that is traced, one frozen in its class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.script(nn.Sequential(nn.Linear(64, 16), nn.ReLU()))
        traced = torch.jit.trace(nn.Linear(16, 16), torch.randn(2, 16))
    model = nn.Sequential(part, traced, nn.Linear(16, 10))
    return train(street, model, lambda model, x, y: F.cross_entropy(model(x), y))


@program()
def data_parallel(street: Street):
    """DataParallel without a device is the module itself, under one more name; a lazy layer inside."""
    model = nn.DataParallel(nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10)))
    model(torch.randn(4, 64))
    return train(street, model, lambda model, x, y: F.cross_entropy(model(x), y))


@program()
def users_hooks(street: Street):
    """The user's own hooks of every kind: one replaces an output, one scales gradients, one raises and is caught."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    calls = [0]

    def halve(p: Tensor) -> None:
        p.grad.mul_(0.5)

    def raises_at_times(module: nn.Module, args: Any, out: Tensor) -> None:
        calls[0] += 1
        if calls[0] % 7 == 0:
            raise ValueError("not this batch")

    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[1].register_forward_hook(lambda module, args, kwargs, out: out * 0.9, with_kwargs=True)
    model[2].register_full_backward_hook(lambda module, inside, outside: (inside[0] * 0.5,))
    model[2].register_full_backward_pre_hook(lambda module, outside: (outside[0] * 2,))
    model[0].weight.register_hook(lambda grad: grad.clamp(-1, 1))
    model[0].bias.register_post_accumulate_grad_hook(halve)
    model[2].register_forward_hook(raises_at_times)

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        try:
            scores = model(x)
        except ValueError:
            scores = model(x)
        return F.cross_entropy(scores, y)

    return train(street, model, loss_of, lr=3e-3)
