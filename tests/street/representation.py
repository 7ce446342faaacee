"""Representations: contrastive pairs, distillation, BYOL with an averaged teacher."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches, digits
from .street import Street, program


def encoder(out: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, out))


def blurred(x: Tensor) -> Tensor:
    return x + 0.15 * torch.randn_like(x)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.label = encoder(), nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 32))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pictures, words = F.normalize(self.image(x), dim=-1), F.normalize(self.label(y), dim=-1)
        return self.scale.exp() * pictures @ words.T


@program()
def contrastive(street: Street):
    """Pictures and their names, pulled together both ways; a learnt temperature, clamped in place after each step."""
    images, labels = digits()
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images, labels, size=32, steps=street.steps):
            scores = model(blurred(x), y)
            same = (y[:, None] == y).float()
            same = same / same.sum(1, keepdim=True)
            loss = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch={"pixel_values": x, "labels": y}, outputs={"scores": scores})
            with torch.no_grad():
                model.scale.clamp_(0, 4.6)
            street.note(loss)
    return model, optimizer


@program()
def distillation(street: Street):
    """A trained teacher in eval, read through the user's own forward hook; softened scores and features."""
    images, labels = digits()
    teacher, student = encoder(10), nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    bridge = nn.Linear(16, 64)
    warm = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for x, y in batches(images, labels, size=64, steps=40, seed=1):
        warm.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        warm.step()
    teacher.eval().requires_grad_(False)
    features: dict[str, Tensor] = {}
    handles = [
        teacher[3].register_forward_hook(lambda m, args, out: features.__setitem__("teacher", out)),
        student[2].register_forward_hook(lambda m, args, out: features.__setitem__("student", out)),
    ]
    both = nn.ModuleDict({"student": student, "bridge": bridge})
    optimizer = torch.optim.Adam(both.parameters(), lr=3e-3)
    with street.watch(both, optimizer) as watch:
        for x, y in batches(images, labels, size=64, steps=street.steps):
            with torch.no_grad():
                wanted = (teacher(x) / 4).softmax(-1)
            scores = student(x)
            soft = 16 * F.kl_div((scores / 4).log_softmax(-1), wanted, reduction="batchmean")
            like = F.mse_loss(bridge(features["student"]), features["teacher"])
            loss = F.cross_entropy(scores, y) + soft + 0.1 * like
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    features.clear()
    handles[0].remove()  # the student's stays, as in many a script: it must be there afterwards
    return teacher, both, optimizer


class BYOL(nn.Module):
    """The teacher is a submodule that no optimizer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.online = encoder()
        self.predictor = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32))
        self.teacher = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        guessed = F.normalize(self.predictor(self.online(one)), dim=-1)
        with torch.no_grad():
            wanted = F.normalize(self.teacher(other), dim=-1)
        return 2 - 2 * (guessed * wanted).sum(-1).mean()

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.online.parameters(), strict=True):
            slow.data = 0.99 * slow.data + 0.01 * fast.data


@program(steps=55)
def byol(street: Street):
    """Two views, a stopped gradient, and a teacher whose `.data` is replaced at every step."""
    images, _ = digits()
    model = BYOL()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    with street.watch(model, optimizer) as watch:
        for (x,) in batches(images, size=64, steps=street.steps):
            one, other = blurred(x), blurred(x)
            loss = model(one, other) + model(other, one)
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            model.follow()
            street.note(loss)
    return model, optimizer
