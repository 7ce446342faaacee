"""Gradients within gradients: MAML, a physics-informed net, an implicit layer, per-sample gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .data import batches, digits, generator
from .street import Street, program


def sine_net(width: int = 40) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


@program()
def maml(street: Street):
    """Four sines a step, one inner step each with create_graph, through functional_call."""
    draw = generator()
    model = sine_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            losses = []
            for _ in range(4):
                size, phase = 0.1 + 4.9 * torch.rand((), generator=draw), math.pi * torch.rand((), generator=draw)
                x = 10 * torch.rand(20, 1, generator=draw) - 5
                y = size * torch.sin(x + phase)
                weights = dict(model.named_parameters())
                inner = F.mse_loss(functional_call(model, weights, (x[:10],)), y[:10])
                slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
                fast = {name: w - 0.01 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
                losses.append(F.mse_loss(functional_call(model, fast, (x[10:],)), y[10:]))
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


@program()
def pinn(street: Street):
    """u'' = -pi^2 sin(pi x) by two derivatives of the network; the equation's constant is learnt, too; float64."""
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    model.register_parameter("constant", nn.Parameter(torch.tensor(0.5, dtype=torch.float64)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=50)
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    known = torch.linspace(-0.8, 0.8, 5, dtype=torch.float64)[:, None]
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            x = (2 * torch.rand(32, 1, dtype=torch.float64) - 1).requires_grad_()
            u = model(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
            equation = (bend / 10 + model.constant * torch.sin(math.pi * x)).square().mean()
            fixed = model(ends).square().mean() + F.mse_loss(model(known), torch.sin(math.pi * known))
            loss = equation + 10 * fixed
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            watch.step(loss=loss)
            schedule.step(loss.detach())
            street.note(loss)
    return model, optimizer


class Implicit(nn.Module):
    """A layer that is its own fixed point; its gradient is solved for in a hook on the output."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width, bias=False), nn.Linear(64, width)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.inner.weight, std=0.02)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.inner(z) + self.outer(x)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros(len(x), self.inner.in_features)
            for _ in range(8):
                z = self.cell(z, x)
        z = self.cell(z, x)
        if z.requires_grad:
            start = z.clone().detach().requires_grad_()
            again = self.cell(start, x)

            def solve(grad_output: Tensor) -> Tensor:
                g = grad_output
                for _ in range(8):
                    g = torch.autograd.grad(again, start, g, retain_graph=True)[0] + grad_output
                return g

            z.register_hook(solve)
        return z


@program()
def deq(street: Street):
    """Implicit differentiation: `autograd.grad` inside a backward hook, modules called under no_grad and with grad."""
    images, labels = digits()
    model = nn.Sequential(nn.Flatten(), Implicit(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images, labels, size=32, steps=street.steps):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


@program(saved=False)
def vmap_grad(street: Street):
    """Per-sample gradients by vmap(grad), clipped and noised (differential privacy), written to `.grad` by hand."""
    images, labels = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    names = [name for name, _ in model.named_parameters()]

    def loss_of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    slopes = vmap(grad(loss_of), in_dims=(None, 0, 0))
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images, labels, size=32, steps=street.steps):
            weights = {name: p.detach() for name, p in model.named_parameters()}
            each = slopes(weights, x, y)
            norms = torch.stack([each[name].flatten(1).norm(dim=1) for name in names]).norm(dim=0)
            share = (1.0 / norms).clamp(max=1.0)
            for name, p in model.named_parameters():
                p.grad = torch.einsum("n...,n->...", each[name], share) / len(x) + 1e-3 * torch.randn_like(p)
            with torch.no_grad():
                loss = F.cross_entropy(model(x), y)
            watch.step(loss=loss)
            optimizer.zero_grad()
            street.note(loss)
    return model, optimizer
