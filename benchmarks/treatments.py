"""What treatments cost: each one's share of a training step, beside torch's and timm's own clips.

    python benchmarks/treatments.py               # about two minutes
    python benchmarks/treatments.py --rounds 5 --model mlp

A round takes one whole training step of the bare model, then lets every treatment work on fresh copies of the same
gradients, in an order that turns from round to round. CPU time; medians of the ratios of one round.

Two cases: "idle", no limit is reached (a healthy step), and "acting", where every limit is. "beside" is the cost for
one who has measured the norms already, as gradwatch has at every step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from _models import GPT, mlp
from torch import Tensor, nn

from gradwatch.stats import Gradients
from gradwatch.treatments import (
    AdaptiveClip,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    EmaClip,
    Noise,
    Normalize,
    QuantileClip,
    Sanitize,
    Scale,
    SkipStep,
    SpikeClip,
    ZClip,
)


@dataclass
class Step:
    """The context of a treatment, as `gradwatch.protocols.Context` has it."""

    optimizers: tuple[Any, ...]
    step: int = 0
    rule: str = ""
    trigger: Any = True
    limit: float | None = None
    findings: tuple[Any, ...] = ()
    can_read: bool = True

    def veto(self, flag: Any = True, *, reason: str = "") -> None: ...

    def request(self, request: Any) -> None: ...


@dataclass
class Arm:
    """One way to treat gradients.

    Attributes:
        run: does it; called with the named parameters and the optimizer.
        acts: at which case its limits are reached.
        is_measured: the norms are measured before the clock starts.
    """

    name: str
    case: str
    run: Callable[[list[tuple[str, nn.Parameter]], Any, Gradients | None], None]
    is_measured: bool = False
    shares: list[float] = field(default_factory=list)


def timm_clip() -> tuple[Callable[..., None], str]:
    """Return timm's adaptive clip, else the formula of timm 1.0 written out, and which it is."""
    spec = find_spec("timm")
    if spec is not None and spec.submodule_search_locations:
        # Its one file, without the image models and their dependencies.
        file = Path(spec.submodule_search_locations[0]) / "utils" / "agc.py"
        own = spec_from_file_location("timm_agc", file)
        assert own is not None
        assert own.loader is not None
        module = module_from_spec(own)
        own.loader.exec_module(module)
        return module.adaptive_clip_grad, "timm adaptive_clip_grad"
    return _timm_formula, "timm's formula, written out"


def _timm_formula(parameters: list[nn.Parameter], clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    def unitwise_norm(x: Tensor) -> Tensor:
        return x.norm(2.0) if x.ndim <= 1 else x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)

    for p in parameters:
        weights, grads = p.detach(), p.grad.detach()
        max_norm = unitwise_norm(weights).clamp_(min=eps).mul_(clip_factor)
        norm = unitwise_norm(grads)
        clipped = grads * (max_norm / norm.clamp(min=1e-6))
        grads.copy_(torch.where(norm < max_norm, grads, clipped))


def ours(name: str, build: Callable[[], Any], case: str, *, is_measured: bool = False) -> Arm:
    treatment = build()
    for _ in range(30):
        _teach(treatment)

    def run(named: list[tuple[str, nn.Parameter]], optimizer: Any, grads: Gradients | None) -> None:
        # Without an optimizer to warn of; only SpikeClip looks into one.
        context = Step((optimizer,) if isinstance(treatment, SpikeClip) else ())
        treatment.apply_(Gradients.collect(named) if grads is None else grads, context)

    return Arm(name + (", beside" if is_measured else ""), case, run, is_measured)


def _teach(treatment: Any) -> None:
    """Let clips that learn see small norms, so that they are past their warm-up."""
    if isinstance(treatment, ZClip):
        param = nn.Parameter(torch.zeros(2))
        param.grad = torch.rand(2) * 1e-3
        treatment.apply_(Gradients.collect([("w", param)]), Step(()))


def arms_of(max_norm: float) -> list[Arm]:
    """Return all arms; `max_norm` is far above the gradients' norms when idle, far below when acting."""
    timm, timm_name = timm_clip()
    arms = []
    for case, limit, ratio in [("idle", max_norm * 1e3, 1e6), ("acting", max_norm * 1e-3, 1e-6)]:
        arms += [
            Arm("torch clip_grad_norm_", case, lambda n, o, g, c=limit: _torch_clip(n, c)),
            ours("ClipByGlobalNorm", lambda c=limit: ClipByGlobalNorm(c), case),
            ours("ClipByGlobalNorm", lambda c=limit: ClipByGlobalNorm(c), case, is_measured=True),
            Arm("torch clip_grad_value_", case, lambda n, o, g, c=limit: _torch_clip_value(n, c)),
            ours("ClipByValue", lambda c=limit: ClipByValue(c), case),
            Arm(timm_name, case, lambda n, o, g, r=ratio: timm([p for _, p in n], r)),
            ours("AdaptiveClip", lambda r=ratio: AdaptiveClip(r, head=None), case),
            ours("AdaptiveClip", lambda r=ratio: AdaptiveClip(r, head=None), case, is_measured=True),
            ours("ClipByNorm", lambda c=limit: ClipByNorm(c), case),
            ours("SpikeClip", lambda r=ratio: SpikeClip(min(r, 1e20)), case),
        ]
    arms += [
        ours("ZClip", ZClip, "acting"),
        ours("QuantileClip", lambda: QuantileClip(0.5), "idle"),
        ours("EmaClip", lambda: EmaClip(warmup_max_norm=None), "idle"),
        *(ours(name, build, "idle") for name, build in [("SkipStep", SkipStep), ("Sanitize", Sanitize)]),
        ours("SkipStep", SkipStep, "idle", is_measured=True),
        *(ours(name, build, "acting") for name, build in [("Normalize", Normalize), ("Centralize", Centralize)]),
        ours("Scale", lambda: Scale(0.5), "acting"),
        ours("Noise", Noise, "acting"),
    ]
    return arms


def _torch_clip(named: list[tuple[str, nn.Parameter]], limit: float) -> None:
    nn.utils.clip_grad_norm_([p for _, p in named], limit)


def _torch_clip_value(named: list[tuple[str, nn.Parameter]], limit: float) -> None:
    nn.utils.clip_grad_value_([p for _, p in named], limit)


def race(model: nn.Module, batch: Callable[[], Tensor], arms: list[Arm], rounds: int) -> float:
    """Fill every arm's shares of the bare step, one a round; return the median milliseconds of the bare step."""
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    bare, order = [], random.Random(0)
    for k in range(rounds + 2):
        start = time.process_time()
        optimizer.zero_grad()
        batch().backward()
        kept = [p.grad for _, p in named]
        optimizer.step()
        step = time.process_time() - start
        fresh = [torch.empty_like(g) for g in kept]
        for arm in order.sample(arms, len(arms)):
            torch._foreach_copy_(fresh, kept)
            for (_, p), g in zip(named, fresh, strict=True):
                p.grad = g
            grads = Gradients.collect(named) if arm.is_measured else None
            if grads is not None:
                _ = grads.global_norm
            start = time.process_time()
            arm.run(named, optimizer, grads)
            # The first two rounds warm caches and allocators.
            if k > 1:
                arm.shares.append((time.process_time() - start) / step)
        if k > 1:
            bare.append(step)
    return statistics.median(bare) * 1e3


def show(arms: list[Arm], step_ms: float) -> None:
    print(f"\nbare step: {step_ms:.1f} ms of CPU time\n")
    print("| treatment | case | share of a step | quartiles |\n|---|---|---:|---:|")
    for arm in arms:
        low, middle, high = statistics.quantiles(arm.shares, n=4)
        print(f"| {arm.name} | {arm.case} | {100 * middle:.2f} % | {100 * low:.2f} .. {100 * high:.2f} % |")
    print()
    pairs = [("ClipByGlobalNorm", "torch clip_grad_norm_"), ("AdaptiveClip", timm_clip()[1])]
    pairs += [(f"{mine}, beside", theirs) for mine, theirs in pairs]
    for mine, theirs in pairs:
        for case in ("idle", "acting"):
            a, b = (next(arm for arm in arms if (arm.name, arm.case) == (n, case)).shares for n in (mine, theirs))
            print(f"{mine} / {theirs}, {case}: {statistics.median(x / y for x, y in zip(a, b, strict=True)):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", choices=("gpt", "mlp"), default="gpt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.model == "gpt":
        model: Any = GPT()

        def batch() -> Tensor:
            return model.loss(torch.randint(0, 1500, (1, 129)))
    else:
        model = mlp()

        def batch() -> Tensor:
            return model(torch.randn(64, 1820)).square().mean()

    batch().backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    arms = arms_of(norm)
    show(arms, race(model, batch, arms, options.rounds))


if __name__ == "__main__":
    main()
