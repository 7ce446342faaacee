"""A small training, its single-process float64 reference by arithmetic of its own, and the comparison of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.records import StepRecord
from gradwatch.stats import exponent_histograms

EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "replicas_every": 1}
STEPS, ROWS = 6, 8


class Net(nn.Module):
    """Four layers; `tied` shares one weight between two, `idle` adds a layer that no loss uses."""

    def __init__(self, *, tied: bool = False, idle: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(10, 16)
        self.body = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 1)
        if tied:
            self.body[1].weight = self.body[0].weight
        self.idle = nn.Linear(16, 4) if idle else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.body:
            x = torch.relu(layer(x))
        return self.last(x)


def batches(world: int, steps: int = STEPS, micro: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    """Return (x, y) of all ranks for each micro-batch of each step; rank r has rows r*ROWS to (r+1)*ROWS."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for _ in range(steps):
        xs = [torch.randn(world * ROWS, 10, generator=generator) for _ in range(micro)]
        found.append([(x, torch.sin(x.sum(1, keepdim=True))) for x in xs])
    return found


def mine(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    x, y = pair
    return x[rank * ROWS : (rank + 1) * ROWS], y[rank * ROWS : (rank + 1) * ROWS]


def loss_of(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return (model(pair[0]) - pair[1]).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@dataclass
class Expected:
    """What a step should show."""

    norms: dict[str, float]
    global_norm: float
    global_norm_after: float
    loss: float
    histograms: dict[str, Tensor]
    ratios: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


def train_in_float64(
    net: nn.Module,
    data: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    max_norm: float | None = None,
    bad: Sequence[int] = (),
    spikes: dict[int, float] | None = None,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor] = loss_of,
) -> tuple[nn.Module, list[Expected]]:
    """Train a copy in float64 in one process over the whole batches, and return it with what each step should show.

    Args:
        max_norm: clip to this global norm.
        bad: steps at which a part of the batch is not finite, and which are to be dropped.
        spikes: step -> what the whole loss is multiplied by.
    """
    model = copy.deepcopy(net).double()
    stepper = optimizer(model)
    found = []
    for step, parts in enumerate(data):
        stepper.zero_grad()
        total = 0.0
        for x, y in parts:
            value = loss(model, (x.double(), y.double())) * (spikes or {}).get(step, 1.0)
            (value / len(parts)).backward()
            total += float(value.detach()) / len(parts)
        named = {n: p for n, p in model.named_parameters() if p.grad is not None}
        norms = {n: float(p.grad.norm()) for n, p in named.items()}
        whole = math.sqrt(sum(v * v for v in norms.values()))
        counts = exponent_histograms([p.grad.float() for p in named.values()])
        expected = Expected(norms, whole, whole, total, dict(zip(named, counts, strict=True)))
        found.append(expected)
        if step in bad:
            expected.skipped = True
            continue
        if max_norm is not None and whole > max_norm:
            for p in named.values():
                p.grad.mul_(max_norm / whole)
            expected.global_norm_after = max_norm
        before = {n: p.detach().clone() for n, p in named.items()}
        stepper.step()
        expected.ratios = {n: float((p.detach() - before[n]).norm() / before[n].norm()) for n, p in named.items()}
    return model, found


def compare(
    history: Sequence[StepRecord],
    expected: Sequence[Expected],
    *,
    rel: float = 2e-5,
    updates: bool = True,
    histograms: bool = True,
    losses: bool = True,
) -> None:
    """Assert that records show what the reference says."""
    assert len(history) == len(expected), (len(history), len(expected))
    for record, want in zip(history, expected, strict=True):
        assert record.skipped == want.skipped, f"step {record.step}: skipped {record.skipped}"
        if want.skipped:
            assert not math.isfinite(record.global_norm)
            continue
        shown = {p for p in want.norms if record.measured("grad_norm")[record.index.position(p)]}
        assert shown == set(want.norms), set(want.norms) - shown
        for path, norm in want.norms.items():
            near(record["grad_norm", path], norm, rel, f"step {record.step} {path}")
        near(record.global_norm, want.global_norm, rel, f"step {record.step} global norm")
        near(record.global_norm_after, want.global_norm_after, rel, f"step {record.step} global norm after")
        if losses:
            near(record.loss, want.loss, rel, f"step {record.step} loss")
        if updates:
            for path, ratio in want.ratios.items():
                near(record["update_ratio", path], ratio, 20 * rel, f"step {record.step} update ratio of {path}")
        if histograms:
            for path, counts in want.histograms.items():
                got = torch.as_tensor(record.histograms[path].counts)
                assert int(got.sum()) == int(counts.sum()), f"step {record.step} {path}"
                # An element on the edge between two powers of two may round to either side.
                moved = int((got - counts).abs().sum()) // 2
                assert moved <= max(1, int(counts.sum()) // 50), f"step {record.step} {path}: {moved} moved"


def near(got: float, want: float, rel: float, what: str) -> None:
    # Terms of size one that cancel leave float32's rounding of them, which no two processors make alike.
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, rel / 1e-5)
    assert math.isclose(got, want, rel_tol=rel, abs_tol=floor), f"{what}: {got}, not {want}"


def same(records: Any) -> list[tuple[Any, ...]]:
    """Return what must be equal on all ranks: all numbers that decisions are made from."""
    found = []
    for r in records:
        scalars = sorted((k, str(v)) for k, v in r.scalars.items())
        columns = [(k, v.tobytes()) for k, v in sorted(r.columns.items())]
        treatments = [(t.name, str(t.after), t.applied) for t in r.treatments]
        numbers = [r.step, str(r.loss), str(r.global_norm), str(r.global_norm_after), r.skipped, r.num_samples]
        found.append((*numbers, *scalars, *columns, *treatments))
    return found
