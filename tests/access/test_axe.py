"""The pages under axe-core, the rules that browsers' accessibility tools share: nothing serious in any of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.report import write_report
from gradwatch.runs import read_run

from ..tab.browser import chromium, open_tab, tensorboard, wait_until, why_no_browser
from ..tab.synthetic import write_events, write_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is a browser"),
    pytest.mark.timeout(600),
]

SERIOUS = ("serious", "critical")
WIDTHS = (1500, 400)


@pytest.fixture(scope="module")
def axe() -> str:
    """The script. `AXE_CORE` names another release's `axe.min.js`."""
    if "AXE_CORE" in os.environ:
        return Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("access")
    write_folder(folder / "runs" / "spike" / "gradwatch")
    write_events(folder / "logs" / "spike")
    write_report(folder / "runs" / "spike" / "gradwatch", folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


def found(driver, axe: str) -> list[str]:
    """Return what axe finds serious in the document on view, a line each: rule, where, what."""
    driver.execute_script(axe + "\nwindow.axe = window.axe || axe;")
    result = driver.execute_async_script(
        "const done = arguments[0]; window.axe.run(document).then(done, (e) => done({problem: String(e)}));"
    )
    assert "problem" not in result, result
    assert len(result["passes"]) > 5  # it looked at something
    return [
        f"{v['id']} ({v['impact']}) at {' '.join(map(str, node['target']))}: {node['failureSummary']}"
        for v in result["violations"]
        if v["impact"] in SERIOUS
        for node in v["nodes"]
    ]


def paint(driver, dark: bool) -> None:
    """Let the browser ask for light or dark pages."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def is_dark(driver) -> bool:
    return driver.execute_script("return document.body.classList.contains('gw-dark')")


LOOKS = [
    pytest.param(width, dark, id=f"{width}-{'dark' if dark else 'light'}") for width in WIDTHS for dark in (False, True)
]


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_nothing_serious_in_a_report(driver, axe, folder, width, dark) -> None:
    driver.set_window_size(width, 1300)
    paint(driver, dark)
    driver.get((folder / "report.html").as_uri())
    wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the report's being ready")
    assert is_dark(driver) == dark
    assert found(driver, axe) == []


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_nothing_serious_in_the_page_of_serve(driver, axe, served, width, dark) -> None:
    driver.set_window_size(width, 1300)
    paint(driver, dark)
    driver.get(served)
    wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the page's being ready")
    assert is_dark(driver) == dark
    driver.execute_script("document.querySelector('.gw-line')?.click()")
    assert found(driver, axe) == []


def test_nothing_serious_in_the_tab(driver, axe, folder) -> None:
    with tensorboard(folder / "logs") as address:
        driver.set_window_size(1500, 1300)
        open_tab(driver, address, "#gradwatch&p.gradwatch.run=spike")
        for dark in (False, True):
            theme = "window.parent.document.body.classList.toggle('dark-mode', arguments[0])"
            driver.execute_script(theme, dark)
            wait_until(lambda dark=dark: is_dark(driver) == dark, "the tab's following the theme")
            assert found(driver, axe) == []
        driver.execute_script("document.querySelector('.gw-line')?.click()")
        driver.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', {key: '?', bubbles: true}))")
        assert found(driver, axe) == []
        driver.switch_to.default_content()


@pytest.fixture(scope="module")
def served(folder):
    """The address of `gradwatch serve` in a process of its own."""
    command = [sys.executable, "-u", "-m", "gradwatch", "serve", str(folder / "runs"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", said)
        if not address:
            process.kill()
            pytest.fail(f"serve said no address: {said}{process.stdout.read()}")
        yield address.group()
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.mark.parametrize(("back", "text"), [("#ffffff", "#1f2328"), ("#111111", "#e0e0e0")], ids=["light", "dark"])
def test_nothing_serious_in_a_notebooks_card(driver, axe, folder, tmp_path, back, text) -> None:
    page = tmp_path / "card.html"
    shown = read_run(folder / "runs" / "spike" / "gradwatch")
    body = f"<main><h1>cells</h1>{shown._repr_html_()}{shown.incidents[0]._repr_html_()}</main>"
    head = "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>cells</title>"
    page.write_text(f"{head}<body style='background:{back};color:{text}'>{body}</html>", encoding="utf-8")
    driver.get(page.as_uri())
    assert found(driver, axe) == []


def test_axe_finds_what_is_wrong(driver, axe, tmp_path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!DOCTYPE html><html lang='en'><title>t</title><main><h1>t</h1>"
        "<p style='color:#ccc;background:#fff'>faint</p><button></button><input></main></html>"
    )
    driver.get(page.as_uri())
    said = "\n".join(found(driver, axe))
    assert all(rule in said for rule in ("color-contrast", "button-name", "label"))
