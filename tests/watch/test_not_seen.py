"""What was not seen is not zero: it is on record as not seen, with the reason, and no rule or treatment counts it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch, load_rules
from gradwatch.rules import Expression
from gradwatch.runs import read_run, replay
from gradwatch.treatments import ZClip
from gradwatch.watch import _account
from gradwatch.watch._account import Account

Loop = Callable[[Watch, nn.Module, torch.optim.Optimizer, int], None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def loss_of(model: nn.Module) -> Tensor:
    return (model(torch.randn(16, 8)) - 1).square().mean()


def no_backward(watch: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    watch.step(loss=loss_of(model).detach())


def reset_too_early(watch: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    loss = loss_of(model)
    loss.backward()
    optimizer.zero_grad()
    watch.step(loss=loss)


def now_and_then(watch: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss = loss_of(model)
    if step % 4:
        loss.backward()
    watch.step(loss=loss)


@pytest.mark.parametrize("loop", [no_backward, reset_too_early, now_and_then], ids=lambda loop: loop.__name__)
def test_a_step_without_a_gradient_is_on_record_as_not_seen(loop: Loop, tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    zclip = ZClip()
    with Watch(model, optimizer, treatments=[zclip], run_dir=tmp_path / "run") as watch:
        for step in range(260):
            loop(watch, model, optimizer, step)
        history, text = watch.history, watch.summary()
    incidents = watch.incidents
    blank = [r for r in history if not r.has_gradient]
    assert len(blank) == (65 if loop is now_and_then else 260)
    assert all(math.isnan(r.global_norm) and math.isnan(r.global_norm_after) for r in blank)
    assert all(r.unseen.keys() == {""} and not r.treatments and not r.measured("grad_norm").any() for r in blank)
    assert all(r.global_norm > 0 for r in history if r.has_gradient)
    # What is not seen is no finding of the rules that judge gradients; that there never is any is one by itself.
    spoken = {i.rule for i in incidents} & {"dead", "dead_signal", "non_finite", "vanishing", "not_updating"}
    assert spoken == (set() if loop is now_and_then else {"dead_signal"})
    assert f"no gradient was seen at {len(blank)} of 260 steps: no backward reached a parameter" in text

    run = read_run(tmp_path / "run")
    again = list(run.records())
    assert [(r.has_gradient, r.unseen) for r in again] == [(r.has_gradient, r.unseen) for r in history]
    assert len(run.scalar("global_norm")[0]) == 260 - len(blank)
    assert replay(run, load_rules("default")).differences(incidents) == []


def test_gradients_that_are_truly_zero_stay_zero() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer) as watch:
        (loss_of(model) * 0).backward()
        record = watch.step().record
    assert record is not None
    assert record.has_gradient
    assert record.global_norm == 0


def step_each_inside(model: nn.Module, *, set_to_none: bool) -> list[torch.optim.Optimizer]:
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

    def step_now(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none=set_to_none)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    return list(optimizers.values())


def move_by_hand(p: Tensor) -> None:
    with torch.no_grad():
        p.sub_(0.05 * p.grad)
    p.grad = None


def move_by_data(p: Tensor) -> None:
    p.data.sub_(0.05 * p.grad)
    p.grad = None


def move_and_zero(p: Tensor) -> None:
    with torch.no_grad():
        p.sub_(0.05 * p.grad)
    p.grad.zero_()


@pytest.mark.parametrize(
    "program", ["known-freed", "known-zeroed", "by-hand", "by-data", "hand-zeroed", "dummy-optimizer"]
)
def test_optimizers_inside_backward_are_not_seen_and_raise_no_alarm(program: str) -> None:
    model = net()
    if program.startswith("known"):
        given = step_each_inside(model, set_to_none=program == "known-freed")
    elif program == "dummy-optimizer":
        step_each_inside(model, set_to_none=True)
        given = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)]
    else:
        hook = {"by-hand": move_by_hand, "by-data": move_by_data, "hand-zeroed": move_and_zero}[program]
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        given = [torch.optim.SGD(model.parameters(), lr=0.05)]
    with Watch(model, given) as watch:
        for _ in range(230):
            loss = loss_of(model)
            loss.backward()
            watch.after_backward(loss=loss)
            watch.after_step()
        notes, standing = " ".join(watch.session.notes), watch.session.coverage()
    assert all(math.isnan(r.global_norm) and not r.has_gradient for r in watch.history)
    assert [i for i in watch.incidents if i.severity == "critical"] == []
    assert "inside backward" in notes
    assert {standing[path].state for path, _ in model.named_parameters()} == {"unseen"}


@pytest.mark.parametrize("hook", [move_by_hand, move_and_zero])
def test_of_thousands_what_begins_to_step_inside_backward_is_told_at_the_second_step_at_the_latest(
    hook: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_account, "_MANY", 1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Watch(model, optimizer, rules="observe") as watch:
        for step in range(24):
            if step == 21:
                model[0].weight.register_post_accumulate_grad_hook(hook)
            loss_of(model).backward()
            watch.step()
            optimizer.zero_grad()
        records = {record.step: record for record in watch.history}
    assert all(not records[step].unseen for step in range(21))
    assert all("0.weight" in records[step].unseen for step in (22, 23))
    assert not any(records[step].measured("grad_norm")[records[step].index.position("0.weight")] for step in (22, 23))


def test_a_part_that_steps_inside_backward_leaves_the_rest_measured() -> None:
    model = net()
    inner = torch.optim.SGD(model[0].parameters(), lr=0.05)
    outer = torch.optim.SGD(model[2].parameters(), lr=0.05)

    def step_now(p: Tensor) -> None:
        if p is model[0].weight:
            inner.step()
            inner.zero_grad()

    model[0].weight.register_post_accumulate_grad_hook(step_now)
    with Watch(model, [inner, outer]) as watch:
        for _ in range(3):
            loss_of(model).backward()
            true = torch.nn.utils.get_total_norm([p.grad for p in model[2].parameters()]).item()
            record = watch.after_backward().record
            outer.step()
            watch.after_step()
            outer.zero_grad()
            assert record is not None
            assert record.global_norm == pytest.approx(true, rel=1e-5)
            assert set(record.unseen) == {"0.weight", "0.bias"}


def test_a_branch_that_is_not_used_has_no_gradient_and_a_reason() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(4, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, activations_every=1) as watch:
        model["used"](torch.randn(2, 4)).sum().backward()
        watch.step()
        standing = watch.session.coverage()
        assert standing["used.weight"].state == "measured"
        assert standing["idle.weight"] == ("no gradient", "its module was not called")
        assert any(note.startswith("idle.weight, idle.bias: ") for note in watch.session.notes)


def test_an_optimizer_that_is_stepped_without_watch_is_told_and_not_taken_for_silence() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer) as watch:
        for _ in range(5):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        text = watch.summary()
    assert "no step was measured: an optimizer stepped 5 times without `watch.step()`" in text


def test_a_watch_that_nothing_stepped_says_what_to_look_at() -> None:
    model = net()
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01)) as watch:
        text = watch.summary()
    assert "no step was measured: no optimizer that is known has stepped" in text


def test_what_is_frozen_altogether_is_said() -> None:
    model = net().requires_grad_(False)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.01)) as watch:
        for _ in range(3):
            watch.step(loss=1.0)
        record, text = watch.history[-1], watch.summary()
    assert not record.has_gradient
    assert "no gradient was seen at 3 of 3 steps: every parameter of the optimizer is frozen" in text


def test_expressions_do_not_know_a_norm_that_was_not_seen() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rules = [Expression("not (global_norm > 1e-30)", name="silent"), Expression("global_norm_after < 1e30", name="any")]
    with Watch(model, optimizer, rules=rules) as watch:
        for _ in range(5):
            watch.step(loss=1.0)
        assert watch.incidents == []


def test_loggers_get_no_norm_where_none_was_seen(tmp_path: Path) -> None:
    from gradwatch.sinks import CsvSink

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, sinks=[CsvSink(tmp_path / "log.csv")], log_every=2) as watch:
        for step in range(6):
            optimizer.zero_grad()
            if step > 2:
                loss_of(model).backward()
            watch.step(loss=1.0)
    head, *rows = (tmp_path / "log.csv").read_text().splitlines()
    column = head.split(",").index("global_norm")
    cells = [row.split(",")[column] for row in rows]
    assert "" in cells
    assert "nan" not in cells
    assert any(cell and float(cell) > 0 for cell in cells)


def test_a_hook_of_the_programs_own_is_told_from_gradwatchs_while_that_is_there_and_afterwards():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    first = model[0].weight
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), rules="observe") as watch:
        account, produced = watch.session.engine.meter.account, watch.session.engine.produced
        assert id(first) in account.heard
        assert not account.is_taken(first)
        handle = first.register_post_accumulate_grad_hook(lambda p: None)
        assert account.is_taken(first)
        produced.close()
        assert account.is_taken(first)
        handle.remove()
        assert not account.is_taken(first)


@pytest.mark.parametrize("depth", [2, 20])
def test_the_account_of_all_paths_is_taken_once_however_many_there_are(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked = []
    measured = Account.measured.fget
    monkeypatch.setattr(Account, "measured", property(lambda self: asked.append(1) or measured(self)))
    with Watch(model, optimizer, rules="observe") as watch:
        loss = model(torch.randn(2, 4)).sum()
        loss.backward()
        watch.step(loss=loss)
        assert set(watch.session.coverage().values()) == {("measured", "")}
        assert len(asked) == 1
