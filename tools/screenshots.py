"""Pictures that need a browser: the tab, a report, what a terminal and a notebook show. Real runs, a real Chromium."""

from __future__ import annotations

import html
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gradwatch.runs import read_run
from tests.docs.pages import ROOT, blocks
from tests.tab.browser import chromium, open_tab, tensorboard, wait_until
from tests.tab.training import train

__all__ = ["PICTURES", "shoot"]

TAB = ("tab", "tab-dark", "healthy-and-vanishing", "flow", "update-ratio")
PICTURES = (*TAB, "report", "quickstart", "cli", "notebook")
RUNS = {"healthy": "", "bad-batch": "bad-batch", "sigmoid": "sigmoid"}
PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<body style="margin:0;padding:14px;background:{back};color:{text};font:{font}">{body}
"""


def shoot(folder: Path, out: Path, wanted: set[str], *, summarised: Path) -> None:
    """Make the pictures asked for.

    Args:
        folder: where the transformer's runs are, or go.
        out: folder of the pictures.
        wanted: some of `PICTURES`.
        summarised: run folder that `gradwatch summary` and the notebook's card are of.
    """
    folder = folder / "transformer"  # runs of the digits have the same names
    if wanted & {*TAB, "report"}:
        for name, fault in RUNS.items():
            if not (folder / name).exists():
                train(folder, name, fault=fault, options={}, log_every=50)
    with chromium(1280, 1500) as driver:
        if wanted & set(TAB):
            shoot_tab(driver, folder, out)
        if "report" in wanted:
            command = [sys.executable, "-m", "gradwatch", "report", "sigmoid/gradwatch", "-o", "sigmoid.html"]
            subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
            shoot_report(driver, folder / "sigmoid.html", out / "report.png", 1160)
        if "quickstart" in wanted:
            quickstart(driver, out / "quickstart.png")
        if "cli" in wanted:
            terminal(driver, summarised, out / "cli.png")
        if "notebook" in wanted:
            card(driver, summarised, out / "notebook.png")


def quickstart(driver: Any, path: Path) -> None:
    """Run the first program of the quick start as it stands there, and show the report it writes."""
    program = blocks(ROOT / "docs" / "quickstart.md", "python")[0].code
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True)
        shoot_report(driver, Path(folder) / "report.html", path, 1160)


def terminal(driver: Any, run: Path, path: Path) -> None:
    """Show what `gradwatch summary` prints into 100 columns."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-m", "gradwatch", "summary", run.name]
    said = subprocess.run(command, cwd=run.parent, env=environment, check=False, capture_output=True, text=True).stdout
    body = f"<pre style='margin:0;font:inherit'>$ gradwatch summary {run.name}\n{html.escape(said)}</pre>"
    show(driver, PAGE.format(back="#16181b", text="#e8eaed", font="13px/1.35 monospace", body=body), path)


def card(driver: Any, run: Path, path: Path) -> None:
    """Show the card of a run as a notebook has it."""
    body = read_run(run)._repr_html_().replace(html.escape(str(run)), f"runs/{run.name}")
    show(driver, PAGE.format(back="#ffffff", text="#1f2328", font="14px sans-serif", body=body), path)


def show(driver: Any, page: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        driver.get(file.as_uri())
        time.sleep(0.3)
        width = driver.execute_script("return Math.max(...[...document.body.children].map((e) => e.scrollWidth)) + 28")
        save(
            driver, path, driver.execute_script("return document.body.getBoundingClientRect().height"), min(1280, width)
        )


def save(driver: Any, path: Path, height: float, width: int = 1280) -> None:
    """Save the upper part of the window, with few colours: a picture for a page, not for a microscope."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(path))
    with Image.open(path) as picture:
        cut = picture.convert("RGB").crop((0, 0, width, min(round(height), picture.height)))
    cut.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} {path.stat().st_size // 1024} kB")


def tab(driver: Any, address: str, **state: object) -> None:
    pairs = "&".join(f"p.gradwatch.{k}={v}" for k, v in state.items() if k != "dark")
    open_tab(driver, address, f"#gradwatch&{pairs}")
    driver.execute_script(
        "window.parent.document.body.classList.toggle('dark-mode', arguments[0])", bool(state.get("dark"))
    )
    time.sleep(1.5)


def shoot_tab(driver: Any, folder: Path, out: Path) -> None:
    with tensorboard(folder) as address:
        tab(driver, address, run="bad-batch", step=220, path="h.2.up.weight")
        save(driver, out / "tab.png", 1090)
        tab(driver, address, run="bad-batch", step=220, path="h.2.up.weight", dark=True)
        save(driver, out / "tab-dark.png", 1090)
        tab(driver, address, run="sigmoid", other="healthy")
        save(driver, out / "healthy-and-vanishing.png", 905)
        tab(driver, address, run="sigmoid", other="healthy", view="flow", step=300)
        # Below the curves.
        driver.execute_script("document.querySelector('.gw-flow').scrollIntoView({block: 'end'})")
        time.sleep(0.5)
        save(driver, out / "flow.png", 1480)
        tab(driver, address, run="healthy", stat="update_ratio", path="h.2.up.weight", step=200)
        save(driver, out / "update-ratio.png", 1120)


def shoot_report(driver: Any, report: Path, path: Path, height: int) -> None:
    driver.get(report.resolve().as_uri())
    wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the report's being ready")
    time.sleep(0.5)
    save(driver, path, height)
