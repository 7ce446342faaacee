"""TensorBoard's own dashboards: as many entries as runs, titles and descriptions that say what is shown."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradwatch import Watch
from gradwatch.sinks import SCALARS, TensorBoardSink

from .browser import chromium, complaints, open_tab, shoot, tensorboard, wait_until, why_no_browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is a browser"),
    pytest.mark.timeout(600),
]

NUM_RUNS = 20


def train(folder: Path) -> None:
    """Train as a trainer's logger would have it: events in the run's folder, the run folder within."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    with SummaryWriter(str(folder)) as writer:
        sinks = [TensorBoardSink(writer, histograms_apart=1)]
        with Watch(net, optimizer, sinks=sinks, run_dir=folder / "gradwatch", log_every=2) as watch:
            for _ in range(8):
                loss = (net(torch.randn(16, 4)) - 1).square().mean()
                loss.backward()
                watch.step(loss=loss)
                optimizer.zero_grad()
        writer.add_text("mine", "text")


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for number in range(NUM_RUNS):
        train(folder / f"version_{number}")
    return folder


@pytest.fixture(scope="module", params=[(), ("--load_fast=false",)], ids=["fast-loader", "python-loader"])
def server(logdir, request):
    with tensorboard(logdir, *request.param) as address:
        wait_until(lambda: len(fetch(address, "runs")) >= NUM_RUNS, "the runs' being read")
        # Both loaders read on: whatever they would still find is there by then.
        time.sleep(3)
        yield address


def fetch(address: str, route: str):
    with urllib.request.urlopen(f"{address}data/{route}", timeout=30) as response:
        return json.load(response)


def test_twenty_runs_are_twenty_entries(server) -> None:
    names = {f"version_{number}" for number in range(NUM_RUNS)}
    assert set(fetch(server, "runs")) == names
    with chromium() as driver:
        driver.get(f"{server}#timeseries")
        rows = """
            const rows = document.querySelectorAll('runs-data-table tb-data-table-content-row');
            return [...rows].map((row) => row.textContent);
        """
        # A page of the table holds ten.
        count = "return (document.querySelector('.mat-mdc-paginator-range-label') || {}).textContent"
        wait_until(lambda: driver.execute_script(rows), "the list of runs")
        shoot(driver, "twenty-runs")
        assert f"of {NUM_RUNS}" in (driver.execute_script(count) or f"of {len(driver.execute_script(rows))}")
        open_tab(driver, server)
        options = driver.execute_script(
            "return [...document.querySelector('.gw-bar select').options].map((o) => o.value)"
        )
        assert sorted(options) == sorted(names)
        assert complaints(driver) == []


def test_the_custom_scalars_dashboard_has_bands_of_tags_that_exist(server) -> None:
    layout = fetch(server, "plugin/custom_scalars/layout")
    (category,) = layout["category"]
    assert category["title"] == "gradwatch"
    tags = fetch(server, "plugin/scalars/tags")["version_7"]
    for chart in category["chart"]:
        (series,) = chart["margin"]["series"]
        assert {series["value"], series["lower"], series["upper"]} <= set(tags), chart["title"]


def test_every_tag_has_a_description_with_its_unit(server) -> None:
    ours = 0
    for plugin in ("scalars", "histograms"):
        for run, tags in fetch(server, f"plugin/{plugin}/tags").items():
            for tag, told in tags.items():
                assert "Unit: " in told["description"], (plugin, run, tag)
                ours += 1
    assert ours > NUM_RUNS * len(SCALARS)


def test_histograms_say_that_they_are_of_the_logarithm(server) -> None:
    tags = fetch(server, "plugin/histograms/tags")["version_0"]
    assert set(tags) == {f"gradwatch log10 |gradient|/{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
