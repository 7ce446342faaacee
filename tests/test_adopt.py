"""What looks like a rule, a treatment, an action or a sink is one, with the documented defaults: nobody probes."""

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import ConfigError, Watch
from gradwatch._adopt import original
from gradwatch.protocols import Action, Sink, Treatment, as_action_or_treatment, as_sink, as_treatment
from gradwatch.requests import SaveCheckpoint
from gradwatch.rules import Rule, RuleBook, as_rule
from gradwatch.sinks import SafeSinks
from gradwatch.stats import Statistic

ROOT = Path(gradwatch.__file__).parent


class Doubling:
    """Doubles, and has nothing else."""

    factor = 2.0

    def apply_(self, grads, context):
        grads.mul_(self.factor)


class LikeAnAction:
    """Asks for a checkpoint."""

    def act(self, incident, context):
        context.request(SaveCheckpoint(filename="like"))


class LikeARule:
    """Fires at every third step."""

    severity = "info"
    then = LikeAnAction()
    keep_firing_for = 0

    def judge(self, record, state):
        return [self.finding(record)] if record.step % 3 == 0 else [], state

    def finding(self, record):
        from gradwatch.records import Finding

        return Finding(rule="like_a_rule", step=record.step, value=1.0, limit=0.0, severity="info")


class LikeASink:
    """Keeps steps."""

    def __init__(self):
        self.steps, self.calls = [], []

    def open(self, meta):
        self.calls.append("open")

    def write(self, record, window):
        self.steps += [r.step for r in window]

    def incident(self, incident):
        self.calls.append(incident.rule)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


ADOPTED = [
    pytest.param(as_treatment, Doubling, Treatment, id="treatment"),
    pytest.param(lambda x: as_action_or_treatment(x, "then"), LikeAnAction, Action, id="action"),
    pytest.param(as_rule, LikeARule, Rule, id="rule"),
    pytest.param(as_sink, LikeASink, Sink, id="sink"),
]


def members(cls):
    return {name for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize(("adopt", "kind", "base"), ADOPTED)
def test_what_looks_like_one_has_every_member_of_the_base(adopt, kind, base) -> None:
    given = kind()
    before = dict(vars(given))
    one = adopt(given)
    assert isinstance(one, base)
    assert all(hasattr(one, name) for name in members(base))
    assert original(one) is given
    assert vars(given) == before
    assert adopt(one) is one
    assert type(one).__name__ == kind.__name__


@pytest.mark.parametrize(("adopt", "kind", "base"), ADOPTED)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_an_adopted_one_travels_as_any_other(adopt, kind, base, again) -> None:
    other = again(adopt(kind()))
    assert isinstance(other, base)
    assert isinstance(original(other), kind)


@pytest.mark.parametrize(("adopt", "kind", "base"), ADOPTED)
def test_what_lacks_what_is_needed_and_what_is_a_class_is_refused(adopt, kind, base) -> None:
    with pytest.raises(ConfigError, match="Got the class"):
        adopt(kind)
    with pytest.raises(ConfigError, match="Got 3"):
        adopt(3)


def test_settings_of_an_adopted_rule_are_checked_and_completed() -> None:
    rule = as_rule(LikeARule())
    assert (rule.name, rule.rule_name, rule.paths, rule.treat_after) == ("like_a_rule", "like_a_rule", ("*",), 1)
    assert [type(item) for item in rule.then] != [LikeAnAction]
    wrong = LikeARule()
    wrong.severity = "grave"
    with pytest.raises(ConfigError, match="grave"):
        RuleBook([wrong])


def test_a_training_with_nothing_but_look_alikes() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sink, asked = LikeASink(), []
    options = {"rules": [LikeARule()], "treatments": Doubling(), "sinks": [sink], "log_every": 1}
    with Watch(model, optimizer, on_error="raise", on_checkpoint=asked.append, **options) as watch:
        for _ in range(5):
            model(torch.eye(4)).square().sum().backward()
            watch.step()
            optimizer.zero_grad()
        assert watch.state_dict()
    assert [(i.rule, i.first_step) for i in watch.incidents] == [("like_a_rule", 0)]
    assert asked == ["like"] * len(asked)
    assert asked
    assert [t.name for t in watch.history[0].treatments] == ["doubling"]
    assert watch.history[0].global_norm_after == pytest.approx(2 * watch.history[0].global_norm)
    assert sink.steps == list(range(5))
    assert sink.calls[0] == "open"
    assert sink.calls[-1] == "close"


def test_a_sink_says_itself_that_it_never_hangs() -> None:
    class Stubborn(Sink):
        """Is interrupted the first time it is closed."""

        never_hangs = True
        closed = 0

        def close(self):
            self.closed += 1
            if self.closed == 1:
                raise KeyboardInterrupt

    class Hanging(Stubborn):
        never_hangs = False

    for kind, times in ((Stubborn, 2), (Hanging, 1)):
        sink = kind()
        with pytest.raises(KeyboardInterrupt):
            SafeSinks([sink]).close()
        assert sink.closed == times


KINDS = {"Treatment": Treatment, "Action": Action, "Sink": Sink, "Rule": Rule, "Statistic": Statistic}
MEMBERS = set().union(*map(members, KINDS.values()))
OF_OTHERS = {
    ("errors.py", "name"): "of a hook point",
    ("treatments/surgery/_decide.py", "state_dict"): "of a method of surgery, any callable",
    ("treatments/surgery/_decide.py", "load_state_dict"): "of a method of surgery",
    ("watch/_training.py", "state_dict"): "of a training's own objects",
    ("watch/_training.py", "load_state_dict"): "of a training's own objects",
    ("watch/_scaler.py", "name"): "of a stage of torch's GradScaler",
}
"""Members of ours by name that are asked of objects of other kinds."""


def probes(file, source=None):
    """Yield (line, name) where a member is asked for that may be missing."""
    for node in ast.walk(ast.parse(file.read_text() if source is None else source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 2):
            continue
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
        if asks and name in MEMBERS:
            yield node.lineno, name


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_member_of_ours_is_probed_for(file) -> None:
    place = file.relative_to(ROOT).as_posix()
    found = [(line, name) for line, name in probes(file) if (place, name) not in OF_OTHERS]
    assert not found, f"{place} asks whether a member is there that every one has: {found}"


def test_the_search_for_probes_can_fail() -> None:
    assert list(probes(None, 'hasattr(sink, "summary")\ngetattr(t, "order", 50)')) == [(1, "summary"), (2, "order")]
