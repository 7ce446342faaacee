"""Make the pictures of docs/healthy.md: small real runs, healthy and ill, drawn by matplotlib.

    python tools/pictures.py [--out docs/pictures] [--only NAME ...]

A classifier of handwritten digits, well and with one fault at a time; and the GPT of examples/char_gpt.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from gradwatch import Watch
from gradwatch.report import ReportData
from gradwatch.runs import read_run

ROOT = Path(__file__).resolve().parents[1]
MISSING = -np.inf


def network(activation: Callable[[], nn.Module], depth: int = 8, width: int = 64) -> nn.Sequential:
    sizes = [64, *[width] * depth]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,))
        yield x[rows], y[rows]


def train(folder: Path, fault: str, steps: int = 300) -> None:
    """Train the classifier with a fault into a run folder."""
    torch.manual_seed(0)
    model = network(nn.Sigmoid if fault == "sigmoid" else nn.ReLU)
    if fault == "dead":
        nn.init.constant_(model[8].bias, -20.0)
        for layer in (model[10], model[12], model[14]):  # live on their biases alone
            nn.init.constant_(layer.bias, 0.1)
    held = [p for n, p in model.named_parameters() if fault != "forgotten" or not n.startswith("6.")]
    rate = {"wild": 0.3, "sigmoid": 0.05, "crawl": 1e-5}.get(fault, 0.02)
    optimizer = torch.optim.SGD(held, lr=rate, momentum=0.9 if fault != "wild" else 0.0)
    options: dict[str, Any] = {"updates_every": 2, "activations_every": 10}
    with Watch(model, optimizer, run_dir=folder, **options) as watch:
        for step, (x, y) in enumerate(batches(steps)):
            outputs = model(x)
            if fault == "nan" and step >= steps // 2:
                outputs = outputs + torch.log(torch.zeros(()))  # the logarithm of an empty class
            loss = nn.functional.cross_entropy(outputs, y)
            loss.backward()
            watch.step(loss=loss, batch=x, outputs=outputs, targets=y)
            model.zero_grad()


def draw(data: ReportData, path: Path, title: str, statistic: str = "grad_norm") -> None:
    """Draw loss and global norm over a heatmap: grey zero, white not measured, red not finite."""
    table, index = data.tables[statistic], data.index
    rows = np.flatnonzero(index.is_parameter & (index.ndim >= 2))
    rows = rows[np.argsort(index.depth[rows], kind="stable")]
    values = table.values[:, rows].T.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values) & (values > 0), np.log10(values), np.nan)
    figure = Figure(figsize=(9, 2.4 + 0.16 * len(rows)), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, 0.16 * len(rows)])
    curves(upper, data)
    edges = np.append(table.steps, table.last + 1)
    # One scale for all pictures of a statistic: they are there to be compared.
    low, high = {"grad_norm": (-4, 1), "update_ratio": (-6, -1)}[statistic]
    mesh = lower.pcolormesh(edges, np.arange(len(rows) + 1), logs, vmin=low, vmax=high, cmap="viridis")
    label = {"grad_norm": "gradient norm", "update_ratio": "update / weight"}[statistic]
    figure.colorbar(mesh, ax=lower, label=f"log10 {label}", fraction=0.03, pad=0.01, extend="both")
    for mask, color in ((values == 0, "#969696"), (~np.isfinite(values) & (values != MISSING), "#e5002e")):
        lower.pcolormesh(edges, np.arange(len(rows) + 1), np.where(mask, 1.0, np.nan), cmap=ListedColormap([color]))
    lower.set_yticks(np.arange(len(rows)) + 0.5, [index.paths[r] for r in rows], fontsize=7)
    lower.invert_yaxis()
    lower.set_xlabel("step")
    upper.set_title(title, loc="left", fontsize=10)
    for incident in data.incidents:
        for axes in (upper, lower):
            axes.axvline(incident.first_step, color="#e5002e", lw=0.8, ls=":")
    figure.savefig(path, format="png")
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path} {path.stat().st_size // 1024} kB; {[f'{i.name or i.rule}@{i.first_step}' for i in data.incidents]}")


def curves(axes: Any, data: ReportData) -> None:
    steps, losses = data.scalars["loss"]
    axes.plot(steps, losses, color="#1f6feb", lw=1)
    finite = losses[np.isfinite(losses)]
    if finite.max() > 50 * np.median(finite):
        axes.set_yscale("log")
    axes.set_ylabel("loss", color="#1f6feb", fontsize=8)
    other = axes.twinx()
    steps, norms = data.scalars["global_norm"]
    other.plot(steps, norms, color="#8b8b8b", lw=0.8)
    other.set_yscale("log")
    other.set_ylabel("global norm", color="#6b6b6b", fontsize=8)
    for each in (axes, other):
        each.tick_params(labelsize=7, which="both")


DIGITS = {
    "healthy": ("", "healthy: all layers within two decades, the loss falls", "grad_norm"),
    "vanishing": ("sigmoid", "vanishing: eight sigmoid layers", "grad_norm"),
    "dead": ("dead", "dead: the ReLUs behind layer 8 never fire", "grad_norm"),
    "wild": ("wild", "the learning rate is far too high", "grad_norm"),
    "nan": ("nan", "not finite from step 150 on", "grad_norm"),
    "updates-healthy": ("", "healthy: updates between a hundredth and a ten-thousandth of the weights", "update_ratio"),
    "updates-forgotten": ("forgotten", "one layer was not given to the optimizer", "update_ratio"),
    "updates-crawl": ("crawl", "the learning rate is far too low", "update_ratio"),
}
GPT = {
    "gpt-healthy": ("healthy", "a small GPT, healthy"),
    "gpt-spike": ("autoclip", "the same with one corrupt batch at step 160, clipped by autoclip"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--only", nargs="*", default=[*DIGITS, *GPT])
    parser.add_argument("--gpt-runs", type=Path, help="of examples/char_gpt.py, where it ran already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, (fault, title, statistic) in DIGITS.items():
            if name in options.only:
                run = folder / (fault or "well")
                if not run.exists():
                    train(run, fault)
                draw(ReportData.from_run(read_run(run)), options.out / f"{name}.png", title, statistic)
        gpt = options.gpt_runs
        if gpt is None and set(GPT) & set(options.only):
            sys.path.insert(0, str(ROOT / "examples"))
            import char_gpt

            gpt = folder / "gpt"
            char_gpt.main(["--out", str(gpt)])
        for name, (which, title) in GPT.items():
            if name in options.only and gpt is not None:
                draw(ReportData.from_run(read_run(gpt / which / "gradwatch")), options.out / f"{name}.png", title)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
