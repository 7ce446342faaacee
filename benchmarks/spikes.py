"""Which clip saves a run from gradient spikes, and what each costs a healthy one.

    python benchmarks/spikes.py                   # some minutes
    python benchmarks/spikes.py --seeds 3 --only zclip clip_by_global_norm

A small regression net is trained for 400 steps; at step 100, or at 100, 150 and 200, every gradient is multiplied by
1000. The table shows the final loss, median over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from gradwatch.stats import Gradients
from gradwatch.treatments import AdaptiveClip, ClipByGlobalNorm, EmaClip, QuantileClip, SpikeClip, ZClip

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW 2e-3": lambda params: torch.optim.AdamW(params, lr=2e-3),
    "SGD 0.05, momentum 0.9": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
}
TREATMENTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "none": ("none", lambda: None),
    "clip_by_global_norm": ("ClipByGlobalNorm(1.0)", lambda: ClipByGlobalNorm(1.0)),
    "zclip": ("ZClip()", ZClip),
    "quantile_clip": ("QuantileClip(0.1)", lambda: QuantileClip(0.1)),
    "quantile_clip_90": ("QuantileClip(0.9)", lambda: QuantileClip(0.9)),
    "ema_clip": ("EmaClip(warmup=20)", lambda: EmaClip(warmup=20)),
    "adaptive_clip": ("AdaptiveClip(0.01)", lambda: AdaptiveClip(0.01)),
    "spike_clip": ("SpikeClip(50)", lambda: SpikeClip(50.0)),
}
SPIKES: dict[str, Collection[int]] = {"healthy": (), "one spike": (100,), "three spikes": (100, 150, 200)}


class Context:
    """What a treatment is told, as `gradwatch.protocols.Context` has it."""

    rule, trigger, limit, findings, can_read = "", True, None, (), True

    def __init__(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizers = step, (optimizer,)


def final_loss(treatment: Any, make_optimizer: Callable[[Any], Any], spikes: Collection[int], seed: int) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    named = list(model.named_parameters())
    optimizer = make_optimizer(model.parameters())
    inputs = torch.randn(256, 10)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    for step in range(400):
        batch = torch.randint(0, 256, (64,))
        optimizer.zero_grad()
        (model(inputs[batch]) - targets[batch]).square().mean().backward()
        if step in spikes:
            for _, p in named:
                p.grad.mul_(1000)
        if treatment is not None:
            treatment.apply_(Gradients.collect(named), Context(step, optimizer))
        optimizer.step()
    loss = float((model(inputs) - targets).square().mean().detach())
    return loss if math.isfinite(loss) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=TREATMENTS, default=list(TREATMENTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for optimizer, make_optimizer in OPTIMIZERS.items():
        print(f"\n| {optimizer} | {' | '.join(SPIKES)} |\n|---|{'---:|' * len(SPIKES)}")
        for key in options.only:
            name, build = TREATMENTS[key]
            if key == "spike_clip" and not optimizer.startswith("Adam"):
                continue
            cells = [
                statistics.median(final_loss(build(), make_optimizer, spikes, seed) for seed in range(options.seeds))
                for spikes in SPIKES.values()
            ]
            print(f"| {name} | {' | '.join(f'{cell:.3g}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
