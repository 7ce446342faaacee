"""Several runs over each other, cells by keys, colours that follow folding, case files, paper: in a real browser."""

from __future__ import annotations

import base64
import time
from dataclasses import replace

import numpy as np
import pytest

from gradwatch.records import CaseFile, CaseLayer
from gradwatch.report import ReportData, to_html
from gradwatch.runs import read_run
from gradwatch.sinks import case_name
from gradwatch.sinks._plain import sealed

from ..cli.conftest import write_run
from .browser import chromium, complaints, wait_until, why_no_browser
from .synthetic import write_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is a browser"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def driver():
    with chromium(1500, 2000) as driver:
        driver.get("about:blank")
        yield driver


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_folder(folder / "spike")
    write_run(folder / "small")
    write_run(folder / "third", spike=20)
    (incident, *_) = read_run(folder / "spike").incidents
    case = CaseFile(
        rule=incident.rule,
        name=incident.name,
        id=incident.id,
        step=incident.first_step,
        batch_idx=7,
        epoch=1,
        sample_ids=(3, 5),
        samples_from="`idx` of the batch",
        layers=(CaseLayer("h.2.mlp.c_proj.weight", 0.1, 40.0),),
    )
    (folder / "spike" / case_name(case)).write_text(sealed(case.to_json()))
    return {name: ReportData.from_run(read_run(folder / name)) for name in ("spike", "small", "third")}


@pytest.fixture
def show(driver, tmp_path):
    def open_report(*data: ReportData) -> None:
        page = tmp_path / "report.html"
        page.write_text(to_html(data if len(data) > 1 else data[0]), encoding="utf-8")
        complaints(driver)
        driver.get(page.as_uri())
        wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the report's being ready")

    yield open_report
    assert complaints(driver) == []


def texts(driver, selector: str) -> list[str]:
    found = (
        "return [...document.querySelectorAll(arguments[0])].filter((n) => n.offsetParent).map((n) => n.textContent)"
    )
    return driver.execute_script(found, selector)


def key(driver, name: str) -> None:
    driver.execute_script(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", name
    )


def test_runs_of_a_report_stand_over_each_other_on_shared_axes(driver, show, runs):
    show(*runs.values())
    assert texts(driver, ".gw-over .gw-key") == ["spike", "small", "third"]
    assert texts(driver, ".gw-panel > h2") == ["spike", "small", "third"]
    labels = texts(driver, ".gw-over-norm .u-legend .u-label")
    assert [label for label in labels if label != "step"] == ["spike", "small", "third"]
    heads = texts(driver, ".gw-over h3")
    assert heads[:2] == ["loss", "global norm before treatment"]
    assert "eight of ten layers" in heads[2]
    assert texts(driver, ".gw-story .gw-place")[0].startswith("From step 240")


INK = """
const probe = document.createElement('canvas').getContext('2d');
probe.fillStyle = getComputedStyle(document.body).getPropertyValue('--gw-line-2').trim();
probe.fillRect(0, 0, 1, 1);
const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
const canvas = [...document.querySelectorAll('.gw-detail canvas')].pop();
const seen = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let i = 0; i < seen.length; i += 4) {
  count += Math.abs(seen[i] - r) + Math.abs(seen[i + 1] - g) + Math.abs(seen[i + 2] - b) < 12;
}
return count;
"""
"""How much of the histograms' picture is in the second run's colour."""


def test_histograms_of_runs_lie_over_each_other(driver, show, runs):
    path = "h.2.mlp.c_proj.weight"
    assert path in runs["spike"].histograms
    counts = {}
    for names in (("spike",), ("spike", "again")):
        show(*(replace(runs["spike"], name=name) for name in names))
        key_of_first = "return [...document.querySelectorAll('.gw-detail .gw-key')].map((n) => n.textContent)"
        driver.execute_script("location.hash = arguments[0]", f"path={path}")
        driver.refresh()
        wait_until(lambda: texts(driver, ".gw-detail > h2") == [path], "the layer's part")
        wait_until(lambda: texts(driver, ".gw-detail canvas"), "the histograms")
        time.sleep(0.5)
        assert driver.execute_script(key_of_first) == (list(names) if len(names) > 1 else [])
        counts[len(names)] = driver.execute_script(INK)
    assert counts[2] > counts[1] + 300


def test_one_run_alone_has_nothing_over_it(driver, show, runs):
    show(runs["small"])
    assert not driver.execute_script("return document.querySelector('.gw-over').offsetParent")


def test_a_run_is_added_and_taken_away_by_its_box(driver, show, runs):
    show(*runs.values())
    driver.execute_script("document.querySelectorAll('.gw-more input')[1].click()")
    wait_until(lambda: texts(driver, ".gw-panel > h2") == ["spike", "small"], "the third run's going")
    driver.execute_script("document.querySelectorAll('.gw-more input')[1].click()")
    wait_until(lambda: len(texts(driver, ".gw-panel > h2")) == 3, "its coming back")
    assert texts(driver, ".gw-panel > h2") == ["spike", "small", "third"]


def test_every_cell_is_reached_and_read_by_keys(driver, show, runs):
    show(runs["small"])
    driver.execute_script("document.querySelector('.gw-plot').focus()")
    assert driver.execute_script("return document.activeElement.className") == "gw-plot"
    key(driver, "ArrowDown")
    cells = set()
    for _ in range(2):
        for _ in range(60):
            cells.add("".join(texts(driver, ".gw-cell")))
            key(driver, "ArrowLeft")
        for _ in range(60):
            key(driver, "ArrowRight")
        key(driver, "ArrowDown")
    assert {cell.split(",")[0] for cell in cells} == {"encoder.weight", "decoder.weight"}
    assert "encoder.weight, step 0: 1" in cells
    assert "decoder.weight, step 59: 2" in cells
    assert len(cells) == 120


def test_folding_colours_anew(driver, show, runs):
    show(runs["spike"])
    ends = "return [...document.querySelectorAll('.gw-legend')].map((n) => n.textContent).join()"
    before = driver.execute_script(ends)
    key(driver, "c")
    wait_until(lambda: driver.execute_script(ends) != before, "colours of the folded rows")
    key(driver, "c")
    wait_until(lambda: driver.execute_script(ends) == before, "the colours of before")
    assert driver.execute_script(ends) == before


def test_the_case_file_stands_with_its_incident(driver, show, runs):
    show(runs["spike"])
    told = texts(driver, ".gw-story .gw-case summary")
    assert told == ["The case file"]
    driver.execute_script("document.querySelector('.gw-story .gw-case summary').click()")
    where = "step 240, batch 7 of epoch 1, samples 3, 5 (`idx` of the batch)"
    assert texts(driver, ".gw-story .gw-case dd")[0] == where
    assert not texts(driver, ".gw-line .gw-case dd")
    driver.execute_script("document.querySelector('.gw-line').click()")
    wait_until(lambda: where in texts(driver, ".gw-line .gw-case dd"), "the case of the chosen incident")
    ends = (
        "return ['.gw-incidents .gw-case', '.gw-incidents .gw-scroll'].map((s) => document.querySelector(s)"
        ".getBoundingClientRect().bottom)"
    )
    case, box = driver.execute_script(ends)
    assert case <= box  # all of it is on view


def test_a_case_file_is_open_on_paper_and_fits_a_narrow_page(driver, show, runs):
    is_open = "return document.querySelector('.gw-story .gw-case').open"
    driver.set_window_size(500, 2000)
    try:
        show(runs["spike"])
        assert not driver.execute_script(is_open)
        driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        assert driver.execute_script(is_open)
        driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert not driver.execute_script(is_open)
        driver.execute_script("document.querySelector('.gw-story .gw-case summary').click()")
        assert driver.execute_script(is_open)
        beyond = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert driver.execute_script(beyond) <= 0
    finally:
        driver.set_window_size(1500, 2000)


def test_without_scripts_there_is_a_picture_with_its_legend(driver, tmp_path, runs):
    page = tmp_path / "report.html"
    page.write_text(to_html([runs["spike"], runs["small"]]), encoding="utf-8")
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(page.as_uri())
        pictures = driver.find_elements("css selector", ".gw-static svg")
        assert len(pictures) == 2
        for picture in pictures:
            assert picture.is_displayed()
            assert picture.size["height"] > 200
        words = [text.text for text in pictures[0].find_elements("css selector", "text")]
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert {"zero", "not measured", "NaN or ∞", "loss", "global norm", "step 399"} <= set(words)
    assert complaints(driver) == []


def test_paper_has_the_whole_picture_and_its_legend(driver, show, runs):
    show(runs["spike"])
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    driver.set_window_size(794, 1123)
    try:
        time.sleep(0.5)
        (picture,) = driver.find_elements("css selector", ".gw-static svg")
        assert picture.is_displayed()
        assert picture.rect["x"] > 0
        assert picture.rect["x"] + picture.rect["width"] <= 794
        assert not driver.find_element("css selector", ".gw-panels").is_displayed()
        assert not driver.find_element("css selector", ".gw-bar").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        driver.set_window_size(1500, 2000)
    pdf = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")


def test_where_there_is_no_static_picture_the_drawn_one_fits_the_paper(driver, show, runs):
    show(runs["spike"])
    driver.execute_script("document.querySelector('.gw-static').remove()")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        width = driver.execute_script("return document.querySelector('.gw-heat').getBoundingClientRect().width")
        shown = driver.execute_script("return document.querySelector('.gw-axis').getBoundingClientRect().width")
        assert shown <= 700
        assert width > 0
        assert driver.find_element("css selector", ".gw-legend").is_displayed()
        driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert driver.execute_script("return document.querySelector('.gw-axis').getBoundingClientRect().width") > 1000
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def legend_colors(driver, place: str) -> dict[str, str]:
    """Label -> colour of the curve beside it, of a chart's legend."""
    script = """return [...document.querySelectorAll(arguments[0] + ' .u-series')]
      .map((n) => [n.querySelector('.u-label').textContent, n.querySelector('.u-marker')])
      .map(([label, marker]) => [label, marker ? getComputedStyle(marker).borderColor : ''])"""
    return {label: color for label, color in driver.execute_script(script, place) if label != "step"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_norm_has_a_colour_of_its_own(driver, show, runs, theme):
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    try:
        show(runs["spike"])
        found = legend_colors(driver, ".gw-norm")
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert {"global norm before treatment", "after treatment", "a clip’s limit"} <= found.keys()
    assert len(set(found.values())) == len(found)


COLOR_COUNT = """
const probe = document.createElement('canvas').getContext('2d');
probe.fillStyle = getComputedStyle(document.body).getPropertyValue(arguments[0]).trim();
probe.fillRect(0, 0, 1, 1);
const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
const canvas = document.querySelector('.gw-norm canvas');
const seen = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let i = 0; i < seen.length; i += 4) {
  count += Math.abs(seen[i] - r) + Math.abs(seen[i + 1] - g) + Math.abs(seen[i + 2] - b) < 12;
}
return count;
"""


def test_a_norm_that_was_not_changed_is_not_hidden_behind_the_one_after_treatment(driver, show, runs):
    show(runs["spike"])  # clipped at 4 steps of 400
    produced, treated = (driver.execute_script(COLOR_COUNT, name) for name in ("--gw-produced", "--gw-treated"))
    assert produced > 20 * treated > 0


def test_a_dark_page_is_printed_as_a_light_one(driver, show, runs):
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    is_dark = "return document.body.classList.contains('gw-dark')"
    try:
        show(runs["spike"])
        assert driver.execute_script(is_dark)
        driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        assert not driver.execute_script(is_dark)
        driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert driver.execute_script(is_dark)
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_that_lies_over_the_cells_wipes_them_out_on_paper(driver, show, runs):
    """A canvas is printed stroke by stroke, and a `clearRect` among them as a white one."""
    show(runs["small"])
    driver.execute_script(
        """window.wiped = [];
        const clear = CanvasRenderingContext2D.prototype.clearRect;
        CanvasRenderingContext2D.prototype.clearRect = function (...box) {
          window.wiped.push(this.canvas.className);
          return clear.apply(this, box);
        };
        document.querySelector('.gw-plot').focus();"""
    )
    for name in ("ArrowLeft", "ArrowDown", "f", "f"):
        key(driver, name)
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    wiped = driver.execute_script("return window.wiped")
    driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert wiped  # the charts', each of which has a place of its own
    assert set(wiped) == {""}


def test_of_several_runs_each_has_its_own_line_and_leads_to_its_own_incident(driver, show, runs):
    show(*runs.values())
    driver.execute_script("document.querySelector('.gw-verdict').hidden = false")
    lines = texts(driver, ".gw-verdict > div")
    assert [line.split(":")[0] for line in lines] == ["spike", "small", "third"]
    shown = "return [...document.querySelectorAll('.gw-verdict > div')].map((n) => Boolean(n.querySelector('button')))"
    has = [bool(data.incidents) for data in runs.values()]
    assert driver.execute_script(shown) == has
    last = max(place for place, told in enumerate(has) if told)
    driver.execute_script(f"document.querySelectorAll('.gw-verdict > div')[{last}].querySelector('button').click()")
    first = list(runs.values())[last].verdict.first[1]
    wait_until(lambda: texts(driver, ".gw-step output")[0] == f"step {first}", "the run's own incident")


@pytest.mark.parametrize("width", [400, 900])
def test_incidents_are_read_without_scrolling_sideways(driver, show, runs, width):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        show(*runs.values())
        for place in (".gw-incidents .gw-scroll", "html"):
            node = f"document.querySelector({place!r})"
            assert driver.execute_script(f"return {node}.scrollWidth - {node}.clientWidth") <= 0
        ends = "return [...document.querySelectorAll('.gw-line td')].map((n) => n.getBoundingClientRect().right)"
        assert max(driver.execute_script(ends)) <= width
        # What stands alone in a cell is named there, for the heads are gone.
        named = "return getComputedStyle(document.querySelector('.gw-line td[data-head=bar]'), '::before').content"
        assert "bar" in driver.execute_script(named)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_loss_that_was_nan_throughout_has_its_picture(driver, show, runs):
    steps = runs["small"].scalars["loss"][0]
    scalars = {**runs["small"].scalars, "loss": (steps, np.full(len(steps), np.nan))}
    show(replace(runs["small"], scalars=scalars))
    assert driver.execute_script("return document.querySelector('.gw-loss').offsetParent !== null")
    show(replace(runs["small"], scalars=scalars), runs["third"])
    assert texts(driver, ".gw-over-loss .u-legend .u-label")[1:] == ["small", "third"]
