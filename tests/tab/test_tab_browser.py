"""The tab in a real browser: event files by the real sink, a real `tensorboard` process, both of its loaders."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from .browser import chromium, complaints, open_tab, requests, shoot, tensorboard, wait_until, why_no_browser
from .synthetic import write_events, write_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is a browser"),
    pytest.mark.timeout(600),
]

LOADERS = [pytest.param((), id="fast-loader"), pytest.param(("--load_fast=false",), id="python-loader")]
COLORS = """
const c = document.querySelector('.gw-cells'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
const seen = {};
for (let i = 0; i < d.length; i += 4) { const k = [d[i], d[i + 1], d[i + 2]].join(); seen[k] = (seen[k] || 0) + 1; }
return seen;
"""
RED, GREY = "229,0,46", "150,150,150"


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def server(logdir):
    with tensorboard(logdir) as address:
        yield address


@pytest.fixture
def page(driver, server):
    """The tab with the run `spike` on view; at the end of the test nobody may have complained."""
    driver.set_window_size(1500, 1300)
    complaints(driver)
    open_tab(driver, server, "#gradwatch&p.gradwatch.run=spike")
    yield driver
    assert complaints(driver) == []


def choose(driver, select: str, value: str) -> None:
    driver.execute_script(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        select, value,
    )  # fmt: skip


def link(driver) -> dict[str, str]:
    pairs = driver.execute_script("return window.parent.location.hash").lstrip("#").split("&")
    return {
        k.removeprefix("p.gradwatch."): v
        for k, _, v in (p.partition("=") for p in pairs)
        if k.startswith("p.gradwatch.")
    }


def text(driver, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent || ''", selector)


def fetch(address: str):
    with urllib.request.urlopen(address, timeout=60) as response:
        return json.load(response)


def keys(driver, *pressed: str) -> None:
    for key in pressed:
        driver.execute_script(
            "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", key
        )


@pytest.mark.parametrize("flags", LOADERS)
def test_heatmap_shows_the_run_with_either_loader(driver, logdir, flags):
    complaints(driver)
    with tensorboard(logdir, *flags) as address:
        open_tab(driver, address, "#gradwatch&p.gradwatch.run=spike")
        colors = driver.execute_script(COLORS)
        assert len(colors) > 100
        assert colors[RED] > 10, "one step of nan"
        assert colors[GREY] > 1000, "a block that receives nothing from step 300 on"
        assert text(driver, ".gw-verdict").startswith(
            "Not healthy since step 300: vanishing in h.0.attn.c_attn.weight, 2 more"
        )
        shoot(driver, f"tab-{'python' if flags else 'fast'}-loader")
    assert complaints(driver) == []


def test_every_step_is_kept_by_either_loader(driver, tmp_path):
    write_events(tmp_path / "long", blocks=1, steps=600, tasks=False)
    for flags in ((), ("--load_fast=false",)):
        with tensorboard(tmp_path, *flags) as address:
            open_tab(driver, address)
            assert driver.execute_script("return document.querySelector('.gw-step input').max") == "599"


def test_click_on_an_incident_moves_the_view(page):
    page.execute_script("document.querySelectorAll('.gw-line')[0].click()")
    wait_until(lambda: text(page, ".gw-detail h2") == "h.2.mlp.c_proj.weight", "the layer's being shown")
    assert text(page, ".gw-step output") == "step 240"
    assert link(page) == {"run": "spike", "step": "240", "path": "h.2.mlp.c_proj.weight"}
    wait_until(lambda: page.find_elements("css selector", ".gw-detail .uplot"), "the layer's curve")
    assert page.execute_script("return document.querySelector('.gw-detail canvas').height") > 100
    page.execute_script("document.querySelector('.gw-tick[aria-label$=\"at step 330\"]').click()")
    wait_until(lambda: link(page)["step"] == "330", "the tick's moving the view")
    assert link(page)["path"] == "h.4.mlp.c_fc.weight"


def pointer(driver, *moves: tuple[str, float]) -> None:
    """Send pointer events to the heatmap's first row, each at a share of its width."""
    driver.execute_script(
        """
        const plot = document.querySelector('.gw-plot'), box = plot.getBoundingClientRect();
        for (const [type, share] of arguments[0]) {
          const place = {clientX: box.left + share * box.width, clientY: box.top + 3};
          plot.dispatchEvent(new PointerEvent(type, {...place, button: 0, pointerId: 1, bubbles: true}));
        }
        """,
        [list(m) for m in moves],
    )


def test_click_on_a_cell_shows_its_layer(page):
    pointer(page, ("pointermove", 0.5), ("pointerdown", 0.5), ("pointerup", 0.5))
    wait_until(lambda: text(page, ".gw-detail h2") == "wte.weight", "the layer's being shown")
    assert abs(int(link(page)["step"]) - 200) <= 1


def test_statistic_selector_changes_the_picture(page):
    before = page.execute_script(COLORS)
    choose(page, "#gw-stat", "output_rms")
    wait_until(lambda: "activation rms" in text(page, ".gw-legend"), "the statistic's change")
    assert page.execute_script(COLORS) != before
    labels = page.execute_script("return [...document.querySelectorAll('.gw-label')].map((l) => l.title)")
    assert "h.2.mlp.c_proj" in labels
    choose(page, "#gw-stat", "update_ratio")
    wait_until(lambda: "guide 1e-3" in text(page, ".gw-legend"), "the guide of the update ratio")


def test_run_selector_and_two_runs_side_by_side(page):
    choose(page, "#gw-other", "healthy")
    wait_until(lambda: len(page.find_elements("css selector", ".gw-panel")) == 2, "the second run")
    assert [h.text for h in page.find_elements("css selector", ".gw-panel > h2")] == ["spike", "healthy"]
    choose(page, "#gw-other", "")
    choose(page, "#gw-run", "healthy")
    wait_until(lambda: text(page, ".gw-verdict").startswith("Not enough seen: "), "the other run")
    assert link(page)["run"] == "healthy"


def test_flow_view_has_a_bar_per_layer_and_a_slider(page):
    page.execute_script("document.querySelector('[data-view=flow]').click()")
    wait_until(lambda: page.find_elements("css selector", ".gw-flow canvas"), "the flow view")
    page.execute_script(
        "const s = document.querySelector('.gw-step input'); s.value = '240'; s.dispatchEvent(new Event('input'))"
    )
    assert text(page, ".gw-step output") == "step 240"
    assert link(page)["view"] == "flow"
    shoot(page, "tab-flow")


def test_filter_fold_and_biases_choose_the_rows(page):
    def count() -> int:
        return page.execute_script("return document.querySelectorAll('.gw-label').length")

    assert count() == 26
    keys(page, "b")
    assert count() == 52
    keys(page, "b", "c")
    assert count() == 2
    assert page.execute_script("return document.querySelectorAll('.gw-block.gw-folded').length") == 6
    keys(page, "c")
    page.execute_script(
        "const f = document.querySelector('#gw-filter'); f.value = 'attn h.1'; f.dispatchEvent(new Event('input'))"
    )
    assert count() == 2


def test_keys_move_by_steps_layers_and_incidents(page):
    keys(page, "n")
    wait_until(lambda: link(page).get("step") == "240", "the first incident")
    keys(page, "ArrowRight", "ArrowDown")
    assert link(page)["step"] == "241"
    assert link(page)["path"] == "h.3.attn.c_attn.weight"
    keys(page, "n")
    second = page.execute_script("return document.querySelectorAll('.gw-line')[1].dataset.step")
    assert second in ("300", "330")
    wait_until(lambda: link(page).get("step") == second, "the next incident, in the order of the table")
    keys(page, "?")
    assert page.execute_script("return !document.querySelector('.gw-help').hidden")
    keys(page, "Escape")
    assert "step" not in link(page)


def test_zoom_asks_for_these_steps_alone_and_comes_back(page):
    pointer(page, ("pointerdown", 0.5), ("pointermove", 0.6), ("pointermove", 0.75), ("pointerup", 0.75))
    wait_until(lambda: link(page).get("to") == "300", "the zoom")
    wait_until(
        lambda: int(page.execute_script("return document.querySelector('.gw-step input').max")) < 110, "fewer steps"
    )
    page.execute_script("document.querySelector('.gw-reset').click()")
    wait_until(lambda: "to" not in link(page), "the whole run")
    assert "to" not in link(page)


def test_link_brings_back_the_whole_view(driver, server):
    where = "#gradwatch&" + "&".join(
        f"p.gradwatch.{k}={v}" for k, v in {"run": "spike", "other": "healthy", "stat": "param_norm", "step": "40",
        "path": "h.1.mlp.c_fc.weight", "biases": "1", "view": "flow", "folded": "h.0"}.items()
    )  # fmt: skip
    open_tab(driver, server, where)
    wait_until(lambda: text(driver, ".gw-detail h2") == "h.1.mlp.c_fc.weight", "the layer of the link")
    assert driver.execute_script("return [...document.querySelectorAll('select')].map((s) => s.value)") == [
        "spike",
        "healthy",
        "param_norm",
    ]
    assert driver.execute_script("return document.querySelector('#gw-biases').checked")
    assert text(driver, ".gw-step output") == "step 40"
    assert link(driver)["folded"] == "h.0"


def test_reload_of_the_data_keeps_the_view(page):
    keys(page, "n", "c")
    wait_until(lambda: link(page).get("step") == "240", "the incident")
    before = link(page)
    page.switch_to.default_content()
    page.find_element("css selector", "button.reload-button, [title*='eload'], [aria-label*='eload']").click()
    time.sleep(2)
    page.switch_to.frame(page.find_elements("css selector", "iframe")[0])
    assert link(page) == before
    assert text(page, ".gw-step output") == "step 240"


def test_dark_mode_follows_tensorboard(page):
    def background() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = background()
    page.execute_script("window.parent.document.body.classList.add('dark-mode')")
    wait_until(lambda: background() != light, "the dark page")
    shoot(page, "tab-dark")
    page.execute_script("window.parent.document.body.classList.remove('dark-mode')")
    wait_until(lambda: background() == light, "the light page")
    assert background() == light


@pytest.mark.parametrize("width", [1500, 900])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off(page, width, theme):
    page.set_window_size(width, 2000)
    page.execute_script("window.parent.document.body.classList.toggle('dark-mode', arguments[0])", theme == "dark")
    choose(page, "#gw-other", "healthy")
    keys(page, "n")
    wait_until(lambda: page.find_elements("css selector", ".gw-detail .uplot"), "the layer's curve")
    time.sleep(0.5)
    shoot(page, f"tab-{width}-{theme}")
    wider = page.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    page.execute_script("window.parent.document.body.classList.remove('dark-mode')")
    assert wider <= 0


def test_page_asks_only_its_own_server(driver, server):
    requests(driver)
    open_tab(driver, server)
    asked = [u for u in requests(driver) if "/plugin/gradwatch/" in u]
    assert any("/matrix" in u for u in asked)
    assert all(u.startswith(server) for u in asked)


def test_500_layers_by_5000_steps_are_usable(driver, tmp_path, capsys):
    write_events(tmp_path / "big", blocks=125, steps=5000, tasks=False, spike=4000, sampled_every=250)
    with tensorboard(tmp_path) as address:
        first = open_tab(driver, address)
        again = open_tab(driver, address)
        colors = driver.execute_script(COLORS)
        shoot(driver, "tab-500x5000")
    with capsys.disabled():
        print(f"\n500 layers x 5,000 steps: ready in {first} ms, again in {again} ms")
    assert colors[RED] >= 1
    assert again < 20_000
    assert complaints(driver) == []


@pytest.mark.parametrize(
    ("story", "said"),
    [
        pytest.param("empty", "There are no gradwatch data here yet", id="no-data"),
        pytest.param("newer", "was written in schema 9", id="newer-schema"),
        pytest.param("truncated", "is damaged", id="truncated-tensors"),
        pytest.param("headless", "has no list of paths", id="no-index"),
    ],
)
@pytest.mark.parametrize("flags", LOADERS)
def test_data_that_cannot_be_shown_are_told_in_the_tab(driver, tmp_path, story, said, flags):
    write_damaged(tmp_path / "run", story)
    with tensorboard(tmp_path, *flags) as address:
        open_tab(driver, address)
        assert said in text(driver, "body")
        shoot(driver, f"tab-{story}")
        listing = fetch(f"{address}data/plugins_listing")
        assert listing["scalars"]["enabled"]


def write_damaged(folder: Path, story: str) -> None:
    """Write an event file with one scalar, and gradwatch tensors that are wrong in one way."""
    import numpy as np
    from tensorboard.compat.proto import types_pb2
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from torch.utils.tensorboard import SummaryWriter

    from .synthetic import make_index

    def tensor(tag: str, content: dict[str, object], **value: object) -> Summary.Value:
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in value.pop("shape", ())])  # type: ignore[attr-defined]
        metadata = SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name="gradwatch", content=json.dumps(content).encode()),
            data_class=DATA_CLASS_TENSOR,
        )
        return Summary.Value(tag=tag, metadata=metadata, tensor=TensorProto(tensor_shape=shape, **value))

    writer = SummaryWriter(str(folder))
    writer.add_scalar("loss", 1.0, 0)
    schema = 9 if story == "newer" else 1
    head = {"schema": schema, "name": "gradwatch"}
    index = make_index(1)
    values = []
    if story != "empty":
        if story != "headless":
            text = json.dumps(index.to_json()).encode()
            values.append(
                tensor("gradwatch/_index", {**head, "kind": "index"}, dtype=types_pb2.DT_STRING, string_val=[text])
            )
        n = int(index.is_parameter.sum())
        content = np.ones(n, np.float32).tobytes()[: 7 if story == "truncated" else None]
        values.append(
            tensor(
                "gradwatch/grad_norm", {**head, "kind": "statistic", "statistic": "grad_norm", "over": "parameter"},
                dtype=types_pb2.DT_FLOAT, tensor_content=content, shape=(n,),
            )
        )  # fmt: skip
        writer._get_file_writer().add_summary(Summary(value=values), 0)
    writer.close()


def test_tensorboard_starts_where_torch_cannot_be_imported(logdir, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "gradwatch.py").write_text("raise ImportError('no gradwatch here')")
    paths = {"PYTHONPATH": str(tmp_path)}
    with tensorboard(logdir, environment=paths) as address:
        runs = fetch(f"{address}data/plugin/gradwatch/runs")["runs"]
        assert {r["id"] for r in runs} == {"healthy", "spike"}


def test_server_answers_what_is_wrong_with_a_request_and_goes_on(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server}data/plugin/gradwatch/matrix?run=x", timeout=60)
    caught.value.close()
    assert caught.value.code == 422
    assert fetch(f"{server}data/plugins_listing")["gradwatch"]["enabled"]


def told_step(driver) -> str:
    return driver.execute_script("return document.querySelector('.gw-step output').textContent")


def test_a_run_folder_under_tensorboard_shows_the_spike_at_its_step_and_n_walks_all_incidents(driver, tmp_path):
    write_events(tmp_path / "1", window=50)
    write_folder(tmp_path / "1" / "gradwatch")
    complaints(driver)  # of the page before
    with tensorboard(tmp_path) as address:
        open_tab(driver, address, "#gradwatch&p.gradwatch.run=1")
        runs = driver.execute_script("return [...document.querySelector('#gw-run').options].map((o) => o.value)")
        assert runs == ["1"]
        assert "since step 300: vanishing" in driver.find_element("css selector", ".gw-verdict").text
        driver.find_element("css selector", ".gw-verdict button").click()
        wait_until(lambda: told_step(driver) == "step 300", "the view's moving to what the verdict names")
        rows = driver.execute_script("return [...document.querySelectorAll('.gw-line')].map((l) => l.dataset.step)")
        assert sorted(rows) == ["240", "300", "330"]
        at = rows.index("300")
        for step in [*rows[at + 1 :], *rows[: at + 1]]:
            driver.find_element("css selector", "body").send_keys("n")
            wait_until(lambda step=step: told_step(driver) == f"step {step}", f"the view's moving to step {step}", 20)
        assert driver.find_elements("css selector", ".gw-loss .uplot")
        shoot(driver, "tab-folder")
    assert complaints(driver) == []


def test_serve_shows_the_same_page_without_tensorboard(driver, tmp_path):
    write_folder(tmp_path / "1")
    complaints(driver)  # of the page before
    command = [sys.executable, "-m", "gradwatch", "serve", str(tmp_path), "--port", "0"]
    # A test run in a shell's background ignores Ctrl-C, and so would its children: here somebody types it.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        try:
            address = re.search(r"http://\S+", process.stderr.readline()).group()
            driver.get(address + "#run=1")
            wait_until(lambda: driver.execute_script("return document.body.dataset.ready"), "the page's being ready")
            assert "exploding" in driver.execute_script("return document.querySelector('.gw-incidents').textContent")
            driver.execute_script("document.querySelectorAll('.gw-line')[0].click()")
            wait_until(lambda: told_step(driver).startswith("step "), "the view's moving to an incident")
            shoot(driver, "serve")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    assert complaints(driver) == []


def test_the_last_column_ends_where_its_steps_do(page):
    """A window of steps at its last one, what is measured now and then at the run's end; else as wide as the others."""
    script = """
    const done = arguments[arguments.length - 1];
    const named = (r) => r.name.endsWith('/static/index.js');
    const base = performance.getEntriesByType('resource').find(named).name;
    import(base.replace('index.js', 'matrix.js')).then(({extent}) => done([
      extent({steps: [0, 50, 100, 150], ends: [49, 99, 149, 159], count: 4}),
      extent({steps: [0, 50, 100, 150], ends: [0, 50, 100, 150], count: 4}, 159),
      extent({steps: [0, 50, 100, 150], ends: [0, 50, 100, 150], count: 4}),
      extent({steps: [7], ends: [7], count: 1}),
      extent({steps: [], ends: [], count: 0}),
    ]));
    """
    assert page.execute_async_script(script) == [[0, 160], [0, 160], [0, 200], [7, 8], [0, 1]]
