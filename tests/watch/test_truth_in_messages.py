"""What gradwatch says of its own doings is so, and said once; telling others never holds a training."""

import http.server
import shutil
import threading
import warnings
from urllib.error import HTTPError

import pytest
import torch
from torch import nn

from gradwatch import ConfigError, GradwatchWarning, Watch
from gradwatch._address import post
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks._say import say_ending
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.records import Incident
from gradwatch.rules import Exploding, NotLearning
from gradwatch.sinks import NotifySink
from gradwatch.treatments import Notify
from gradwatch.watch._telling import Telling

SECRET = "TOKEN-OF-TESTS"
BAD = [
    "http://[::1/x?token=" + SECRET, "http://", "https:///hook", f"http://host:port/{SECRET}", "http://host:99999/",
    "http://ho st/", f"http://host/\n{SECRET}", "http:host", "https://", "http://\x1b/",
]  # fmt: skip


def train(steps=60, spikes=(40,), **options):
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-9)
    with Watch(net, optimizer, **options) as watch:
        for i in range(steps):
            loss = net(torch.randn(8, 4)).square().mean() * (1e6 if i in spikes else 1)
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch


def told_by(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = run()
    return [str(w.message) for w in seen if issubclass(w.category, GradwatchWarning)], result


@pytest.mark.parametrize("address", BAD)
def test_an_address_that_is_none_is_refused_where_it_is_given(address):
    net = nn.Linear(2, 1)
    doors = [
        lambda: Watch(net, torch.optim.SGD(net.parameters(), 0.1), on_incident=address),
        lambda: GradWatch(on_incident=address),
        lambda: FabricGradWatch(on_incident=address),
        lambda: GradWatchCallback(on_incident=address),
        lambda: NotifySink(address),
        lambda: Notify(address),
    ]
    for door in doors:
        with pytest.raises(ConfigError) as problem:
            door()
        assert SECRET not in str(problem.value)
        assert "\n" not in str(problem.value)


class Server:
    """Answers every POST with a status, and keeps what it was sent."""

    def __init__(self, status):
        seen = self.seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                seen.append((self.path, self.headers.get("Authorization")))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://user:{SECRET}@127.0.0.1:{self.server.server_port}/hook?token={SECRET}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("door", ["on_incident", "notify"])
def test_a_webhook_that_refuses_is_told_once_without_what_is_secret(tmp_path, door):
    with Server(500) as server:
        rules = [Exploding(cooldown=0, keep_firing_for=1, then=Notify(server.address) if door == "notify" else ())]
        options = {"on_incident": server.address} if door == "on_incident" else {}
        told, watch = told_by(lambda: train(rules=rules, run_dir=tmp_path / "run", spikes=(30, 40, 50), **options))
        for thread in [t for t in threading.enumerate() if t.name == "gradwatch-notify"]:
            thread.join(5)
        assert server.seen
    assert len(told) <= 1
    assert len(watch.incidents) == 3
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert SECRET not in "".join(told) + watch.summary()
    assert SECRET.encode() not in written


def test_a_refusal_that_is_kept_holds_no_connection():
    with Server(500) as server, pytest.raises(HTTPError) as refusal:
        post(server.address, b"{}", timeout=5)
    assert refusal.value.fp.closed


def test_a_refusal_after_it_worked_is_told_too():
    def refuses_later(incident):
        if told:
            raise OSError("no line")
        told.append(incident)

    told = []
    said, _ = told_by(
        lambda: train(rules=[Exploding(cooldown=0, keep_firing_for=1)], spikes=(30,), on_incident=refuses_later)
    )
    assert len(said) == 1
    assert "failed once: OSError: no line" in said[0]


def test_name_and_password_of_an_address_go_in_the_header_for_them():
    with Server(200) as server:
        told, _ = told_by(lambda: train(rules=[Exploding()], on_incident=server.address))
        assert told == []
        assert server.seen[0][0].startswith("/hook")
        assert server.seen[0][1].startswith("Basic ")


def test_a_function_that_does_not_come_back_holds_nothing_and_is_told_once():
    hold = threading.Event()
    sink = NotifySink(lambda incident: hold.wait(30), timeout=0.2)
    rules = [Exploding(cooldown=0, keep_firing_for=1)]
    told, watch = told_by(lambda: train(rules=rules, sinks=[sink], spikes=(30, 50)))
    hold.set()
    assert len(watch.history) == 60
    assert len(told) == 1
    assert "has not come back in 0.2 s; 2 were not told" in told[0]


def test_a_function_behind_a_rule_that_does_not_come_back_is_waited_for_once():
    hold, incident = threading.Event(), Incident(rule="a", first_step=0, last_step=0)
    telling = Telling(patience=0.1)

    def hangs(_):
        hold.wait(30)

    with pytest.raises(TimeoutError, match=r"has not come back in 0\.1 s"):
        telling.tell(hangs, incident)
    telling.tell(hangs, incident)
    hold.set()
    seen = []
    telling.tell(seen.append, incident)
    assert seen == [incident]


def test_what_was_written_is_said_only_where_it_was(tmp_path, capsys):
    watch = train(run_dir=tmp_path / "run")
    say_ending(watch.session)
    assert f"gradwatch wrote {tmp_path / 'run'};" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    say_ending(watch.session)
    out = capsys.readouterr().err
    assert "gradwatch wrote" not in out
    assert "could not write all" in out


def test_a_recording_that_failed_is_not_said_to_be_written(tmp_path, capsys, monkeypatch):
    from gradwatch.sinks import RunFolder

    def full(self, *args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write", full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch = train(run_dir=tmp_path / "run")
        say_ending(watch.session)
    out = capsys.readouterr().err
    assert "gradwatch wrote" not in out
    assert "No space left on device" in out


@pytest.mark.parametrize("tells_targets", [True, False])
def test_what_is_said_at_the_end_of_a_run_names_the_learning_rate_that_it_had(tells_targets):
    torch.manual_seed(0)
    net = nn.Linear(8, 10)
    optimizer = torch.optim.SGD(net.parameters(), 1e-7)
    with Watch(net, optimizer) as watch:
        for _ in range(300):
            outputs, targets = net(torch.randn(32, 8)), torch.randint(0, 10, (32,))
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward()
            watch.step(loss=loss, **({"outputs": outputs, "targets": targets} if tells_targets else {}))
            optimizer.zero_grad()
    (told,) = [i for i in watch.incidents if i.rule == "not_learning"]
    assert told.first_step == 299
    assert "raise the learning rate (1e-07)" in told.message


@pytest.mark.parametrize("clips", [False, True])
def test_gradients_that_are_not_finite_were_clipped_by_nobody_unless_somebody_did(clips):
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    with Watch(net, optimizer) as watch:
        for step in range(90):
            bad = torch.tensor([1.0, float("inf") if step > 20 else 1.0])
            (net(torch.randn(8, 4)) * bad).square().mean().backward()
            if clips:
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            watch.step()
            optimizer.zero_grad()
    assert ("clipped the gradients" in watch.summary()) == clips
    assert "the norm nan became nan" not in watch.summary()


def test_weights_that_get_no_gradient_are_not_helped_by_a_higher_learning_rate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        net[2].bias.fill_(-50)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Watch(net, optimizer, rules=[NotLearning()]) as watch:
        for _ in range(300):
            x = torch.randn(32, 8)
            targets = (x[:, :3] > 0).long() @ torch.tensor([1, 2, 4])
            outputs = net(x)
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward()
            watch.step(loss=loss, outputs=outputs, targets=targets)
            optimizer.zero_grad()
    (told,) = watch.incidents
    assert "5 of 6 parameters have a gradient of zeros" in told.message
    assert "raise" not in told.message
