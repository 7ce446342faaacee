import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.protocols import RunMeta, Sink
from gradwatch.records import Incident
from gradwatch.sinks import NotifySink, SafeSinks


def incident(step=0, **more):
    return Incident(**{"rule": "dead", "first_step": step, "last_step": step, **more})


def notify(target, incidents, **options):
    sink = NotifySink(target, **options)
    sink.open(RunMeta(name="my run"))
    for each in incidents:
        sink.incident(each)
    sink.close()
    return sink


def test_callable_is_told_once_of_each_incident_and_from_another_thread():
    told = []
    sink = notify(
        lambda i: told.append((i.first_step, threading.current_thread().name)),
        [incident(0), incident(0, last_step=5, count=6), incident(1), incident(1, resolved=True)],
    )
    assert told == [(0, "gradwatch-notify"), (1, "gradwatch-notify")]
    assert (sink.sent, sink.dropped) == (2, 0)


def test_severity_chooses_and_its_rise_and_the_end_are_news():
    told = []
    notify(
        lambda i: told.append((i.severity, i.resolved)),
        [incident(severity=s) for s in ("info", "warning", "critical")]
        + [incident(severity="critical", resolved=True)],
        resolved=True,
    )
    assert told == [("warning", False), ("critical", False), ("critical", True)]


def test_rate_is_limited_and_the_rest_counted():
    told = []
    sink = notify(told.append, [incident(step) for step in range(20)], max_per_minute=3)
    assert [i.first_step for i in told] == [0, 1, 2]
    assert sink.dropped == 17


def test_target_that_hangs_does_not_hold_the_training():
    release = threading.Event()
    began = time.monotonic()
    with pytest.warns(GradwatchWarning, match="has not come back in 0.05 s"):
        sink = notify(lambda i: release.wait(60), [incident(s) for s in range(9)], queue_size=2, timeout=0.05)
    assert time.monotonic() - began < 30
    assert sink.dropped >= 6
    release.set()


def test_target_that_fails_three_times_is_one_warning_and_given_up():
    def fail(incident):
        raise ConnectionError("gone")

    notifier = NotifySink(fail, max_per_minute=100)
    sinks = SafeSinks([notifier])
    sinks.open(RunMeta())
    for step in range(3):
        sinks.incident(incident(step))
    notifier._thread.join(20)
    with pytest.warns(GradwatchWarning, match="failed three times running: ConnectionError") as caught:
        sinks.close()
    assert len(caught) == 1
    assert notifier.dropped == 3


def test_target_that_fails_now_and_then_is_kept():
    calls = []

    def flaky(incident):
        calls.append(incident)
        if len(calls) % 2:
            raise ConnectionError("gone")

    sink = notify(flaky, [incident(s) for s in range(10)])
    assert (len(calls), sink.sent) == (10, 5)


class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def webhook():
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.got = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_webhook_gets_json_with_a_sentence(webhook):
    url = f"http://127.0.0.1:{webhook.server_port}/hook?token=secret"
    notify(url, [incident(3, value=float("nan"), paths=("a.b",), first_path="a.b")])
    ((kind, said),) = webhook.got
    assert kind == "application/json"
    assert said["text"] == "[warning] step 3: dead in a.b (nan, limit nan)"
    assert (said["run"], said["dropped"], said["value"], said["paths"]) == ("my run", 0, "nan", ["a.b"])


def test_warning_names_the_host_and_not_the_secret():
    notifier = NotifySink("http://127.0.0.1:9/hook?token=secret")
    sinks = SafeSinks([notifier])
    sinks.open(RunMeta())
    for step in range(3):
        sinks.incident(incident(step))
    with pytest.warns(GradwatchWarning, match=r"telling 127\.0\.0\.1 of incidents failed") as caught:
        sinks.close()
    assert "secret" not in str(caught[0].message)


def test_copy_is_a_fresh_sink():
    other = pickle.loads(pickle.dumps(NotifySink("https://x.y/z", severity="critical")))
    assert other.target == "https://x.y/z"
    assert isinstance(other, Sink)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"target": "ftp://x"}, "NotifySink tells a callable or an http(s) URL. Got 'ftp://x'.", id="scheme"
        ),
        pytest.param({"target": 3}, "NotifySink tells a callable or an http(s) URL. Got 3.", id="type"),
        pytest.param(
            {"severity": "bad"},
            "NotifySink: `severity` must be one of info, warning, critical. Got 'bad'.",
            id="severity",
        ),
        pytest.param({"timeout": 0}, "NotifySink: `timeout` must be above 0. Got 0.", id="timeout"),
        pytest.param({"max_per_minute": 0}, "NotifySink: `max_per_minute` must be above 0. Got 0.", id="rate"),
        pytest.param({"queue_size": 0}, "NotifySink: `queue_size` must be above 0. Got 0.", id="queue"),
    ],
)
def test_setting_that_can_not_be_is_refused(arguments, message):
    with pytest.raises(ConfigError) as caught:
        NotifySink(**{"target": print, **arguments})
    assert str(caught.value) == message
