"""From a real Lightning run to what is seen: the tab over its logs, and the report that the callback writes."""

from __future__ import annotations

import re
import warnings

import pytest

from .browser import chromium, complaints, open_tab, requests, shoot, tensorboard, wait_until, why_no_browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is a browser"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in which one batch has a loss 400 times too large; returns the logs' folder and the callback."""
    from .training import train

    folder = tmp_path_factory.mktemp("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = train(folder, "bad-batch", fault="bad-batch", steps=140, bad_step=90)
    callback.report(folder / "report.html")
    return folder, callback


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


def text(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent || ''", selector)


HOVER = """
const over = document.querySelector('.u-over'), box = over.getBoundingClientRect();
for (const kind of ['mouseenter', 'mousemove']) {
  over.dispatchEvent(new MouseEvent(kind, {clientX: box.right - 1, clientY: box.top + 20, bubbles: true}));
}
"""


def test_a_statistic_measured_now_and_then_is_shown_up_to_the_end_of_the_run(driver, trained):
    folder, callback = trained
    # Curves lie over the columns of the heatmap; the last update ratio is of an earlier step than the last loss.
    assert callback.history[-1].step == 139
    assert "update_ratio" not in callback.history[-1].columns
    with tensorboard(folder) as address:
        open_tab(driver, address, "#gradwatch&p.gradwatch.stat=update_ratio")
        driver.execute_script(HOVER)
        wait_until(lambda: text(driver, ".u-legend .u-value") == "139", "the last step's being under the right edge")


def test_tab_shows_the_bad_batch_of_a_lightning_run(driver, trained):
    folder, callback = trained
    (incident,) = [i for i in callback.incidents if i.rule == "exploding"]
    with tensorboard(folder) as address:
        open_tab(driver, address)
        assert "one incident, treated at 90, over at" in text(driver, ".gw-verdict")
        driver.execute_script("document.querySelector('.gw-verdict button').click()")
        wait_until(lambda: text(driver, ".gw-step output") == "step 90", "the view's moving to the incident")
        wait_until(lambda: driver.find_elements("css selector", ".gw-detail .uplot"), "the layer's curve")
        rows = driver.execute_script("return [...document.querySelectorAll('.gw-label')].map((l) => l.title)")
        assert rows[0] == "wte.weight"
        assert "head.weight" in rows
        names = driver.execute_script("return [...document.querySelector('#gw-stat').options].map((o) => o.value)")
        assert {"grad_norm", "update_ratio", "output_rms", "grad_output_norm", "param_norm"} <= set(names)
        shoot(driver, "tab-lightning")
    assert incident.treatments == ("clip_to_limit",)
    assert complaints(driver) == []


def test_report_of_the_callback_explains_the_bad_batch(driver, trained):
    folder, _ = trained
    page = folder / "report.html"
    driver.get("about:blank")
    requests(driver)
    driver.get(page.as_uri())
    wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the report's being ready")
    assert re.fullmatch(r"Healthy: one incident, treated at 90, over at \d+\.", text(driver, ".gw-headline"))
    assert "The gradient exploded" in text(driver, "body")
    assert "clip_to_limit" in text(driver, ".gw-facts")
    assert [u for u in requests(driver) if u != page.as_uri()] == []
    assert complaints(driver) == []
    assert page.stat().st_size < 500_000
    shoot(driver, "report-lightning")
