"""`gradwatch serve`: the page over run folders, for this machine alone."""

from __future__ import annotations

import pytest
from werkzeug.test import Client

from gradwatch.cli._main import main
from gradwatch.cli._serve import make_app
from tensorboard_plugin_gradwatch._wire import unpack
from tests.tab.synthetic import write_folder


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_folder(root / "1", steps=40, incidents=[])
    return Client(make_app(root))


def test_page_scripts_and_data_are_served_behind_a_policy(client):
    page = client.get("/", base_url="http://127.0.0.1:6016")
    assert page.status_code == 200
    assert "./static/serve.js" in page.text
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    for name in ("serve.js", "app.js", "style.css", "vendor/uPlot.min.css"):
        assert client.get(f"/static/{name}", base_url="http://localhost").status_code == 200
    runs = client.get("/runs", base_url="http://127.0.0.1:6016").json["runs"]
    assert [run["id"] for run in runs] == ["1"]
    answer = client.get("/matrix?run=1&statistic=grad_norm", base_url="http://127.0.0.1:6016")
    assert unpack(answer.data)[1].tolist() == list(range(40))
    assert client.get("/nothing", base_url="http://127.0.0.1:6016").status_code == 404


def test_another_sites_name_reads_nothing(client):
    for path in ("/", "/runs", "/static/app.js"):
        assert client.get(path, base_url="http://evil.example").status_code == 403


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-folder"], "there is no folder 'no-such-folder'"),
        (["FILE"], "serve takes a folder of runs. Got the file"),
        ([".", "--port", "70000"], "--port takes a number from 0 to 65535. Got 70000."),
    ],
)
def test_what_can_not_be_served_is_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert main(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err
