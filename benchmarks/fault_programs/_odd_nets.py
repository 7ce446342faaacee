"""Modules of the healthy programs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "AddToken",
    "First",
    "LoRALinear",
    "LastState",
    "MixtureOfExperts",
    "Residual",
    "TiedAutoencoder",
    "Variational",
    "images",
    "normal_nll",
]


def images() -> tuple[nn.Module]:
    """Rows of 784 to images of 28 x 28."""
    return (nn.Unflatten(1, (1, 28, 28)),)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of low rank (Hu et al., "LoRA", arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class Residual(nn.Module):
    """x plus a branch whose last layer starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        nn.init.zeros_(self.branch[2].weight)
        nn.init.zeros_(self.branch[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class MixtureOfExperts(nn.Module):
    """Top-1 routing, scaled by the gate. The last expert is never chosen."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(num_experts)
        )
        with torch.no_grad():
            self.gate.weight[-1] = 0
            self.gate.bias[-1] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.softmax(self.gate(x), -1)
        chosen = gate.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            out = out.index_add(0, rows.nonzero()[:, 0], expert(x[rows]) * gate[rows, i : i + 1])
        return x + out


class AddToken(nn.Module):
    """Put a learned vector before the sequence, and add learned positions."""

    def __init__(self, width: int, length: int = 13) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.positions


class First(nn.Module):
    """The first position of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class LastState(nn.Module):
    """An LSTM's last hidden state; the sequence of its outputs is not used."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.lstm(x)
        return state[-1]


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, code)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x)) @ self.encoder.weight + self.bias


class Variational(nn.Module):
    """Encoder, noise, decoder; returns the reconstruction, mean and log variance side by side."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.code = code
        self.encoder = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, 128), nn.ReLU(), nn.Linear(128, width))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + (torch.randn_like(mean) * (log_variance / 2).exp() if self.training else 0)
        return torch.cat([self.decoder(code), mean, log_variance], -1)


def normal_nll(p: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of N(mean, exp(log_variance)), less its constant; negative once the fit is narrow."""
    mean, log_variance = p[:, :1], p[:, 1:].clamp(-8, 8)
    return 0.5 * (log_variance + (y - mean) ** 2 * (-log_variance).exp()).mean()
