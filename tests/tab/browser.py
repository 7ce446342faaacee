"""A headless Chromium and a real `tensorboard` process, each closed on every way out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"


def why_no_browser() -> str:
    """Return why browser tests can't run here; "" where they can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    missing = [p for p in (CHROMIUM, DRIVER) if not Path(p).exists()]
    return f"{', '.join(missing)} not there (Debian: apt-get install chromium chromium-driver)" if missing else ""


@contextlib.contextmanager
def chromium(width: int = 1500, height: int = 1300) -> Iterator[Any]:
    """Yield a selenium driver with a fresh profile, whose console and network are logged."""
    from selenium import webdriver

    profile = tempfile.mkdtemp(prefix="gradwatch-chromium-")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


@contextlib.contextmanager
def tensorboard(logdir: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Yield the address of a `tensorboard` process over a folder of runs."""
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logdir),
        "--port",
        "0",
        "--host",
        "127.0.0.1",
        *flags,
    ]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield _address(process, out)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def _address(process: subprocess.Popen[bytes], out: Any, patience: float = 90.0) -> str:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        out.seek(0)
        text = out.read()
        found = re.search(r"http://127\.0\.0\.1:\d+/", text)
        if found:
            return found.group()
        if process.poll() is not None:
            raise RuntimeError(f"tensorboard ended with code {process.returncode}:\n{text}")
        time.sleep(0.1)
    raise RuntimeError(f"tensorboard said no address within {patience} s:\n{text}")


def wait_until(condition: Any, what: str, patience: float = 60.0) -> Any:
    """Return the first true value of `condition()`."""
    until, problem = time.monotonic() + patience, None
    while time.monotonic() < until:
        try:
            value = condition()
            if value:
                return value
        except Exception as error:  # a frame that is being replaced, a script that runs too early
            problem = error
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {patience} s" + (f" ({problem})" if problem else ""))


def open_tab(driver: Any, address: str, link: str = "") -> int:
    """Open the GradWatch tab, step into its frame, and return the milliseconds until it was ready."""
    driver.switch_to.default_content()
    driver.get("about:blank")
    driver.get(f"{address}{link or '#gradwatch'}")

    def ready() -> Any:
        driver.switch_to.default_content()
        for frame in driver.find_elements("css selector", "iframe"):
            driver.switch_to.default_content()
            driver.switch_to.frame(frame)
            value = driver.execute_script("return document.title === 'GradWatch' && document.body.dataset.ready")
            if value:
                return value
        return None

    return int(wait_until(ready, "the tab's being ready"))


def complaints(driver: Any) -> list[str]:
    """Return errors of the console since the last call, reports of the content security policy among them."""
    ignored = ("favicon.ico", "fonts.gstatic", "apple-touch-icon")
    return [
        e["message"]
        for e in driver.get_log("browser")
        if e["level"] == "SEVERE" and not any(i in e["message"] for i in ignored)
    ]


def requests(driver: Any) -> list[str]:
    """Return the addresses asked for since the last call."""
    events = (json.loads(e["message"])["message"] for e in driver.get_log("performance"))
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def shoot(driver: Any, name: str) -> Path:
    """Save a picture of the whole page as a test artefact."""
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"{name}.png"
    driver.save_screenshot(str(path))
    return path
