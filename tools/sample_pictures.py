"""Make the pictures of docs/samples.md, docs/noise_scale.md and docs/what_if.md, from the programs on these pages.

python tools/sample_pictures.py [--out docs/pictures]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from gradwatch import Watch
from gradwatch.samples import per_sample_gradients

ROOT = Path(__file__).resolve().parents[1]
BLUE, RED, GREY = "#3b6ea5", "#c8443c", "#888888"


def first_program(page: str) -> dict[str, Any]:
    """Run the first block of Python of a page; return its names."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(compile(block[1], page, "exec"), names)
    return names


def figure(width: float, height: float) -> Figure:
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made


def plain(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def samples(out: Path) -> None:
    run = first_program("samples.md")
    # After its step the model still knows nothing of the corrupt sample.
    found = per_sample_gradients(run["model"], lambda o, t: nn.functional.cross_entropy(o.mT, t), run["x"], run["y"])
    who = found.top(1)[0].index
    picture = figure(9.0, 2.9)
    left, right = picture.subplots(1, 2, width_ratios=(2, 1))
    left.bar(np.arange(len(found)), found.share, color=[RED if i == who else BLUE for i in range(len(found))])
    left.annotate(f"sample {who}: {found.share[who]:.0%}", (who, found.share[who]), (who + 2, found.share[who] * 0.9))
    plain(left, "share of the gradient", "sample of the batch", "share")
    assert found.losses is not None
    right.bar(np.arange(found.losses.shape[1]), found.losses[who], color=RED)
    plain(right, f"loss of sample {who}, place by place", "place", "loss")
    picture.savefig(out / "samples.png")


def noise_scale(out: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, noise_scale=True, rules="observe", history=2000) as watch:
        for _ in range(1200):
            x = torch.randn(32, 8)
            loss = nn.functional.mse_loss(model(x), x[:, :4].sum(1, keepdim=True) + 0.5 * torch.randn(32, 1))
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss)
    told = [r for r in watch.history if "noise_scale" in r.scalars and np.isfinite(r.scalars["noise_scale"])]
    steps = [r.step for r in told]
    scale = np.array([r.scalars["noise_scale"] for r in told])
    error = np.array([r.scalars["noise_scale_error"] for r in told])
    picture = figure(9.0, 2.9)
    left, right = picture.subplots(1, 2)
    left.plot([r.step for r in watch.history], [r.loss for r in watch.history], color=BLUE, linewidth=0.8)
    plain(left, "loss", "step", "loss")
    right.fill_between(steps, np.maximum(scale - error, 1), scale + error, color=BLUE, alpha=0.25, linewidth=0)
    right.plot(steps, scale, color=BLUE, label="noise scale ± error")
    right.axhline(32, color=GREY, linestyle="--", linewidth=1, label="batch: 32")
    right.set_yscale("log")
    right.set_ylim(1, 3000)
    right.legend(fontsize=8, frameon=False, loc="upper left")
    plain(right, "gradient noise scale", "step", "samples")
    picture.savefig(out / "noise-scale.png")


def what_if(out: Path) -> None:
    found = first_program("what_if.md")["found"]
    some = [found.control, *found.tried[:3]]
    colors = [GREY, RED, BLUE, "#8fb5d9"]
    picture = figure(9.0, 3.1)
    left, right = picture.subplots(1, 2)
    for each, color in zip(some, colors, strict=True):
        left.plot(each.losses, color=color, label=each.name or "as it is", linewidth=1.4)
    left.legend(fontsize=8, frameon=False)
    plain(left, "loss, each by its own loss function", "step", "loss")
    every = [found.control, *found.tried]
    names = [each.name or "as it is" for each in every]
    shades = [GREY, *(RED if each is found.winner else BLUE for each in found.tried)]
    right.barh(np.arange(len(every)), [each.left for each in every], color=shades)
    right.set_yticks(np.arange(len(every)), names, fontsize=7)
    right.invert_yaxis()
    plain(right, "left unexplained on batches held back", "share", "")
    picture.savefig(out / "what-if.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    out = parser.parse_args().out
    for make in (samples, noise_scale, what_if):
        make(out)


if __name__ == "__main__":
    main()
