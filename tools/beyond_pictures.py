"""Make the pictures of docs/attention.md, docs/precision.md and docs/ahead.md.

python tools/beyond_pictures.py [--out docs/pictures] [--only attention precision ahead]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from sample_pictures import BLUE, GREY, RED, figure, first_program, plain
from torch import nn

from gradwatch import Watch

ROOT = Path(__file__).resolve().parents[1]


def attention(out: Path) -> None:
    run = first_program("attention.md")
    picture = figure(9.0, 2.9)
    left, right = picture.subplots(1, 2)
    for name, watch, colour in (("left alone", run["left"], RED), ("QKClip(100)", run["clipped"], BLUE)):
        for block, style in (("1", "-"), ("2", "--")):
            told = [r for r in watch.history if "attention_logit_max" in r.columns]
            steps = [r.step for r in told]
            label = f"{name}, block {block}"
            left.plot(steps, [r["attention_logit_max", block] for r in told], style, color=colour, label=label)
            right.plot(steps, [r["attention_entropy", block] for r in told], style, color=colour)
    left.set_yscale("log")
    left.axhline(100, color=GREY, linewidth=0.8)
    left.legend(fontsize=7, frameon=False)
    plain(left, "largest attention logit", "step", "logit")
    right.set_ylim(0, 1)
    plain(right, "entropy of the heads", "step", "share of the largest")
    picture.savefig(out / "attention.png")


def precision(out: Path) -> None:
    rates = [10.0**-e for e in (6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2)]
    picture = figure(6.0, 2.9)
    axes = picture.subplots()
    for dtype, colour in ((torch.bfloat16, RED), (torch.float16, BLUE)):
        axes.plot(rates, [lost(dtype, rate) for rate in rates], "o-", color=colour, label=str(dtype)[6:], markersize=3)
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False)
    plain(axes, "updates rounded away, Adam", "learning rate", "share of the entries")
    picture.savefig(out / "precision.png")


def lost(dtype: torch.dtype, rate: float) -> float:
    """Return the share of updates of a small training that rounding takes back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), rate, eps=1e-4)
    with Watch(model, optimizer, rules="observe", updates_every=10) as watch:
        for _ in range(41):
            loss = model(torch.randn(32, 32, dtype=dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
    return float(watch.history[40]["update_lost", "0.weight"])


def ahead(out: Path) -> None:
    run = first_program("ahead.md")
    picture = figure(9.0, 2.9)
    left, right = picture.subplots(1, 2)
    history = run["watch"].history
    steps, told = [r.step for r in history], run["told"]
    left.plot(steps, run["losses"], color=BLUE)
    left.axvline(told, color=RED, linewidth=1)
    left.set_yscale("log")
    plain(left, "loss", "step", "loss")
    right.plot(steps, [r.scalars.get("step_curvature", float("nan")) for r in history], color=BLUE)
    right.axhline(1, color=GREY, linestyle="--", linewidth=1)
    right.axvline(told, color=RED, linewidth=1, label=f"overshooting: step {told}")
    right.legend(fontsize=8, frameon=False, loc="lower right")
    plain(right, "curvature along the step, of what is borne", "step", "share")
    picture.savefig(out / "ahead.png")


PICTURES: dict[str, Callable[[Path], None]] = {"attention": attention, "precision": precision, "ahead": ahead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    given = parser.parse_args()
    for name in given.only:
        PICTURES[name](given.out)


if __name__ == "__main__":
    main()
