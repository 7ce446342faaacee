"""The report in a real browser, opened from disk: it asks for nothing, and hostile names stay text."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gradwatch.records import RuleCoverage, judge_run
from gradwatch.report import ReportData, to_html

from ..tab.browser import chromium, complaints, requests, shoot, wait_until, why_no_browser
from ..tab.synthetic import make_incidents, make_records

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is a browser"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def driver():
    with chromium(1500, 2000) as driver:
        driver.get("about:blank")
        yield driver


@pytest.fixture
def show(driver, tmp_path):
    """Open a report from disk; returns the addresses that were asked for."""

    def open_report(data: ReportData) -> list[str]:
        page = tmp_path / "report.html"
        page.write_text(to_html(data), encoding="utf-8")
        complaints(driver)
        requests(driver)
        driver.get(page.as_uri())
        wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the report's being ready")
        return [u for u in requests(driver) if u != page.as_uri()]

    return open_report


def colors(driver) -> set[int]:
    return set(
        driver.execute_script("""
        const c = document.querySelector('.gw-cells');
        return [...new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer))];
        """)
    )


def text(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent || ''", selector)


def test_report_from_disk_asks_for_nothing(driver, show, data):
    assert show(data) == []
    assert complaints(driver) == []
    assert len(colors(driver)) > 100
    assert 0xFF2E00E5 in colors(driver), "the step of nan is red"
    assert "Not healthy since step 300. The likely cause: the gradient vanishes." in text(driver, ".gw-headline")


@pytest.mark.parametrize("most", [1e-9, 1e-5, 1e3, 1e34, 1e38])
def test_an_axis_has_its_numbers_whatever_it_spans(driver, show, most):
    records = [replace(r, loss=most ** (i / 59)) for i, r in enumerate(make_records(steps=60))]
    show(ReportData.from_records(records))
    wait_until(lambda: driver.find_elements("css selector", ".gw-loss canvas"), "the loss")
    inked = """
        const c = document.querySelector('.gw-loss canvas'), over = document.querySelector('.gw-loss .u-over');
        const ratio = window.devicePixelRatio || 1, [left, tall] = [over.style.left, over.style.height].map(parseFloat);
        return c.getContext('2d').getImageData(0, 0, left * ratio - 4, tall * ratio).data.some((v) => v > 0);
    """
    assert driver.execute_script(inked)


def test_story_leads_to_its_place_in_the_picture(driver, show, data):
    show(data)
    driver.execute_script("document.querySelector('.gw-story[data-step=\"330\"] button').click()")
    wait_until(lambda: text(driver, ".gw-detail h2") == "h.4.mlp.c_fc.weight", "the layer's being shown")
    assert text(driver, ".gw-step output") == "step 330"
    wait_until(lambda: driver.find_elements("css selector", ".gw-detail .uplot"), "its curve")
    assert driver.execute_script("return document.querySelector('.gw-parts > div:last-child canvas').height") > 100
    assert complaints(driver) == []


def test_statistics_flow_and_zoom_work_without_a_server(driver, show, data):
    show(data)
    for name in ("output_rms", "update_ratio", "zero_fraction", "grad_norm"):
        driver.execute_script(
            "const s = document.querySelector('#gw-stat');s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            name,
        )
        wait_until(lambda: len(colors(driver)) > 3, f"the picture of {name}")
    for key in ("f", "n", "f", "c", "b", "s"):
        driver.execute_script(
            "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", key
        )
        time.sleep(0.1)
    assert complaints(driver) == []


@pytest.mark.parametrize("width", [1500, 900])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_of_the_report_is_cut_off(driver, show, data, width, theme):
    driver.set_window_size(width, 2000)
    show(data)
    if theme == "dark":
        driver.execute_script("document.querySelector('#theme').click()")
    driver.execute_script("document.querySelector('.gw-story button').click()")
    wait_until(lambda: driver.find_elements("css selector", ".gw-detail .uplot"), "the layer's curve")
    time.sleep(0.5)
    driver.execute_script("window.scrollTo(0, 0)")
    shoot(driver, f"report-{width}-{theme}")
    wider = driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0
    assert complaints(driver) == []


def test_hostile_names_do_nothing(driver, show, data):
    evil = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
    records = list(make_records(steps=60, spike=30))
    index = records[0].index
    hostile = replace(index, paths=tuple(f"{evil}.{p}" for p in index.paths))
    words = {"message": evil, "advice": evil, "name": evil}
    place = {"first_path": hostile.paths[3], "paths": hostile.paths[:4], "first_step": 30}
    incidents = [replace(i, **words, **place) for i in make_incidents()]
    shown = ReportData.from_records([replace(r, index=hostile, histograms={}) for r in records], incidents, name=evil)
    assert show(shown) == []
    driver.execute_script("document.querySelector('.gw-story button').click()")
    wait_until(lambda: text(driver, ".gw-detail h2") == hostile.paths[3], "the hostile layer's being shown")
    assert driver.title != "owned"
    assert driver.find_elements("css selector", "img") == []
    assert complaints(driver) == []


def test_report_of_a_healthy_run_says_so(driver, show):
    data = ReportData.from_records(make_records(steps=60, ill=False), name="fine")
    verdict = judge_run(coverage=[RuleCoverage(name="exploding", judged=60, seen=60, strip=(1.0,))], num_steps=60)
    show(replace(data, verdict=verdict))
    assert text(driver, ".gw-headline") == "Healthy: one rule judged 60 steps, and none fired."
    assert "1 of 1 rules judged enough" in text(driver, ".gw-coverage")
    assert complaints(driver) == []
