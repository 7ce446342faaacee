"""However a run ends, hooks come off, what was measured is written, and the user's own error is what comes out."""

import gc
import json
import sys
import warnings
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Watch
from gradwatch.callbacks._bar import NumberInBar
from gradwatch.records import Incident, Index, StepRecord
from gradwatch.runs import read_run
from gradwatch.sinks import SafeSinks
from gradwatch.testing import MemorySink
from gradwatch.treatments import SkipStep
from gradwatch.watch._transfer import Transfer
from gradwatch.watch._veto import Kept

PACKAGE = str(Path(gradwatch.__file__).parent)
EVERYTHING = {"activations_every": 1, "autopsy": True, "local_norms": True, "rules": "autoclip"}


def hooks_left(model, *optimizers):
    places = [*model.modules(), *model.parameters(), *optimizers]
    found = [v for o in places for k, v in _attributes(o) if "hook" in k and isinstance(v, dict)]
    return sum(map(len, found))


def _attributes(place):
    if isinstance(place, torch.Tensor):
        return [(k, getattr(place, k)) for k in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    return list(vars(place).items())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def steps(watch, model, optimizer, num=3):
    for _ in range(num):
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()


def test_a_watch_that_nobody_holds_is_gone_at_once_with_its_hooks_and_its_records_written(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gc.disable()
    try:
        watch = Watch(model, optimizer, run_dir=tmp_path, **EVERYTHING)
        steps(watch, model, optimizer)
        assert hooks_left(model, optimizer) > 0
        del watch
        assert hooks_left(model, optimizer) == 0
    finally:
        gc.enable()
    assert len(read_run(tmp_path)) == 3
    again = Watch(model, optimizer, run_dir=tmp_path, **EVERYTHING)
    assert not again.session.sinks.failed
    again.close()


@pytest.mark.parametrize("error", [None, ValueError("the loader broke"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_did_not_come_to_its_end_has_no_closing_summary(error):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink = MemorySink()
    with suppress(ValueError, KeyboardInterrupt), Watch(model, optimizer, sinks=[sink], **EVERYTHING) as watch:
        steps(watch, model, optimizer)
        if error is not None:
            raise error
    watch.close()
    assert bool(sink.text) == (error is None)


class Interrupted(MemorySink):
    """Ctrl-C falls into its first `close`."""

    def close(self):
        if not vars(self).setdefault("was_asked", False):
            self.was_asked = True
            raise KeyboardInterrupt
        super().close()


@pytest.mark.parametrize("way", ["close", "with"])
def test_an_interrupt_that_falls_into_the_end_goes_on_when_all_is_done(way):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = Watch(model, optimizer, sinks=[Interrupted()], **EVERYTHING)
    steps(watch, model, optimizer)
    with pytest.raises(KeyboardInterrupt), watch if way == "with" else closing(watch):
        pass
    assert watch.session.closed
    assert hooks_left(model, optimizer) == 0


def test_cells_run_again_leave_no_hook_and_keep_no_tensor():
    model = net()

    def cell():
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        steps(Watch(model, optimizer, **EVERYTHING), model, optimizer, 2)
        raise KeyboardInterrupt

    alive = []
    for _ in range(2):
        for _ in range(8):
            with pytest.raises(KeyboardInterrupt):
                cell()
        gc.collect()
        alive.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert hooks_left(model) == 0
    assert alive[1] <= alive[0]


def in_with(watch, error, train):
    with watch:
        train()
        raise error


def in_finally(watch, error, train):
    try:
        train()
        raise error
    finally:
        watch.close()


def in_except(watch, error, train):
    try:
        train()
        raise error
    except BaseException:
        watch.close()
        raise


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("closes", [in_with, in_finally, in_except])
def test_a_run_that_an_exception_ends_is_not_complete_and_says_why(tmp_path, closes, error):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def run():
        watch = Watch(model, optimizer, run_dir=tmp_path, **EVERYTHING)
        closes(watch, error, lambda: steps(watch, model, optimizer))

    with pytest.raises(type(error)):
        run()
    assert hooks_left(model, optimizer) == 0
    run = read_run(tmp_path)
    assert (len(run), run.complete, run.summary) == (3, False, "")
    assert run.meta["sessions"][-1]["ended"] == ("crashed: ValueError: mine" if error.args else "interrupted")


def test_an_exception_that_was_there_before_did_not_end_the_run(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def batches():
        yield from ()

    try:
        raise ImportError("no faster way")
    except ImportError:  # a program may well train in here
        watch = Watch(model, optimizer, run_dir=tmp_path, **EVERYTHING)
        steps(watch, model, optimizer)
        try:
            next(batches())
        except StopIteration:
            watch.close()
    assert read_run(tmp_path).complete


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_the_users_error_comes_out_where_closing_fails_too(monkeypatch, on_error):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def run():
        with Watch(model, optimizer, on_error=on_error, **EVERYTHING) as watch:
            steps(watch, model, optimizer)
            device = property(lambda self: (_ for _ in ()).throw(RuntimeError("device-side assert triggered")))
            monkeypatch.setattr(Transfer, "ready", device)
            monkeypatch.setattr(type(watch.session.engine.judge), "limits", device)
            monkeypatch.setattr(type(watch.session), "_tell", device)
            warnings.simplefilter("ignore")
            raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        run()
    assert hooks_left(model, optimizer) == 0


def closing_calls(close):
    """Return how many functions of gradwatch begin while `close` runs."""
    return _interrupted(close, -9)


def _in_finalizer(frame):
    """Return whether `frame` runs beneath a `__del__`, where Python prints an interrupt and goes on."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def _interrupted(close, number):
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        counts = event == "call" and frame.f_code.co_filename.startswith(PACKAGE)
        if counts and frame.f_code.co_name != "<genexpr>" and not _in_finalizer(frame):
            count += 1
            if count == number + 2:  # the first is `close` itself
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        close()
    finally:
        sys.settrace(None)
    return count


def watched(folder, num_steps=3):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = Watch(model, optimizer, run_dir=folder, **EVERYTHING)
    steps(watch, model, optimizer, num_steps)
    return model, optimizer, watch


def test_ctrl_c_at_any_call_of_close_leaves_nothing_half_way(tmp_path):
    total = closing_calls(watched(tmp_path / "whole")[2].close)
    assert total > 30
    # The first ones are the ways in; the rest is sampled, more of it in the slow test.
    for number in [*range(12), *range(12, total - 1, max(total // 25, 1))]:
        assert half_done_after(tmp_path / str(number), number) == []


class Bar:
    def get_metrics(self):
        return {}


def shown():
    bar, number = Bar(), NumberInBar("norm", lambda: 1.0)
    number.attach(bar)
    return number.detach, lambda: vars(bar) == {}


def hidden():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.ones(2)
    kept = Kept(zeros=True)
    kept.take(parameters)
    return kept.hand_back, lambda: all(p.grad.sum() == 2 for p in parameters)


def windowed():
    sink = MemorySink()
    sink.every = 100
    sinks = SafeSinks([sink])
    records = [StepRecord(step=step, index=Index.of_parameters(["w"])) for step in range(3)]
    for record in records:
        sinks.push(record)
    return sinks.flush, lambda: [r.step for r in dict.fromkeys(sink.records)] == [0, 1, 2]


def told():
    model = net()
    watch = Watch(model, torch.optim.SGD(model.parameters(), 0.1), sinks=[MemorySink()])
    session, sink = watch.session, watch.session.sinks.sinks[0]
    for number in range(3):
        session._told.note(Incident(rule=f"r{number}", first_step=0, last_step=0))
    return lambda: session._told.tell(session.engine, session.sinks), lambda: len(sink.incidents) == 3


@pytest.mark.parametrize("made", [shown, hidden, windowed, told])
def test_what_ctrl_c_stops_anywhere_is_done_by_the_next_call(made):
    act, is_done = made()
    total = _lines(act, 10**9)
    assert is_done()
    for number in range(total):
        act, is_done = made()
        with suppress(KeyboardInterrupt):
            _lines(act, number)
        act()
        assert is_done(), number


def _lines(act, number):
    """Call, and raise Ctrl-C at a line of gradwatch's; return how many lines there were."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE) or _in_finalizer(frame):
            return None
        if event == "line":
            count += 1
            if count == number + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.slow
def test_ctrl_c_at_many_calls_of_close_leaves_nothing_half_way(tmp_path):
    total = closing_calls(watched(tmp_path / "whole")[2].close)
    for number in range(0, total - 1, 13):
        assert half_done_after(tmp_path / str(number), number) == []


def half_done_after(folder, number):
    """Interrupt `close` at one call and close once more; return what is not as it should be."""
    model, optimizer, watch = watched(folder)
    with suppress(KeyboardInterrupt):
        _interrupted(watch.close, number)
    num_hooks = hooks_left(model, optimizer)
    watch.close()
    num_records, meta = len(read_run(folder)), json.loads((folder / "meta.json").read_text())
    again = Watch(model, optimizer, run_dir=folder)
    failed = again.session.sinks.failed
    again.close()
    states = {
        "no hook is left": num_hooks == 0,
        "it is closed": watch.session.closed,
        "all steps are there": num_records == 3,
        "its end is written": bool(meta["sessions"][-1]["finished"]),
        "the folder is free": not failed,
    }
    return [f"{number}: not so: {state}" for state, is_so in states.items() if not is_so]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lbfgs"])
def test_a_vetoed_step_hands_the_gradients_back(optimizer):
    model = net()
    split = list(model.parameters())
    made = {
        "sgd": lambda: torch.optim.SGD([{"params": split[:1]}, {"params": split[1:]}], 0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(split, 0.1),
        "lbfgs": lambda: torch.optim.LBFGS(split, 0.1),
    }[optimizer]()
    before = [p.detach().clone() for p in split]
    with Watch(model, made, rules="observe", treatments=[SkipStep(max_consecutive=9)]) as watch:

        def closure():
            made.zero_grad()
            loss = model(torch.full((2, 4), float("nan"))).mean()
            loss.backward()
            outcome.append(watch.after_backward(loss))
            return loss

        outcome = []
        if optimizer == "lbfgs":
            made.step(closure)
        else:
            closure()
            given = [p.grad for p in split]
            made.step()
            assert all(p.grad is grad for p, grad in zip(split, given, strict=True))
        watch.after_step()
    assert outcome[0].skip
    assert all(p.grad is not None for p in split)
    assert all(torch.equal(p, old) for p, old in zip(split, before, strict=True))


class Broken(torch.optim.AdamW):
    """Raises in its step."""

    def step(self, closure=None):
        raise ZeroDivisionError


@pytest.mark.parametrize("made", [lambda ps: Broken(ps, 0.1), lambda ps: Broken(ps, 0.1, fused=True)])
@pytest.mark.parametrize("through", ["step", "halves"])
def test_a_vetoed_step_that_raises_hands_the_gradients_back(made, through):
    model = net()
    optimizer = made(model.parameters())
    watch = Watch(model, optimizer, rules="observe", treatments=[SkipStep(max_consecutive=9)])
    loss = model(torch.full((2, 4), float("nan"))).mean()
    loss.backward()
    given = [p.grad for p in model.parameters()]
    if through == "step":
        with pytest.raises(ZeroDivisionError):
            watch.step(loss=loss)
    else:
        watch.after_backward(loss)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        watch.close()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), given, strict=True))
    assert not hasattr(optimizer, "found_inf")
    watch.close()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_fused_or_scaled_step_that_is_vetoed_moves_nothing_and_leaves_gradients_and_optimizer_as_they_were(
    kind, scaled
):
    model = net()
    optimizer = kind(model.parameters(), 0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    with Watch(model, optimizer, scaler=scaler, rules="observe", treatments=[SkipStep(max_consecutive=9)]) as watch:
        for step in range(4):
            loss = model(torch.full((2, 4), float("nan") if step == 2 else 1.0)).mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            given, before = [p.grad for p in model.parameters()], [p.detach().clone() for p in model.parameters()]
            watch.step(loss=loss)
            assert all(p.grad is grad for p, grad in zip(model.parameters(), given, strict=True))
            stayed = all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
            assert stayed == (step == 2)
            optimizer.zero_grad()
    assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()


def test_what_the_collector_finds_in_a_cycle_writes_its_last_records_too(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = Watch(model, optimizer, run_dir=tmp_path, rules="default")
    steps(watch, model, optimizer, 40)
    watch.itself = watch
    del watch
    gc.collect()
    assert hooks_left(model, optimizer) == 0
    assert len(read_run(tmp_path)) == 40


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_what_fails_while_a_watch_is_made_is_what_comes_out(error):
    class Sink:
        def open(self, meta):
            raise error

        def write(self, record, window):
            pass

        def incident(self, incident):
            pass

        def flush(self):
            pass

        def close(self):
            raise RuntimeError("never opened")

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(type(error)):
        Watch(model, optimizer, sinks=[Sink()], on_error="raise")
    assert hooks_left(model, optimizer) == 0


@pytest.mark.slow
def test_a_thousand_watches_of_every_ending_leave_nothing():
    model = net()
    for number in range(1000):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = Watch(model, optimizer, **EVERYTHING)
        steps(watch, model, optimizer, 1)
        if number % 3 == 0:
            watch.close()
        elif number % 3 == 1:
            watch.__exit__(ValueError, ValueError("x"), None)
        del watch
        assert hooks_left(model, optimizer) == 0
