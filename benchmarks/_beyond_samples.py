"""Planted samples: one of 64 is corrupted, and the incident must name it first.

Six kinds of models are trained. Ten times some healthy steps are followed by one in which a sample is spoilt: in turns
its target, its input, and a value that is not finite. An incident must open by itself, and name that sample first;
where none opens that counts as not found.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.rules import Exploding, LossSpike, NonFinite

__all__ = ["rows"]

SIZE, TRAINED, HEALTHY, PLANTED = 64, 300, 20, 10
Batch = tuple[Tensor, Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 32, width: int = 64, length: int = 24) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x, mask=self.mask, is_causal=True)))


class Vit(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places)
        return self.head(x[:, 0])


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(4, 48, num_layers=2, batch_first=True), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Ratings(nn.Module):
    """Two tables and what they say together: a recommender."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(200, 32), nn.Embedding(100, 32)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.users(x[:, 0]), self.items(x[:, 1])], 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 1))


def numbers(shape: Sequence[int]) -> Callable[[], Batch]:
    """Return what draws inputs of a shape, and as targets a number that a model can learn."""

    def draw() -> Batch:
        x = torch.randn(SIZE, *shape)
        return x, x.flatten(1).mean(1, keepdim=True) * 3

    return draw


def images() -> Batch:
    y = torch.randint(0, 4, (SIZE,))
    x = torch.randn(SIZE, 3, 16, 16) * 0.5
    for i, place in enumerate(y.tolist()):
        x[i, :, place * 4 : place * 4 + 4] += 1
    return x, y


def counting() -> Batch:
    start, step = torch.randint(0, 32, (SIZE, 1)), torch.randint(1, 4, (SIZE, 1))
    x = (start + step * torch.arange(25)) % 32
    return x[:, :-1], x[:, 1:]


def ratings() -> Batch:
    x = torch.stack([torch.randint(0, 200, (SIZE,)), torch.randint(0, 100, (SIZE,))], 1)
    return x, torch.sin(x.sum(1, keepdim=True) / 10.0)


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made, fed and judged; of inputs that are numbers, and of targets that are."""

    make: Callable[[], nn.Module]
    draw: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]


KINDS = {
    "MLP": Kind(mlp, numbers((16,)), F.mse_loss),
    "CNN with BatchNorm": Kind(cnn, numbers((3, 16, 16)), F.mse_loss),
    "vision transformer": Kind(Vit, images, F.cross_entropy),
    "GPT": Kind(Gpt, counting, cross_entropy),
    "LSTM": Kind(Lstm, numbers((20, 4)), F.mse_loss),
    "recommender": Kind(Ratings, ratings, F.mse_loss),
}


def corrupt(x: Tensor, y: Tensor, who: int, turn: int) -> None:
    """Spoil one sample, in place, as data go wrong: a target, an input, or a value that is not finite."""
    if turn % 3 == 2 and x.is_floating_point():
        x[who].view(-1)[0] = torch.nan
    elif turn % 3 == 1 and x.is_floating_point():
        x[who] = 30 * torch.randn_like(x[who])
        y[who] = -y[who] if y.is_floating_point() else (y[who] + 2) % 4
    elif y.is_floating_point():
        y[who] += 100
    elif y.dim() == 1:
        y[who] = (y[who] + 2) % 4
    else:
        y[who] = torch.randint(0, 32, y[who].shape)


def step_of(kind: Kind, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, watch: Watch | None) -> float:
    """Take one step; return the processor's seconds."""
    begun = time.process_time()
    optimizer.zero_grad()
    loss = kind.loss(model(batch[0]), batch[1])
    loss.backward()
    if watch is None:
        optimizer.step()
    else:
        watch.step(loss, batch=batch)
    return time.process_time() - begun


def planted(kind: Kind, seed: int) -> Iterator[tuple[bool, float]]:
    """Yield of each spoilt sample whether it was named first, and what its step cost in usual ones."""
    torch.manual_seed(seed)
    trained = kind.make()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
    for _ in range(TRAINED):
        step_of(kind, trained, kind.draw(), optimizer, None)
    for turn in range(PLANTED):
        model = copy.deepcopy(trained)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        rules = [Exploding(z=6, ratio=2, min_samples=16), LossSpike(z=6, spikes=1, min_samples=16), NonFinite()]
        with Watch(model, optimizer, rules=rules, autopsy=True, activations_every=None) as watch:
            usual = [step_of(kind, model, kind.draw(), optimizer, watch) for _ in range(HEALTHY)]
            who = int(torch.randint(0, SIZE, ()))
            x, y = kind.draw()
            corrupt(x, y, who, turn)
            spent = step_of(kind, model, (x, y), optimizer, watch)
            opened = [i.details["samples"] for i in watch.incidents if i.details.get("samples")]
        yield bool(opened) and opened[-1][0]["index"] == who, spent / statistics.median(usual)


def rows(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    right: list[bool] = []
    costs: list[float] = []
    for name, kind in KINDS.items():
        found = list(planted(kind, seed))
        right += [ok for ok, _ in found]
        costs.append(statistics.median(cost for _, cost in found))
        yield f"samples: {name}", f"{sum(ok for ok, _ in found)} of {len(found)}, {costs[-1]:.1f} steps", ""
    share = sum(right) / len(right)
    yield "samples: named first", f"{sum(right)} of {len(right)} ({share:.0%})", "at least 95 %"
    yield "samples: cost of an incident, worst kind", f"{max(costs):.1f} steps", "at most 10"
