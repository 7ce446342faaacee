"""Actions leave requests; LearningRates and Webhook carry two of them out."""

import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.records import Incident
from gradwatch.requests import LowerLearningRates, SaveCheckpoint
from gradwatch.treatments import Checkpoint, LearningRates, LowerLearningRate, Notify, Stop, send

from ._steps import Step

INCIDENT = Incident(rule="exploding", first_step=7, last_step=7, value=12.0, limit=math.inf, severity="critical")


def request_of(action):
    context = Step(step=7)
    action.act(INCIDENT, context)
    (request,) = context.requests
    return request


def test_lower_learning_rate_says_by_how_much_and_how_long() -> None:
    request = request_of(LowerLearningRate(0.1, 50))
    assert isinstance(request, LowerLearningRates)
    assert (request.factor, request.steps, request.name) == (0.1, 50, "exploding")
    assert request.reason.startswith("learning rate x 0.1 for 50 steps: [critical] step 7: exploding")


def test_checkpoint_names_the_file_after_rule_and_step() -> None:
    request = request_of(Checkpoint())
    assert isinstance(request, SaveCheckpoint)
    assert request.filename == "gradwatch-exploding-7"


def test_stop_gives_the_incident_as_reason_or_what_it_was_told() -> None:
    assert request_of(Stop()).reason == f"stop: {INCIDENT}"
    assert request_of(Stop("enough")).reason == "enough"


def test_notify_hands_over_the_function_and_the_incident() -> None:
    told = []
    request = request_of(Notify(told.append))
    assert told == []
    send(request.target, request.incident)
    assert told == [INCIDENT]


def test_notify_finds_functions_by_name() -> None:
    assert request_of(Notify("json:dumps")).target is json.dumps


def test_a_notification_that_fails_is_a_warning() -> None:
    def broken(incident):
        raise OSError("no line")

    with pytest.warns(GradwatchWarning, match="raised OSError: no line"):
        send(broken, INCIDENT)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowerLearningRate(1.0), "LowerLearningRate: `factor` must be a number above 0 and below 1. Got 1.0."),
        (
            lambda: LowerLearningRate(math.nan),
            "LowerLearningRate: `factor` must be a number above 0 and below 1. Got nan.",
        ),
        (
            lambda: LowerLearningRate(0.5, 0),
            "LowerLearningRate: `steps` must be a whole number of at least 1, or None. Got 0.",
        ),
        (
            lambda: Checkpoint("{epoch}"),
            "Checkpoint: `filename` must be text with no other fields than {step} and {rule}. Got '{epoch}'.",
        ),
        (
            lambda: Notify(3),
            "Notify: `target` must be a callable, an http(s) address or 'module:function'. Got 3.",
        ),
        (
            lambda: Notify("json:dmps"),
            "Notify: 'json:dmps' can't be imported: module 'json' has no attribute 'dmps'",
        ),
    ],
)
def test_settings_that_cannot_be(build, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["c:x", "x\0y", "../x", "x/../y", "/x", "\\x", "x\\..\\y"])
def test_a_checkpoint_stays_in_its_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="leads elsewhere"):
        Checkpoint(name)
    assert request_of(Checkpoint("x/y..z")).filename == "x/y..z"


def test_a_webhook_posts_the_incident_as_json() -> None:
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        action = Notify(f"http://127.0.0.1:{server.server_port}/hook")
        request_of(action).target(INCIDENT).join(10)
        thread.join(10)
    body = json.loads(bodies[0])
    assert body["text"] == str(INCIDENT)
    assert body["incident"]["rule"] == "exploding"
    assert body["incident"]["limit"] == "inf"


def optimizer_of(lr=1.0):
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    return param, torch.optim.SGD([param], lr=lr)


def rates_used(optimizer, param, steps: int, scheduler=None) -> list[float]:
    """The rate of each step: how far SGD moves under a gradient of 1."""
    used = []
    for _ in range(steps):
        before = float(param.detach())
        optimizer.step()
        used.append(before - float(param.detach()))
        if scheduler is not None:
            scheduler.step()
    return used


def test_rates_are_lowered_for_so_many_steps_and_come_back() -> None:
    param, optimizer = optimizer_of()
    rates = LearningRates([optimizer])
    rates.lower(0.1, 2)
    assert rates_used(optimizer, param, 4) == pytest.approx([0.1, 0.1, 1.0, 1.0])
    assert rates.factor == 1.0


class Inherits(torch.optim.SGD):
    """Calls the step that it inherits, decays afterwards by the rate, and raises at one of its steps."""

    num, raises_at = 0, -1

    def step(self, closure=None):
        self.num += 1
        found = super().step(closure)
        if self.num == self.raises_at:
            raise OverflowError
        self.used.append(self.param_groups[0]["lr"])
        return found


@pytest.mark.parametrize("raises_at", [-1, 2])
def test_a_step_that_calls_the_one_it_inherits_is_one_lowered_step(raises_at: int) -> None:
    param = nn.Parameter(torch.zeros(1))
    torch.optim.SGD([param], lr=1.0)  # from here on torch's hooks are around its step, too
    optimizer = Inherits([param], lr=1.0)
    optimizer.used, optimizer.raises_at = [], raises_at
    rates = LearningRates([optimizer])
    rates.lower(0.1, 3)
    moved = []
    for _ in range(5):
        param.grad, before = torch.ones(1), param.item()
        with contextlib.suppress(OverflowError):
            optimizer.step()
        moved.append(before - param.item())
    # One that has raised was none.
    num_lowered = 3 if raises_at < 0 else 4
    assert moved == pytest.approx([0.1] * num_lowered + [1.0] * (5 - num_lowered))
    assert optimizer.used == pytest.approx([0.1] * 3 + [1.0] * (5 - num_lowered))
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert rates.factor == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=6),
    ],
    ids=["exponential", "lambda", "cosine", "one-cycle"],
)
def test_no_schedule_undoes_or_compounds_the_factor(schedule) -> None:
    param, optimizer = optimizer_of()
    plain = rates_used(optimizer, param, 5, schedule(optimizer))
    param, optimizer = optimizer_of()
    rates = LearningRates([optimizer])
    scheduler = schedule(optimizer)
    rates.lower(0.1, 3)
    expected = [r * f for r, f in zip(plain, [0.1, 0.1, 0.1, 1, 1], strict=True)]
    assert rates_used(optimizer, param, 5, scheduler) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_lowering_again_begins_anew_and_does_not_compound() -> None:
    param, optimizer = optimizer_of()
    rates = LearningRates([optimizer])
    rates.lower(0.5, 2, name="a")
    used = rates_used(optimizer, param, 1)
    rates.lower(0.5, 2, name="a")
    rates.lower(0.25, 1, name="b")
    used += rates_used(optimizer, param, 3)
    assert used == pytest.approx([0.5, 0.25, 0.5, 1.0])


def test_every_optimizer_has_steps_of_its_own() -> None:
    (p, a), (q, b) = optimizer_of(), optimizer_of()
    rates = LearningRates([a, b])
    rates.lower(0.5, 1)
    assert rates_used(a, p, 2) == pytest.approx([0.5, 1.0])
    assert rates_used(b, q, 2) == pytest.approx([0.5, 1.0])


def test_a_rate_that_is_a_tensor_keeps_its_place_in_memory() -> None:
    rate = torch.tensor(1.0)
    param, optimizer = optimizer_of(rate)
    rates = LearningRates([optimizer])
    rates.lower(0.1, 1)
    assert rates_used(optimizer, param, 2) == pytest.approx([0.1, 1.0])
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 1.0


def test_a_closure_that_raises_leaves_no_lowered_rate_behind() -> None:
    param, optimizer = optimizer_of()
    rates = LearningRates([optimizer])
    rates.lower(0.1, None)

    def closure():
        raise RuntimeError("batch")

    with pytest.raises(RuntimeError, match="batch"):
        optimizer.step(closure)
    assert rates_used(optimizer, param, 1) == pytest.approx([0.1])
    rates.close()
    assert rates_used(optimizer, param, 1) == pytest.approx([1.0])
    assert not optimizer._optimizer_step_pre_hooks


def test_what_is_left_of_a_lowering_survives_a_checkpoint() -> None:
    param, optimizer = optimizer_of()
    rates = LearningRates([optimizer])
    rates.lower(0.1, 3)
    rates_used(optimizer, param, 1)
    again = LearningRates([optimizer])
    state = rates.state_dict()
    rates.close()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert rates_used(optimizer, param, 3) == pytest.approx([0.1, 0.1, 1.0])


def test_restore_ends_a_lowering() -> None:
    param, optimizer = optimizer_of()
    rates = LearningRates([optimizer])
    rates.lower(0.1, None, name="a")
    rates.lower(0.2, None, name="b")
    rates.restore("a")
    assert rates.factor == 0.2
    rates.restore()
    assert rates_used(optimizer, param, 1) == pytest.approx([1.0])
