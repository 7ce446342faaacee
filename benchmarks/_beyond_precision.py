"""Updates that rounding takes back, counted while training, against the same counted from float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch import Watch

__all__ = ["rows"]

RATES = (2.0**-16, 2.0**-13, 2.0**-10, 2.0**-7)


def rounded(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return numbers of float64 rounded to the nearest of a format, ties to even, by their digits."""
    exact = values.double().numpy()
    digits, least = (8, -133) if dtype is torch.bfloat16 else (11, -24)
    unit = np.exp2(np.maximum(np.frexp(exact)[1] - digits, least).astype(float))
    return np.round(exact / unit) * unit


def wrong(dtype: torch.dtype, rate: float) -> int:
    """Return by how many entries the count is off, over three steps of plain descent."""
    model = nn.Linear(200, 100, bias=False, dtype=dtype)
    optimizer, off = torch.optim.SGD(model.parameters(), rate), 0
    with Watch(model, optimizer, rules="observe", updates_every=1) as watch:
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 200, dtype=dtype)).square().mean().backward()
            weight, grad = model.weight.detach().double(), model.weight.grad.double()
            lost = (rounded(weight - rate * grad, dtype) == weight.numpy()) & (grad.numpy() != 0)
            watch.step()
            found = watch.history[step]["update_lost", "weight"] * float((grad != 0).sum())
            off += abs(round(found) - int(lost.sum()))
    return off


def cost(rounds: int = 12) -> float:
    """Return what a step whose updates are measured takes in bfloat16, in steps that measure none."""
    times: dict[int | None, list[float]] = {None: [], 1: []}
    for _ in range(rounds):
        for every in times:
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to(torch.bfloat16)
            optimizer = torch.optim.SGD(model.parameters(), 1e-3)
            options = {"activations_every": None, "histograms_every": None, "updates_every": every}
            with Watch(model, optimizer, rules="observe", **options) as watch:
                for step in range(3):
                    begun = time.process_time()
                    model(torch.randn(64, 512, dtype=torch.bfloat16)).square().mean().backward()
                    watch.step()
                    if step == 2:
                        times[every].append(time.process_time() - begun)
    return statistics.median(b / a for a, b in zip(*times.values(), strict=True))


def rows(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: what, found, asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    cases = [(dtype, rate) for dtype in (torch.bfloat16, torch.float16) for rate in RATES]
    off = sum(wrong(dtype, rate) for dtype, rate in cases)
    count = len(cases) * 3 * 200 * 100
    yield "updates rounded away, 8 cases of 2 formats", f"{off} of {count:,} entries counted wrong", "exact"
    yield "updates rounded away: a step that measures", f"{cost():.2f} of one that does not; at 1 in 50", "-"
