"""Small models of the usual kinds, each with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PROBLEMS", "Block", "Problem", "problem"]


class Problem(NamedTuple):
    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor


class Block(nn.Module):
    """A block of a GPT with one matrix for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, 4, d // 4).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(d, 2))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Embedding and head are one tensor; places come from a table that is looked up once for all samples."""

    def __init__(self, vocabulary: int = 20, width: int = 16, length: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks, self.norm = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])))))


class Vit(nn.Module):
    """torch's own encoder, whose attention works place first; a class token and places as plain parameters."""

    def __init__(self, width: int = 16, *, batch_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        layer = nn.TransformerEncoderLayer(width, 4, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(width, 10), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.tokens, self.layers = nn.Embedding(20, 8), kind(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(x))[0][:, -1])


class Scaled(nn.Module):
    """Parameters that are no layer's: a gain, an offset, a matrix for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.gain, self.offset = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.heads, self.scale = nn.Parameter(torch.randn(2, 4, 4)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) * self.gain - self.offset) * self.scale
        x = torch.matmul(x.view(-1, 2, 1, 4), self.heads.expand(len(x), -1, -1, -1)).reshape(len(x), 8)
        return self.last(x.tanh())


def tokens_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _images(model: nn.Module, size: int = 12, side: int = 8) -> Problem:
    return Problem(model, F.cross_entropy, torch.randn(size, 3, side, side), torch.randint(10, (size,)))


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _mlp() -> Problem:
    model = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 3))
    return Problem(model, F.mse_loss, torch.randn(12, 6), torch.randn(12, 3))


def _series() -> Problem:
    model = nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.Tanh(), nn.Conv1d(4, 1, 2), nn.Flatten())
    return Problem(model, F.huber_loss, torch.randn(12, 2, 9), torch.randn(12, 4))


def _text(model: nn.Module, classes: int, size: int = 12) -> Problem:
    return Problem(model, F.cross_entropy, torch.randint(20, (size, 6)), torch.randint(classes, (size,)))


def _gpt(size: int = 12) -> Problem:
    return Problem(Gpt(), tokens_loss, torch.randint(20, (size, 8)), torch.randint(20, (size, 8)))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": _mlp,
    "cnn": lambda: _images(_cnn()),
    "series": _series,
    "gpt": _gpt,
    "gpt-as-many-samples-as-places": lambda: _gpt(8),
    "vit": lambda: _images(Vit()),
    "vit-place-first": lambda: _images(Vit(batch_first=False)),
    "vit-as-many-samples-as-places": lambda: _images(Vit(batch_first=False), size=5),
    "lstm": lambda: _text(Recurrent(nn.LSTM), 5),
    "gru": lambda: _text(Recurrent(nn.GRU), 5),
    "bag": lambda: _text(nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 5)), 5),
    "parameters-of-no-layer": lambda: Problem(Scaled(), F.mse_loss, torch.randn(12, 6), torch.randn(12, 3)),
}


def problem(name: str) -> Problem:
    torch.manual_seed(0)
    return PROBLEMS[name]()
