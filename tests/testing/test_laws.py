"""The shared laws hold for what gradwatch brings, and each of them can fail."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from gradwatch.protocols import RunMeta
from gradwatch.rules import RULES, Rule
from gradwatch.sinks import RunFolder
from gradwatch.stats import Statistic
from gradwatch.testing import MemorySink, check_rule, check_sink, check_statistic, check_treatment, odd_records
from gradwatch.treatments import TREATMENTS

SETTINGS = {
    "clip_by_global_norm": {"max_norm": 1.0},
    "clip_by_norm": {"max_norm": 1.0},
    "clip_by_value": {"max_value": 1.0},
    "noise": {"eta": 0.1},
    "quantile_clip": {"q": 0.9},
    "scale": {"factor": 0.5},
}
SURGERY = {"surgery", "micro_batch_surgery"}


@pytest.mark.parametrize("name", sorted(set(RULES) - {"expression"}))
def test_built_in_rule_keeps_the_laws(name):
    check_rule(RULES[name]())


@pytest.mark.parametrize("name", sorted(set(TREATMENTS) - SURGERY))
def test_built_in_treatment_keeps_the_laws(name):
    check_treatment(TREATMENTS[name](**SETTINGS.get(name, {})))


def test_built_in_sinks_keep_the_laws(tmp_path):
    check_sink(MemorySink)
    check_sink(lambda: RunFolder(tmp_path / "run"), run_dir=tmp_path)


class Sound(Rule):
    """Fires when the norm is above 1."""

    def init(self):
        return {"seen": 0, "per_path": {}}

    def judge(self, record, state):
        found = self.whole(record, record.global_norm > 1, record.global_norm, 1.0)
        return found, {**state, "seen": state["seen"] + 1}


class Remembering(Sound):
    def judge(self, record, state):
        state["seen"] += 1
        return self.clear(record), state


class Hidden(Sound):
    def judge(self, record, state):
        object.__setattr__(self, "advice", f"step {record.step}")
        return self.clear(record), state

    def __repr__(self):
        return f"Hidden({self.advice})"


class Random(Sound):
    def judge(self, record, state):
        return self.whole(record, True, np.random.default_rng().random(), 0.0), state


class Tensors(Sound):
    def init(self):
        return {"sum": torch.zeros(())}


class Fragile(Sound):
    def judge(self, record, state):
        return self.whole(record, record.columns["grad_norm"].max() > 1, 1.0, 1.0), state


class Negative(Sound):
    def limit(self, state):
        return -1.0


class Spoiling(Sound):
    def judge(self, record, state):
        for column in record.columns.values():
            column[:] = 0
        return self.clear(record), state


def test_sound_rule_keeps_the_laws():
    check_rule(Sound())


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (Remembering, "leaves the memory it was given as it was"),
        (Hidden, "leaves the rule's settings as they were"),
        (Random, "finds the same again"),
        (Tensors, "plain values and numpy arrays"),
        (Negative, "a number that is not negative"),
        (Spoiling, "leaves the record as it was"),
    ],
)
def test_rule_law_can_fail(rule, law):
    with pytest.raises(AssertionError, match=law):
        check_rule(rule())


def test_rule_that_a_missing_column_stops_fails_with_its_own_error():
    with pytest.raises(KeyError, match="grad_norm"):
        check_rule(Fragile())


def test_odd_records_hold_all_that_may_go_wrong():
    records = odd_records()
    norms = np.concatenate([r.columns["grad_norm"] for r in records if "grad_norm" in r.columns])
    assert np.isnan(norms).any()
    assert np.isinf(norms).any()
    assert any(not r.columns for r in records)
    assert any(not r.has_loss for r in records)
    assert records[-1].scalars == {"end_of_run": 1.0}


class Halve:
    """A sound treatment without memory."""

    name = "halve"
    factor = 0.5

    def apply_(self, grads, context):
        if context.trigger is True:
            grads.mul_(self.factor)
        return {"coefficient": self.factor}

    def state_dict(self):
        return {}

    def load_state_dict(self, state: Mapping) -> None: ...


class Always(Halve):
    def apply_(self, grads, context):
        grads.mul_(0.5)


class Mover(Halve):
    def apply_(self, grads, context):
        for p in grads.params:
            p.add_(1)


class Divider(Halve):
    def apply_(self, grads, context):
        if context.trigger is True:
            grads.mul_(1e30)


class Wordy(Halve):
    def apply_(self, grads, context):
        return {"why": [1, 2, 3]}


class Written(Halve):
    def apply_(self, grads, context):
        return {"why": "3 of 4"}


class Half(Halve):
    def apply_(self, grads, context):
        return {"share": torch.ones(()) * 1j}


class Forgetful(Halve):
    """Halves at every second step, and forgets where it was."""

    def __init__(self):
        self.count = 0

    def apply_(self, grads, context):
        self.count += context.trigger is True
        if self.count % 3 == 2:
            super().apply_(grads, context)


def test_sound_treatment_keeps_the_laws():
    check_treatment(Halve())


@pytest.mark.parametrize(
    ("treatment", "law"),
    [
        (Always, "behind a rule that did not fire"),
        (Mover, "leaves the parameters' values alone"),
        (Divider, "finite gradients stay finite"),
        (Wordy, "it reports numbers"),
        (Written, "it reports numbers"),
        (Half, "it reports numbers"),
        (Forgetful, "after a checkpoint"),
    ],
)
def test_treatment_law_can_fail(treatment, law):
    with pytest.raises(AssertionError, match=law):
        check_treatment(treatment())


def test_object_without_a_treatments_methods_is_no_treatment():
    with pytest.raises(AssertionError, match="a treatment is an object with `apply_`"):
        check_treatment(object())


class Deaf:
    """Keeps nothing."""

    def open(self, meta: RunMeta) -> None: ...

    def write(self, record, window) -> None: ...

    def incident(self, incident) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Scribbling(Deaf):
    def write(self, record, window):
        for column in record.columns.values():
            np.nan_to_num(column, copy=False)


def test_sink_laws_hold_for_a_sound_sink_and_can_fail():
    check_sink(Deaf)
    with pytest.raises(AssertionError, match="leaves records as they are"):
        check_sink(Scribbling)
    with pytest.raises(AssertionError, match="has the methods open, write, incident, flush and close"):
        check_sink(object)


class Norms(Statistic):
    """Squared norm of each gradient."""

    name = "norms_for_the_laws"

    def sums(self, view):
        return view.rows([g.square().sum() for g in view.grads])


class Reading(Norms):
    name = "reading"

    def sums(self, view):
        return super().sums(view) * view.grads[0].sum().item()


class Changing(Norms):
    name = "changing"

    def sums(self, view):
        view.grads[0].mul_(2)
        return super().sums(view)


class Averaging(Norms):
    name = "averaging"

    def sums(self, view):
        return view.rows([g.mean() if g.numel() else g.new_zeros(()) for g in view.grads])


class Imaginary(Norms):
    name = "imaginary"

    def sums(self, view):
        return super().sums(view) * 1j


class Narrow(Norms):
    name, num_sums = "narrow", 2


class Hiding(Norms):
    name = "hiding"

    def sums(self, view):
        return view.rows([g.nan_to_num(0.0, 0.0, 0.0).square().sum() for g in view.grads])


class Emptiness(Norms):
    name, num_sums, num_maxima = "emptiness", 0, 1

    def maxima(self, view):
        return view.rows([g.max() for g in view.grads])


class Misnaming(Norms):
    name = "misnaming"

    def finish(self, sums, maxima):
        return {"other": sums[:, 0]}


class Misshaping(Norms):
    name = "misshaping"

    def finish(self, sums, maxima):
        return sums


class Counting(Norms):
    name = "counting"
    calls = 0

    def finish(self, sums, maxima):
        type(self).calls += 1
        return sums[:, 0] + self.calls


class Dumb(Norms):
    name = "dumb"

    def sums(self, view):
        return None


class OfOutputs(Norms):
    """Sum of an output."""

    name, needs, kind = "of_outputs_for_the_laws", "outputs", ""

    def sums(self, view):
        return view.rows([sum(t.sum() for t in view.outputs)])


@pytest.mark.parametrize("statistic", [Norms(), OfOutputs()], ids=lambda s: s.name)
def test_a_sound_statistic_keeps_the_laws(statistic):
    check_statistic(statistic)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Reading, "reads nothing back"),
        (Changing, "leaves what it is shown"),
        (Averaging, "add up to those of the whole"),
        (Narrow, "rows of 2"),
        (Imaginary, "sums and maxima are real"),
        (Hiding, "hides nothing"),
        (Misnaming, "gives what its columns name"),
        (Misshaping, "has shape"),
        (Counting, "the same again"),
        (Dumb, "says something"),
        (Emptiness, "may be empty"),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_the_laws_of_statistics_can_fail(broken, law):
    with pytest.raises(AssertionError, match=law):
        check_statistic(broken())
