"""Make the pictures of the docs, and the gallery: real runs at default settings, drawn or photographed.

    python tools/pictures.py [--out docs/pictures] [--only NAME ...] [--runs FOLDER]

What needs a browser (the tab, a report, a terminal, a notebook's card) is left out, and named, where there is none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import char_gpt  # noqa: E402
import patching  # noqa: E402

from gradwatch.report import ReportData  # noqa: E402
from gradwatch.runs import read_run  # noqa: E402
from tests.tab.browser import why_no_browser  # noqa: E402
from tools import screenshots  # noqa: E402
from tools.drawing import draw, draw_norms, draw_tasks  # noqa: E402
from tools.gallery import write_gallery  # noqa: E402
from tools.small_runs import tasks, train  # noqa: E402

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
NORMS = {
    "rules": (
        "spike",
        {},
        "`exploding` fires: the norm is above the bar that the steps before have set",
        {"global_norm": "global norm", "limit": "the alarm's bar"},
    ),
    "treatments": (
        "spike",
        {"rules": "autoclip"},
        "the same under autoclip: once the alarm has fired, the optimizer gets no more than the bar",
        {"global_norm": "as produced", "global_norm_applied": "as the optimizer got it"},
    ),
}
GPT = {
    "gpt-healthy": ("healthy", "a small GPT, healthy"),
    "gpt-spike": ("autoclip", "the same with one corrupt batch at step 160, clipped by autoclip"),
}


OTHERS = ("surgery", "hooks")


def digit_runs(folder: Path, out: Path, wanted: set[str]) -> dict[str, Path]:
    """Draw the classifier's pictures; return the runs by picture."""
    runs = {}
    for name, (fault, title, statistic) in DIGITS.items():
        runs[name] = folder / (fault or "well")
        if name in wanted:
            if not runs[name].exists():
                train(runs[name], fault)
            draw(ReportData.from_run(read_run(runs[name])), out / f"{name}.png", title, statistic)
    for name, (fault, options, title, norms) in NORMS.items():
        runs[name] = folder / f"one-bad-batch-{options.get('rules', 'watched')}"
        if name in wanted:
            if not runs[name].exists():
                train(runs[name], fault, **options)
            draw_norms(ReportData.from_run(read_run(runs[name])), out / f"{name}.png", title, norms)
    return runs


def gpt_runs(folder: Path, out: Path, wanted: set[str]) -> dict[str, Path]:
    """Draw the GPT's pictures; return the runs by picture."""
    runs = {name: folder / "gpt" / which / "gradwatch" for name, (which, _) in GPT.items()}
    if wanted & set(GPT) and not all(run.exists() for run in runs.values()):
        char_gpt.main(["--out", str(folder / "gpt")])
    for name, (_, title) in GPT.items():
        if name in wanted:
            draw(ReportData.from_run(read_run(runs[name])), out / f"{name}.png", title)
    return runs


def other_runs(folder: Path, out: Path, wanted: set[str]) -> None:
    """Draw what two tasks do to each other, and where in a transformer an answer moves."""
    if "surgery" in wanted:
        run = folder / "tasks"
        if not run.exists():
            tasks(run)
        draw_tasks(
            ReportData.from_run(read_run(run)),
            out / "surgery.png",
            "two tasks, one trunk: how their gradients lie to each other",
        )
    if "hooks" in wanted:
        patching.main(out=str(out / "hooks.png"))


def main() -> int:
    known = [*DIGITS, *NORMS, *GPT, *OTHERS, *screenshots.PICTURES, "gallery"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--only", nargs="*", default=known, choices=known, metavar="NAME")
    parser.add_argument("--runs", type=Path, help="where the runs are, or go; default: a temporary folder")
    options = parser.parse_args()
    wanted = set(options.only)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        runs = digit_runs(folder, options.out, wanted) | gpt_runs(folder, options.out, wanted)
        other_runs(folder, options.out, wanted)
        shot = wanted & set(screenshots.PICTURES)
        if shot and why_no_browser():
            print(f"without {', '.join(sorted(shot))}: {why_no_browser()}", file=sys.stderr)
        elif shot:
            screenshots.shoot(folder, options.out, shot, summarised=runs["rules"])
        if "gallery" in wanted:
            titles = {name: title for name, (_, title, *_) in (DIGITS | GPT).items()}
            write_gallery({name: (runs[name], titles[name]) for name in titles}, ROOT / "docs" / "gallery.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
