"""Make the pictures of the README and the docs: real runs, a real TensorBoard, a headless Chromium.

python tools/screenshots.py [--runs FOLDER] [--out docs/pictures]

Trains a small transformer three times (about a minute each) unless the folder holds the runs already.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tab.browser import chromium, open_tab, tensorboard, wait_until, why_no_browser  # noqa: E402

RUNS = {"healthy": "", "bad-batch": "bad-batch", "sigmoid": "sigmoid"}


def train_missing(folder: Path) -> None:
    from gradwatch.report import write_report
    from tests.tab.training import train

    for name, fault in RUNS.items():
        if not (folder / name).exists():
            train(folder, name, fault=fault)
        write_report(folder / name / "gradwatch", folder / f"{name}.html")


def save(driver: Any, path: Path, height: int, width: int = 1280) -> None:
    """Save the upper part of the window, with few colours: a picture for a page, not for a microscope."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(path))
    with Image.open(path) as picture:
        cut = picture.convert("RGB").crop((0, 0, width, min(height, picture.height)))
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
        save(driver, out / "healthy-and-vanishing.png", 960)
        tab(driver, address, run="sigmoid", other="healthy", view="flow", step=300)
        save(driver, out / "flow.png", 920)
        tab(driver, address, run="healthy", stat="update_ratio", path="h.2.up.weight", step=200)
        save(driver, out / "update-ratio.png", 1120)


def shoot_report(driver: Any, folder: Path, out: Path) -> None:
    driver.get((folder / "sigmoid.html").resolve().as_uri())
    wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the report's being ready")
    time.sleep(0.5)
    save(driver, out / "report.png", 1160)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="where the runs are, or go; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    arguments = parser.parse_args()
    if why_no_browser():
        print(why_no_browser(), file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.runs or Path(scratch)
        train_missing(folder)
        with chromium(1280, 1500) as driver:
            shoot_tab(driver, folder, arguments.out)
            shoot_report(driver, folder, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
