"""A training that is taken back is, bit for bit, what it was; what asks for it, to where, how often."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import load_rules
from gradwatch.errors import ConfigError, TrainingStopped
from gradwatch.rules import Expression, LossSpike
from gradwatch.runs import read_run, replay
from gradwatch.testing import MemorySink
from gradwatch.treatments import LowerLearningRate, Notify, Rollback
from gradwatch.watch._snapshots import expected_bytes
from gradwatch.watch._training import Training
from tests.treatments._rollback import Loop, at, copied, equal, optimizers


def snapshots(loop: Loop) -> Any:
    return loop.watch.session.engine.rollbacks.snapshots


LIGHT = {("sgd", False), ("adamw", True), ("adamw-fused", False), ("by-hand", False)}
CASES = [
    pytest.param(name, scaler, marks=[] if (name, scaler) in LIGHT else pytest.mark.slow)
    for name in optimizers
    for scaler in (False, True)
]


@pytest.mark.parametrize(("name", "scaler"), CASES)
def test_weights_buffers_and_optimizer_are_bit_for_bit_those_of_the_snapshot(name: str, scaler: bool) -> None:
    loop = Loop(at(25, steps=10), optimizer=name, scaler=scaler)
    with loop.watch:
        loop.run(26)
        assert loop.same_as(10)
        assert not loop.same_as(20)
        loop.run(2)
    assert not loop.same_as(10)
    # Nothing takes the return for a step that moved although it was vetoed.
    assert {i.rule for i in loop.watch.incidents} <= {"expression", "veto_undone"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(torch.optim.SGD, {}, id="sgd"),
        pytest.param(torch.optim.SGD, {"momentum": 0.9}, id="sgd-momentum"),
        pytest.param(torch.optim.RMSprop, {}, id="rmsprop"),
        pytest.param(torch.optim.RMSprop, {"momentum": 0.9}, id="rmsprop-momentum"),
        pytest.param(torch.optim.AdamW, {}, id="adamw"),
        pytest.param(torch.optim.AdamW, {"amsgrad": True}, id="adamw-amsgrad"),
    ],
)
def test_what_a_snapshot_will_take_is_known_before_the_first_step(kind: type, options: dict[str, Any]) -> None:
    model = nn.Linear(100, 100)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    foretold = expected_bytes(Training(model, [optimizer]))
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    assert foretold == pytest.approx(expected_bytes(Training(model, [optimizer])), abs=100)  # but for counts of steps


def test_tensors_stay_where_they_lie() -> None:
    loop = Loop(at(25), optimizer="adamw-fused")
    loop.run(20)
    held = [*loop.net.parameters(), *loop.net.buffers()]
    held += [t for state in loop.optimizer.state.values() for t in state.values()]
    places = [t.data_ptr() for t in held]
    with loop.watch:
        loop.run(6)
    now = [*loop.net.parameters(), *loop.net.buffers()]
    now += [t for state in loop.optimizer.state.values() for t in state.values()]
    assert [t.data_ptr() for t in now] == places
    assert loop.same_as(10)


def test_who_says_nothing_of_the_steps_end_goes_back_before_the_next_one_is_measured() -> None:
    loop = Loop(at(25))
    with loop.watch:
        for step in range(28):
            loss = nn.functional.cross_entropy(loop.net(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long))
            loss.backward()
            if not loop.watch.after_backward(loss).skip:
                loop.optimizer.step()
            loop.states[step + 1] = copied(*loop.parts)
            loop.optimizer.zero_grad()
            loop.watch._step += 1
            if step < 25:
                loop.watch.session.after_step()
    assert equal(loop.states[27][0]["first.weight"], loop.states[10][0]["first.weight"])
    assert [r.skipped for r in loop.watch.history[24:]] == [False, True, True, False]
    assert {i.rule for i in loop.watch.incidents} == {"expression"}


def test_an_optimizer_without_a_state_then_has_none_again() -> None:
    loop = Loop(at(8, steps=10))
    with loop.watch:
        loop.run(1)
        loop.optimizer.add_param_group({"params": [loop.net.frozen]})
        loop.net.frozen.requires_grad_(True)
        loop.run(8)
    incident = next(i for i in loop.watch.incidents if i.rule == "expression")
    assert "hold other parameters" in incident.details["rollback"]


def test_the_step_that_asks_is_vetoed_and_the_data_go_on() -> None:
    loop = Loop(at(25))
    with loop.watch:
        loop.run(40)
    records = {record.step: record for record in loop.watch.history}
    assert records[25].skipped
    assert not records[26].skipped
    assert len(set(loop.batches)) == 40
    assert [record.step for record in loop.watch.history] == list(range(40))


def test_random_states_go_on_unless_asked_to_return() -> None:
    kept, returned = (Loop(at(25, random_state=way)) for way in ("keep", "return"))
    for loop in (kept, returned):
        torch.manual_seed(5)
        drawn = []
        with loop.watch:
            for _ in range(26):
                loop.once()
                drawn.append(torch.get_rng_state())
        assert torch.equal(drawn[-1], drawn[9]) == (loop is returned)


def test_learning_rates_go_on_as_scheduled_unless_asked_to_return() -> None:
    for way in ("keep", "return"):
        loop = Loop(at(25, schedulers=way))
        loop.scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.9)
        loop.watch.register(scheduler=loop.scheduler)
        rates = []
        with loop.watch:
            for _ in range(27):
                rates.append(loop.optimizer.param_groups[0]["lr"])
                loop.once()
        expected = rates[10] if way == "return" else 1e-2 * 0.9**26
        assert loop.scheduler.last_epoch == (27 - 16 if way == "return" else 27)
        assert rates[26] == pytest.approx(expected)


def test_averages_that_were_registered_go_back() -> None:
    loop = Loop(at(25))
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    loop.average = torch.optim.swa_utils.AveragedModel(loop.net, multi_avg_fn=ema, use_buffers=True)
    shadow = {"slow": torch.zeros(3), "count": 0}
    loop.watch.register(ema=loop.average, shadow=shadow)
    with loop.watch:
        for _ in range(26):
            shadow["slow"] += 1
            shadow["count"] += 1
            loop.once()
    assert loop.same_as(10)
    assert shadow["count"] == 10
    assert shadow["slow"].tolist() == [10.0] * 3


def test_what_has_no_state_can_not_be_registered() -> None:
    loop = Loop(at(25))
    with pytest.raises(ConfigError, match="'bad' is a object"):
        loop.watch.register(bad=object())
    loop.watch.close()


def test_an_optimizer_of_the_users_own_around_another_goes_back_with_its_slow_weights() -> None:
    class Lookahead:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.count = optimizer, 0
            self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

        @property
        def param_groups(self) -> Any:
            return self.optimizer.param_groups

        @property
        def state(self) -> Any:
            return self.optimizer.state

        def step(self) -> None:
            self.optimizer.step()
            self.count += 1
            if self.count % 4 == 0:
                for slow, p in zip(self.slow, self.optimizer.param_groups[0]["params"], strict=True):
                    slow.lerp_(p.detach(), 0.5)
                    p.data.copy_(slow)

        def zero_grad(self) -> None:
            self.optimizer.zero_grad()

    loop = Loop(watched=False)
    outer = Lookahead(loop.optimizer)
    from gradwatch import Watch

    loop.watch = Watch(loop.net, outer, rules=[at(25)])
    kept = {}
    with loop.watch:
        for step in range(1, 27):
            loop.once()
            kept[step] = ([t.clone() for t in outer.slow], outer.count)
    assert loop.same_as(10)
    assert equal(kept[26], kept[10])


# Where to


def test_the_snapshot_is_from_before_the_condition_began_to_hold() -> None:
    rule = Expression("step >= 18 and step < 30", name="slow", for_steps=8, then=Rollback(steps=10, snapshots=3))
    loop = Loop(rule)
    with loop.watch:
        loop.run(26)
    (incident,) = loop.watch.incidents
    assert incident.details["began"] == 18
    assert incident.details["rolled_back_from"] == 25
    assert incident.details["rolled_back_to"] <= 18 - 10
    assert loop.same_as(incident.details["rolled_back_to"])


def test_a_rule_that_needs_several_records_reaches_further_back() -> None:
    assert LossSpike(spikes=3, of=10).reach == 9
    assert LossSpike(spikes=1).reach == 0


def test_early_in_a_run_it_goes_back_to_the_first_snapshot() -> None:
    loop = Loop(at(7, steps=100))
    with loop.watch:
        loop.run(8)
    assert loop.same_as(1)


def test_a_snapshot_whose_weights_are_not_finite_is_never_taken() -> None:
    loop = Loop(at(28, steps=10))
    with loop.watch:
        loop.run(15)
        with torch.no_grad():
            loop.net.last.weight[0, 0] = math.nan  # nobody's rule looks at it
        loop.run(14)
    assert loop.watch.incidents[0].details["rolled_back_to"] == 10
    assert loop.same_as(10)


def test_the_last_good_snapshot_outlives_the_bad_ones() -> None:
    loop = Loop(at(58, steps=10))
    with loop.watch:
        loop.run(15)
        with torch.no_grad():
            loop.net.last.weight[0, 0] = math.inf
        loop.run(44)
    assert loop.watch.incidents[0].details["rolled_back_to"] == 10
    assert loop.same_as(10)


def test_with_no_snapshot_there_is_no_return_and_that_is_said() -> None:
    notified = []
    loop = Loop(at(0, then=Notify(notified.append)))
    with loop.watch:
        loop.run(2)
    said = [i for i in loop.watch.incidents if i.rule == "rollback_failed"]
    assert len(said) == 1
    assert "there is no snapshot yet" in said[0].message
    assert len(notified) == 1


# How often


def test_a_budget_ends_in_a_stop() -> None:
    loop = Loop(at(*range(12, 60, 8), max_times=2))
    with pytest.raises(TrainingStopped, match="has gone back 2 times already"), loop.watch:
        loop.run(60)
    assert loop.step == 28  # at steps 12 and 20 it went back
    backs = [i.details["rollback"] for i in loop.watch.incidents if "rolled_back_to" in i.details]
    assert [b.partition("(")[2] for b in backs] == ["1 of 2)", "2 of 2)"]


def test_a_resumed_run_remembers_its_budget_and_has_a_snapshot_at_once() -> None:
    first = Loop(at(12, 20, max_times=2))
    with first.watch:
        first.run(21)
        saved = first.watch.state_dict()
    second = Loop(at(25, max_times=2))
    second.step = 21
    second.watch.load_state_dict(saved)
    with pytest.raises(TrainingStopped, match="2 times already"), second.watch:
        second.run(10)
    third = Loop(at(25, max_times=3))
    third.step = 21
    third.watch.load_state_dict(saved)
    with third.watch:
        third.run(5)
        said = third.watch.incidents[-1].details
    assert said["rollback"] == "rolled back from 25 to 22 (3 of 3)"
    assert third.same_as(22)


def test_more_returns_than_a_rules_budget_of_actions_are_not_swallowed() -> None:
    loop = Loop(at(*range(12, 90, 6), max_times=8))
    with pytest.raises(TrainingStopped, match="8 times already"), loop.watch:
        loop.run(100)


def test_actions_behind_it_come_after_the_return() -> None:
    loop = Loop(at(25, then=LowerLearningRate(0.5, steps=5)))
    rates: list[float] = []
    loop.optimizer.register_step_post_hook(lambda *_: None)
    loop.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    with loop.watch:
        loop.run(40)
    assert loop.watch.session.engine.rates.factor == 1.0
    lowered = loop.watch.incidents[0].treatments
    assert lowered == ("rollback",)


# What is held


def test_it_is_refused_at_once_where_it_can_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"2 snapshots of .* don't fit into `memory_limit_mb` = 0.001"):
        Loop(at(25, memory_limit_mb=0.001))
    with pytest.raises(ConfigError, match="one snapshot on its way to a file"):
        Loop(at(25, memory_limit_mb=0.001, storage="disk"))


def test_fewer_are_held_where_states_turn_out_larger_than_expected(unheard: list[str]) -> None:
    loop = Loop(at(25, memory_limit_mb=0.015), optimizer="by-hand")  # its state is known to nobody
    with loop.watch:
        loop.run(26)
    bound = 0.015 * 2**20
    assert len(snapshots(loop).held) <= 1
    assert loop.watch.session.engine.rollbacks.snapshots.num_bytes <= bound
    assert any("instead of 2 snapshots" in message for message in unheard)
    unheard.clear()


def test_no_more_than_the_bound_is_held_at_any_step() -> None:
    loop = Loop(at(95, 97, steps=10, snapshots=3))
    held = []
    with loop.watch:
        for _ in range(120):
            loop.once()
            ours = snapshots(loop)
            hosts = [c.host for s in ours.held for c in _kept(s.tree)] + list(ours._spare)
            storages = {h.untyped_storage().data_ptr(): h.untyped_storage().nbytes() for h in hosts if h is not None}
            held.append(sum(storages.values()))
    assert max(held) <= 3 * ours.num_bytes
    assert len(loop.watch.incidents) >= 2


def _kept(tree: Any) -> Any:
    from gradwatch.torchside import kept_tensors

    return kept_tensors(tree)


def test_snapshots_in_files_are_put_back_bit_for_bit_and_removed(tmp_path) -> None:
    loop = Loop(at(25, storage="disk", folder=tmp_path / "s"))
    with loop.watch:
        loop.run(24)
        ours = snapshots(loop)
        for s in ours.held:
            s.written.result()
        assert len(list((tmp_path / "s").rglob("*.pt"))) == 2
        assert all(c.host is None for s in ours.held for c in _kept(s.tree))
        loop.run(2)
    assert loop.same_as(10)
    assert not list((tmp_path / "s").rglob("*.pt"))


def test_files_that_are_gone_cost_the_return_and_nothing_else(tmp_path) -> None:
    loop = Loop(at(35, storage="disk", folder=tmp_path / "s"))
    with loop.watch:
        loop.run(22)
        for s in snapshots(loop).held:
            s.written.result()
        shutil.rmtree(tmp_path / "s")
        loop.run(24)
    assert loop.watch.incidents[0].details["rollback"].startswith("not rolled back: the snapshot of step 20 can't be")
    assert loop.watch.history[-1].step == 45


def test_the_summary_says_what_it_costs() -> None:
    loop = Loop(at(25))
    with loop.watch:
        loop.run(12)
        said = loop.watch.summary()
    assert "rollback: a snapshot every 10 steps, 2 of " in said
    assert "of at most 4096 MiB" in said


# What is said, and what rules remember


def test_record_and_run_folder_say_from_where_to_where(tmp_path) -> None:
    loop = Loop(at(25), run_dir=tmp_path / "run")
    with loop.watch:
        loop.run(40)
    records = {record.step: record for record in loop.watch.history}
    assert records[26].scalars["rolled_back_from"] == 25
    assert records[26].scalars["rolled_back_to"] == 10
    run = read_run(tmp_path / "run")
    assert run.annotations[0]["rolled_back"] == {"from": 25, "to": 10, "rule": "trouble"}
    (incident,) = run.incidents
    assert incident.treatments == ("rollback",)
    assert incident.done == ("rolled back from 25 to 10 (1 of 3)",)
    assert incident.resolved
    assert "rolled back from 25 to 10 (1 of 3)" in str(incident)
    assert (
        "gradwatch ran rollback for it: rolled back from 25 to 10" in loop.watch.report(tmp_path / "r.md").read_text()
    )


def test_the_incident_says_that_the_training_went_back_before_the_next_step_begins() -> None:
    sink = MemorySink()
    loop = Loop(at(25), sinks=[sink])
    with loop.watch:
        loop.run(26)  # whatever ends the process now, it has been told
        told = sink.incidents[-1]
        assert (told.treatments, told.resolved_step) == (("rollback",), 25)
        assert told.details["rolled_back_to"] == 10


def spiky(step: int) -> float:
    return 50.0 if step in (80, 81, 82, 110, 111, 112) else 1.0


def test_rules_remember_what_they_did_then_so_that_the_same_trouble_is_seen_again(tmp_path) -> None:
    rule = LossSpike(window=32, min_samples=16, then=Rollback(steps=20))
    loop = Loop(rule, run_dir=tmp_path / "run")
    with loop.watch:
        loop.run(140, spiky)
    backs = [i.details["rolled_back_from"] for i in loop.watch.incidents]
    assert backs == [82, 112]
    assert [i.details["rolled_back_to"] for i in loop.watch.incidents] == [29, 29]
    assert all(i.resolved_step == i.details["rolled_back_from"] for i in loop.watch.incidents)
    again = replay(read_run(tmp_path / "run"), load_rules([rule]))
    said = again.differences(loop.watch.incidents)
    assert not [line for line in said if "`treatments`" not in line], said


# Doors


def test_rules_files_spell_it_as_python_does(tmp_path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "rules:\n  - loss_spike: {z: 8}\n    then:\n      - rollback: {steps: 50, schedulers: return, "
        "then: [{lower_learning_rate: {factor: 0.5}}]}\n"
    )
    (rule,) = load_rules(file).rules
    (rollback,) = rule.then
    assert (rollback.name, rollback.steps, rollback.schedulers) == ("rollback", 50, "return")
    assert rollback.then[0].factor == 0.5


def test_a_rules_file_names_no_code_inside_of_it_either(tmp_path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - loss_spike:\n    then: [{rollback: {then: [{notify: {target: 'os:system'}}]}}]\n")
    with pytest.raises(ConfigError, match="code that importing would run"):
        load_rules(file)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "`steps` must be a whole number of at least 1"),
        ({"snapshots": 0}, "`snapshots` must be"),
        ({"schedulers": "back"}, "`schedulers` can't be 'back'"),
        ({"storage": "ram"}, "`storage` can't be 'ram'"),
        ({"memory_limit_mb": math.nan}, "`memory_limit_mb` must be a number above 0"),
        ({"then": "lower"}, "takes actions"),
        ({"then": LowerLearningRate}, "takes actions"),
        ({"then": Rollback()}, "takes actions"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rollback(**settings)


def test_gradients_of_weights_that_were_left_move_nothing() -> None:
    torch.manual_seed(0)
    g, d = nn.Linear(4, 4), nn.Linear(4, 4)
    og, od = torch.optim.SGD(g.parameters(), 0.1, momentum=0.9), torch.optim.SGD(d.parameters(), 0.1, momentum=0.9)
    both = nn.ModuleList([g, d])
    from gradwatch import Watch

    watch, states = Watch(both, [og, od], rules=[at(24, steps=8)]), {}
    with watch:
        for i in range(13):
            x = torch.randn(3, 4)
            g(x).square().mean().backward()
            d(x).square().mean().backward()
            watch.step(optimizer=og)
            states[2 * i + 1] = copied(both, og, od)
            watch.step(optimizer=od)
            states[2 * i + 2] = copied(both, og, od)
            og.zero_grad()
            od.zero_grad()
    to = next(r.scalars["rolled_back_to"] for r in watch.history if "rolled_back_to" in r.scalars)
    assert equal(states[25], states[to])
    assert equal(states[26], states[to])  # the other's gradient was of the weights that were left
