"""Statistics of one's own, and numbers of one's own, stand on record as the built-in ones do; and do no harm."""

import copy
import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch, load_rules
from gradwatch.errors import ConfigError, GradwatchWarning
from gradwatch.records import own_columns
from gradwatch.rules import Expression
from gradwatch.stats import At, Statistic
from gradwatch.testing import MemorySink, check_statistic
from gradwatch.treatments import SkipStep
from gradwatch.watch._measurement import Measurement
from gradwatch.watch._tables import TablesDraft


class Squares(Statistic):
    """Sum of squares of each gradient."""

    def sums(self, view):
        return view.rows([grad.double().square().sum() for grad in view.grads])


class Momentum(Statistic):
    """Norm of the momentum that the optimizer keeps, and of the parameter."""

    needs = frozenset({"optimizer_state", "parameters"})
    num_sums = 2
    every = 2

    @classmethod
    def columns(cls):
        (one,) = super().columns()
        return one, type(one)(name="size_of_it", kind="parameter", meaning="Norm of the parameter.")

    def sums(self, view):
        kept = view.state("momentum_buffer")
        if kept[0] is None:
            return None
        return view.rows([m.square().sum() for m in kept], [p.square().sum() for p in view.params])

    def finish(self, sums, maxima):
        return {"momentum": np.sqrt(sums[:, 0]), "size_of_it": np.sqrt(sums[:, 1])}


class Outputs(Statistic):
    """Sum of each module's output, over all calls."""

    needs = "outputs"

    def sums(self, view):
        return sum(t.double().sum() for t in view.outputs).reshape(1, 1)


class Highest(Statistic):
    """Largest entry of any output."""

    needs = "outputs"
    kind, num_sums, num_maxima = "scalar", 0, 1

    def maxima(self, view):
        return torch.stack([t.max() for t in view.outputs]).max().double().reshape(1, 1)

    def finish(self, sums, maxima):
        return maxima.max()


class Changes(Statistic):
    """How often it was asked at these paths."""

    kind = "scalar"

    def sums(self, view):
        view.memory["asked"] = view.memory.get("asked", 0) + 1
        return view.rows([torch.tensor(float(view.memory["asked"]))] * len(view.paths))

    def finish(self, sums, maxima):
        return sums[0, 0]


class Broken(Statistic):
    """Fails at the third step, in one part of it."""

    part = "sums"

    def sums(self, view):
        if self.part == "sums" and view.step == 2:
            raise RuntimeError("my bug")
        if self.part == "shape" and view.step == 2:
            return torch.zeros(1, 7)
        return view.rows([grad.sum() for grad in view.grads])

    def finish(self, sums, maxima):
        self.seen = getattr(self, "seen", 0) + 1
        if self.part == "finish" and self.seen == 3:
            raise RuntimeError("my bug")
        if self.part == "name" and self.seen == 3:
            return {"another": sums[:, 0]}
        return sums[:, 0]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def train(statistics=(), *, steps=4, optimizer=None, model=None, micro=1, each=None, **options):
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) if optimizer is None else optimizer(model)
    torch.manual_seed(1)
    with Watch(model, optimizer, rules=options.pop("rules", "observe"), statistics=statistics, **options) as watch:
        for step in range(steps):
            for _ in range(micro):
                loss = model(torch.randn(6, 4)).square().mean() / micro
                loss.backward()
            if each is not None:
                each(watch, model, step)
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch, model


def test_a_statistic_is_on_record_like_a_built_in_one() -> None:
    watch, _ = train([Squares()], on_error="raise")
    for record in watch.history:
        measured = record.measured("squares")
        assert (measured == record.measured("grad_norm")).all()
        squares = record.columns["squares"][measured]
        np.testing.assert_allclose(squares, record.columns["grad_norm"][measured] ** 2, rtol=1e-5)


def test_gradients_are_free_of_the_loss_scale() -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, rules="observe", scaler=scaler, statistics=[Squares()], on_error="raise") as watch:
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        watch.after_backward()
        record = watch.history[-1] if watch.history else None
    record = record or watch.history[-1]
    np.testing.assert_allclose(record["squares", "0.weight"], record["grad_norm", "0.weight"] ** 2, rtol=1e-5)


def test_optimizer_state_and_parameters_are_seen_at_their_cadence() -> None:
    watch, _ = train([Momentum()], steps=5, on_error="raise", updates_every=1)
    assert [record.step for record in watch.history if "momentum" in record.columns] == [1, 2, 4]
    record = watch.history[2]
    assert record["momentum", "0.weight"] > 0
    np.testing.assert_allclose(record["size_of_it", "0.weight"], record["param_norm", "0.weight"], rtol=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
def test_outputs_of_all_calls_of_a_step_are_added_up(micro) -> None:
    seen: list[float] = []
    model = net()
    model[0].register_forward_hook(lambda module, args, out: seen.append(float(out.detach().double().sum())))
    watch, _ = train([Outputs(), Highest()], model=model, micro=micro, on_error="raise")
    for step, record in enumerate(watch.history):
        mine = seen[step * micro : (step + 1) * micro]
        np.testing.assert_allclose(record["outputs", "0"], sum(mine), rtol=1e-5)
        assert record.scalars["highest"] > 0


def test_outputs_in_evaluation_do_not_count() -> None:
    def evaluate(watch, model, step):
        model.eval()
        model(torch.full((6, 4), 1e6))
        model.train()

    plain, _ = train([Outputs()], on_error="raise")
    watched, _ = train([Outputs()], each=evaluate, on_error="raise")
    assert [r["outputs", "0"] for r in watched.history] == [r["outputs", "0"] for r in plain.history]


def test_hooks_on_modules_come_off_and_those_of_a_new_module_are_hung() -> None:
    def swap(watch, model, step):
        if step == 1:
            model[1] = nn.Tanh()

    watch, model = train([Outputs()], each=swap, steps=5, on_error="raise")
    assert not any(module._forward_hooks for module in model.modules())
    assert watch.history[-1].measured("outputs")[watch.history[-1].index.position("1")]


def test_memory_is_kept_for_each_optimizer_that_steps_alone() -> None:
    first, second = net(), net()
    model = nn.ModuleList([first, second])
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (first, second)]
    with Watch(model, optimizers, rules="observe", statistics=[Changes()], on_error="raise") as watch:
        for _ in range(3):
            for part, optimizer in zip((first, second), optimizers, strict=True):
                part(torch.ones(2, 4)).sum().backward()
                watch.step(optimizer=optimizer)
                optimizer.zero_grad()
    assert [r.scalars["changes"] for r in watch.history] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_on_record(bad) -> None:
    def spoil(watch, model, step):
        if step == 3:
            model[0].weight.grad[0, 0] = bad

    watch, _ = train([Squares()], each=spoil, on_error="raise")
    np.testing.assert_equal(watch.history[3]["squares", "0.weight"], bad)


@pytest.mark.parametrize("statistics", [(), (Squares, Momentum, Outputs, Highest, Changes)], ids=["none", "all"])
def test_training_is_bitwise_the_same(statistics) -> None:
    _, bare = train((), rules="observe")
    _, watched = train([kind() for kind in statistics], rules="observe")
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), watched.parameters(), strict=True))


class Wrong(Statistic):
    """Does what no statistic may, from the third step on."""

    what = ""

    def sums(self, view):
        rows = view.rows([grad.sum() for grad in view.grads])
        if view.step < 2:
            return rows
        if self.what == "writes":
            view.grads[0].mul_(2)
        if self.what == "complex":
            return rows.to(torch.complex128)
        if self.what == "complex rows":
            return view.rows([grad.sum() + 1j for grad in view.grads])
        if self.what == "none among rows":
            return view.rows([None for _ in view.grads])
        return rows

    def finish(self, sums, maxima):
        return sums[:, 0]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("writes", "RuntimeError: it wrote to gradients or parameters: those of step 2 are no longer what they were"),
        ("complex", "TypeError: `sums` gives real numbers. Got torch.complex128"),
        (
            "complex rows",
            "TypeError: `rows` takes a tensor of one real number for each path. "
            "Got a tensor of torch.complex64, shape ()",
        ),
        ("none among rows", "TypeError: `rows` takes a tensor of one real number for each path. Got None"),
    ],
)
def test_one_that_does_what_none_may_is_named_and_switched_off(what, told) -> None:
    wrong = Wrong()
    wrong.what = what
    with pytest.warns(GradwatchWarning, match="statistic 'wrong' failed and is switched off") as warned:
        watch, _ = train([wrong], steps=5)
    assert len(warned) == 1
    assert watch.session.engine.guard.failed == {"statistic 'wrong'": told}
    assert ["wrong" in r.columns for r in watch.history] == [True, True, False, False, False]


@pytest.mark.parametrize("part", ["sums", "shape", "finish", "name"])
def test_one_that_fails_is_told_once_and_switched_off_alone(part) -> None:
    broken = Broken()
    broken.part = part
    _, bare = train((), steps=6)
    with pytest.warns(GradwatchWarning, match="statistic 'broken' failed and is switched off") as told:
        watch, model = train([broken, Squares()], steps=6)
    assert len(told) == 1
    assert ["broken" in r.columns for r in watch.history] == [True, True] + [False] * 4
    assert all("squares" in r.columns for r in watch.history)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert any("statistic 'broken' was switched off" in note for note in watch.session.notes)


def test_a_rule_reads_it_and_a_rules_file_brings_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_statistics.py").write_text(
        "from gradwatch.stats import Statistic\n"
        "class Doubled(Statistic):\n"
        "    'Twice the number of tensors.'\n"
        "    kind = 'scalar'\n"
        "    def __init__(self, factor=2): self.factor = factor\n"
        "    def sums(self, view): return view.rows([g.new_ones(()) for g in view.grads])\n"
        "    def finish(self, sums, maxima): return self.factor * sums.sum()\n"
    )
    (tmp_path / "rules.yaml").write_text(
        "statistics: [{'my_statistics:Doubled': {factor: 3}}]\nscalars: {reward: What was won.}\n"
        "rules:\n  - expression: 'doubled > 11'\n    name: many\n  - expression: 'reward < 0'\n    name: lost\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    book = load_rules(tmp_path / "rules.yaml", allow_code=True)
    assert [s.name for s in book.statistics] == ["doubled"]
    watch, _ = train(rules=book, each=lambda w, m, s: w.record(reward=-s), on_error="raise")
    assert watch.history[0].scalars["doubled"] == 12
    assert {i.name for i in watch.incidents} == {"many", "lost"}


def test_a_package_registers_its_own_by_name(tmp_path, monkeypatch) -> None:
    place = tmp_path / "of_others-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: of-others\nVersion: 1.0\n")
    (place / "entry_points.txt").write_text("[gradwatch.statistics]\nsquares_of_others = of_others:Theirs\n")
    (tmp_path / "of_others.py").write_text(
        "from gradwatch.stats import Statistic\n"
        "class Theirs(Statistic):\n"
        "    'Theirs.'\n"
        "    def sums(self, view): return view.rows([g.sum() for g in view.grads])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    watch, _ = train("squares_of_others", on_error="raise")
    assert "theirs" in watch.history[0].columns
    with pytest.raises(ConfigError, match="squares_of_others"):
        train("squares_of_other")
    sys.modules.pop("of_others")


class Turn(Statistic):
    """Cosine of what the optimizer did to a parameter with its gradient."""

    needs = {"updates", "gradients"}
    scale, signed, num_sums, num_maxima = "linear", True, 3, 1

    @classmethod
    def columns(cls):
        (one,) = super().columns()
        return one, type(one)(name="largest_move", kind="parameter", meaning="Largest change of any element.")

    def sums(self, view):
        moved = [(now - before).double() for now, before in zip(view.params, view.before, strict=True)]
        grads = [g.double() for g in view.grads]
        pairs = list(zip(moved, grads, strict=True))
        return view.rows([(a * b).sum() for a, b in pairs], *([x[i].square().sum() for x in pairs] for i in (0, 1)))

    def maxima(self, view):
        moved = [now - before for now, before in zip(view.params, view.before, strict=True)]
        return view.rows([m.abs().max() if m.numel() else m.new_zeros(()) for m in moved])

    def finish(self, sums, maxima):
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"turn": sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2]), "largest_move": maxima[:, 0]}


class Steps(Turn):
    """The same of one step in two, whole."""

    every, kind = 2, "scalar"
    columns = Statistic.__dict__["columns"]

    def finish(self, sums, maxima):
        return np.sqrt(sums[:, 1].sum())


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def test_what_a_step_does_to_the_parameters_is_measured_when_it_is_taken() -> None:
    check_statistic(Turn())
    options = {"on_error": "raise", "updates_every": 1, "optimizer": plain_sgd}
    watch, _ = train([Turn(), Steps(), Squares()], steps=5, **options)
    for record in watch.history:
        measured = record.measured("turn")
        assert (measured == record.measured("grad_norm")).all()
        assert measured.any()
        np.testing.assert_allclose(record.columns["turn"][measured], -1, rtol=1e-5)
        absmax = record.columns["largest_move"][measured]
        assert (absmax <= record.columns["update_norm"][measured] * (1 + 1e-6)).all()
        assert (absmax > 0).all()
        assert ("steps" in record.scalars) == (record.step % 2 == 0 or record.step == 1)
        if "steps" in record.scalars:
            assert record.scalars["steps"] == pytest.approx(0.1 * record.global_norm, rel=1e-5)


def test_of_a_step_that_was_not_taken_no_update_is_on_record() -> None:
    rule = Expression("step == 2", then=SkipStep())
    watch, _ = train([Turn()], steps=4, rules=[rule], on_error="raise")
    assert ["turn" in record.columns for record in watch.history] == [True, True, False, True]


def test_copies_that_do_not_fit_are_not_made_and_that_is_said() -> None:
    watch, _ = train([Turn()], memory_limit_mb=1e-4, on_error="raise")
    assert not any("turn" in record.columns for record in watch.history)
    assert any("statistic 'turn' is not measured: copies" in note for note in watch.session.notes)


def test_an_update_whose_statistic_fails_is_off_and_nothing_else() -> None:
    class Failing(Turn):
        """Fails at the third step."""

        columns = Statistic.__dict__["columns"]

        def sums(self, view):
            if view.step == 2:
                raise RuntimeError("a bug")
            return super().sums(view)

        def finish(self, sums, maxima):
            return sums[:, 0]

    with pytest.warns(GradwatchWarning, match="statistic 'failing' failed and is switched off") as told:
        watch, _ = train([Failing(), Turn()], steps=5, updates_every=1)
    assert len(told) == 1
    assert ["failing" in record.columns for record in watch.history] == [True, True, False, False, False]
    assert all("turn" in record.columns and "update_norm" in record.columns for record in watch.history)


def test_updates_that_nobody_named_are_not_shown() -> None:
    class Curious(Squares):
        """Looks at what it has not asked for."""

        columns = Statistic.__dict__["columns"]

        def sums(self, view):
            return view.rows([p.sum() for p in view.before])

    with pytest.raises(ConfigError, match="name updates in `needs`"):
        train([Curious()], on_error="raise")


class AtFirst(Statistic):
    """Number of elements of each gradient, at the first step alone."""

    every = 0

    def sums(self, view):
        return view.rows([torch.tensor(float(g.numel())) for g in view.grads])


def test_what_is_measured_at_the_first_step_is_not_measured_again() -> None:
    watch, _ = train([AtFirst()], on_error="raise")
    assert ["at_first" in record.columns for record in watch.history] == [True, False, False, False]
    assert AtFirst.columns()[0].when == "the first step"


class Odd(Statistic):
    """Twice what one rank counts, and at which of the first two parameters it did."""

    kind, num_sums, every = "scalar", 0, 2

    @classmethod
    def columns(cls):
        (one,) = super().columns()
        return one, type(one)(name="counted_at", kind="parameter", meaning="Where it was counted.")

    def tables(self, ranks):
        return {"counts": (ranks.num, 1)}

    def measure(self, view, tables):
        self.told(view, tables)
        return {"several": [g.sum() for g in view.grads], "known": np.arange(2), "number": 3.0}

    def told(self, view, tables):
        tables["counts"][view.rank] = len(view.grads)

    def conclude(self, found):
        if "several" not in found:
            return {}  # this rank could not measure
        assert found["several"].ndim == 1
        assert found["number"] == 3
        return {"odd": 2 * found["counts"].sum(), "counted_at": At(found["known"], np.ones(2))}


def test_a_statistic_with_a_table_of_its_own_puts_numbers_and_places_on_record() -> None:
    check_statistic(Odd())
    watch, _ = train([Odd(), Squares()], on_error="raise", activations_every=None, updates_every=None)
    for record in watch.history:
        assert "squares" in record.columns
        assert ("odd" in record.scalars) == ("counted_at" in record.columns) == (record.step in (0, 1, 2))
    assert watch.history[2].scalars["odd"] == 8
    assert watch.history[2].measured("counted_at").tolist()[:3] == [True, True, False]


class WrongShape(Odd):
    """Another shape than it has said."""

    @classmethod
    def columns(cls):
        return Statistic.columns.__func__(cls)

    def told(self, view, tables):
        tables["counts"] = torch.zeros(3)


class WrongName(Odd):
    """What nobody was told of."""

    columns = WrongShape.__dict__["columns"]

    def conclude(self, found):
        return {"nameless": 1.0}


class EveryRow(Odd):
    """Fills in the rows of others."""

    columns = WrongShape.__dict__["columns"]

    def told(self, view, tables):
        tables["counts"] += 1.0

    def conclude(self, found):
        return {}


class Trusts(EveryRow):
    """Takes it that all goes well."""

    columns = WrongShape.__dict__["columns"]

    def told(self, view, tables):
        tables["counts"][view.rank] = 1.0

    def conclude(self, found):
        return {"trusts": found["number"]}


class Reads(EveryRow):
    """Waits for the device."""

    columns = WrongShape.__dict__["columns"]

    def told(self, view, tables):
        tables["counts"][view.rank] = float(view.grads[0].sum())


@pytest.mark.parametrize(
    ("broken", "law", "warns"),
    [
        (WrongShape, "of shape", "table 'counts' is of shape"),
        (WrongName, "what its columns name", "'nameless', which is not among its columns"),
        (EveryRow, "own row alone", ""),
        (Reads, "reads nothing back", ""),
        (Trusts, "without the numbers of `measure`", ""),
    ],
)
def test_a_table_that_breaks_a_law_is_told_and_training_goes_on(broken, law: str, warns: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_statistic(broken())
    if warns:
        with pytest.warns(GradwatchWarning, match=warns) as told:
            watch, _ = train([broken()])
        assert len(told) == 1
        assert len(watch.history) == 4


@pytest.mark.parametrize(
    "wrong",
    [Squares, object(), [Squares(), Squares()], "no.such:Thing"],
    ids=["a-class", "an-object", "two-of-one-name", "nowhere"],
)
def test_what_is_no_statistic_is_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        train(wrong)


@pytest.mark.parametrize(
    "settings",
    [{"needs": {"weights"}}, {"needs": ()}, {"needs": {"outputs", "gradients"}}, {"every": -1}, {"num_sums": -1}],
    ids=["unknown-need", "no-need", "two-needs", "every-below-0", "sums-below-0"],
)
def test_a_class_that_can_not_be_is_refused_when_it_is_made(settings) -> None:
    with pytest.raises(ConfigError):
        type("Impossible", (Statistic,), settings)


def test_a_class_may_not_take_a_built_in_name() -> None:
    with pytest.raises(ConfigError, match="built in"):
        type("GradNorm", (Statistic,), {})


def test_what_it_is_called_is_told_to_sinks_with_the_run() -> None:
    told = {}

    class Sink(MemorySink):
        def open(self, meta):
            super().open(meta)
            told.update(meta.options)

    train([Squares()], sinks=[Sink()])
    assert told["statistics"] == ["squares"]
    assert {c["name"]: c["meaning"] for c in told["columns"]}["squares"] == "Sum of squares of each gradient."


def test_numbers_of_ones_own_are_on_the_next_record() -> None:
    odd = [3, 2.5, np.float32(1.5), np.array([4.0]), torch.tensor(7.0, requires_grad=True), True]
    watch, _ = train(steps=6, each=lambda w, m, s: w.record(odd_one=odd[s]), on_error="raise")
    assert [r.scalars["odd_one"] for r in watch.history] == [3, 2.5, 1.5, 4.0, 7.0, 1.0]
    assert "odd_one" in {c.name for c in own_columns()}


def test_numbers_stay_at_their_step() -> None:
    watch, _ = train(each=lambda w, m, s: w.record(now=s) if s == 1 else None)
    assert [r.scalars.get("now") for r in watch.history] == [None, 1.0, None, None]


@pytest.mark.parametrize(
    "values",
    [
        *({"text": "high"}, {"pair": torch.ones(2)}, {"nothing": None}, {"a b": 1.0}),
        *({"half": np.complex64(1j)}, {"halves": np.array([1j])}, {"half_tensor": torch.tensor(2 + 0j)}),
        *({"loss": 1.0}, {"seconds": 1.0}, {"grad_norm": 1.0}),
    ],
    ids=lambda v: next(iter(v)),
)
def test_what_is_no_number_or_takes_a_built_in_name_is_told_once_and_left_out(values) -> None:
    plain, _ = train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watch, _ = train(each=lambda w, m, s: w.record(fine=s, **values))
    assert len([w for w in told if issubclass(w.category, GradwatchWarning)]) == 1
    assert [r.scalars["fine"] for r in watch.history] == [0, 1, 2, 3]
    assert all(set(r.scalars) == {*p.scalars, "fine"} for r, p in zip(watch.history, plain.history, strict=True))


def test_without_any_nothing_is_added_to_a_record() -> None:
    watch, model = train()
    assert watch.session.engine.own is None
    assert not any(module._forward_hooks for module in model.modules())


def test_an_expression_may_be_made_before_the_watch() -> None:
    rule = Expression("squares > 0", name="some")
    watch, _ = train([Squares()], rules=[copy.deepcopy(rule)], steps=8)
    assert watch.incidents[0].name == "some"


@pytest.mark.parametrize("name", ["given", "sums", "maxima", "outputs", "norms", "samples", "failed"])
def test_no_name_gets_in_the_way_of_what_travels_with_it(name) -> None:
    named = type("Named", (Outputs,), {"name": name})
    watch, _ = train([named(), Squares()], on_error="raise")
    assert all(name in r.columns and "squares" in r.columns for r in watch.history)


def test_a_statistic_may_have_other_parents_that_look_after_their_children() -> None:
    class Registered:
        known: list[type] = []

        def __init_subclass__(cls, group: str = "", **options: object) -> None:
            super().__init_subclass__(**options)
            cls.known.append((cls, group))

    class Cubes(Statistic, Registered, group="powers"):
        """Sum of cubes of each gradient."""

        def sums(self, view):
            return view.rows([grad.double().pow(3).sum() for grad in view.grads])

    assert Registered.known == [(Cubes, "powers")]
    assert Cubes.name == "cubes"


def test_a_run_folder_says_what_columns_of_ones_own_mean(tmp_path):
    model = nn.Linear(3, 2)
    Watch(model, torch.optim.SGD(model.parameters(), 0.1), statistics=[Squares()], run_dir=tmp_path).close()
    columns = json.loads((tmp_path / "meta.json").read_text())["options"]["columns"]
    assert {"squares": "Sum of squares of each gradient."}.items() <= {c["name"]: c["meaning"] for c in columns}.items()


def test_a_statistic_of_outputs_goes_on_where_a_layer_comes_in_mid_run() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, statistics=[Outputs()], rules="observe", on_error="raise") as watch:
        for step in range(5):
            if step == 2:  # heard of at the end of the step: what other modules gave in it belongs to no row
                model.append(more := nn.Linear(list(model.parameters())[-1].shape[0], 3))
                optimizer.add_param_group({"params": list(more.parameters())})
            loss = model(torch.ones(2, next(model.parameters()).shape[1])).square().mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    name = Outputs.name
    assert [name in r.columns for r in watch.history] == [True, True, False, True, True]
    assert watch.history[-1].measured(name).sum() == watch.history[0].measured(name).sum() + 1


def test_calls_within_a_transform_of_functions_are_no_outputs_of_the_step() -> None:
    found = []
    for transforms in (False, True):
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.ones(2, next(model.parameters()).shape[1])
        with Watch(model, optimizer, statistics=[Outputs()], rules="observe", on_error="raise") as watch:
            for _ in range(3):
                if transforms:
                    torch.func.vmap(model)(10 * x)
                optimizer.zero_grad()
                model(x).square().mean().backward()
                watch.step()
        found.append([record.columns[Outputs.name] for record in watch.history])
    np.testing.assert_equal(found[0], found[1])


def test_where_ranks_are_of_unlike_models_what_is_about_gradients_is_let_go_and_the_rest_is_not() -> None:
    def of(is_about_gradients: bool) -> Measurement:
        kind = type("One", (Measurement,), {"of_gradients": is_about_gradients})
        return kind(None)

    others = [of(False), of(False)]
    draft = TablesDraft(None, [of(True), others[0], Squares(), others[1], of(True)])
    draft.let_go()
    assert draft.plan == others


class NormPerTask(Statistic):
    """A number of a family, and behind it a column."""

    @classmethod
    def columns(cls):
        own = next(iter(super().columns()))
        return (own,)

    def sums(self, view):
        return view.rows([grad.double().square().sum() for grad in view.grads])

    def finish(self, sums, maxima):
        return {"task_norm/": np.sqrt(sums), self.name: sums[:, 0]}


def test_what_stands_behind_a_family_is_on_record_too():
    watch, *_ = train([NormPerTask()])
    record = watch.history[-1]
    squares = record["norm_per_task", "0.weight"]
    assert squares > 0
    assert record.scalars["task_norm/0.weight/0"] == pytest.approx(math.sqrt(squares))


class Turns(Statistic):
    """How often it has been shown these parameters after a step."""

    needs = frozenset({"updates"})

    def sums(self, view):
        view.memory["seen"] = view.memory.get("seen", 0) + 1
        return torch.full((len(view.paths), 1), float(view.memory["seen"]), dtype=torch.float64)


def test_what_is_kept_of_optimizers_that_step_in_turns_is_kept_of_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in model]
    watch = Watch(model, optimizers, rules="observe", statistics=[Turns()])
    for step in range(6):
        model(torch.ones(2, 4)).square().mean().backward()
        watch.step(optimizer=optimizers[step % 2])
        model.zero_grad()
    shown = [record["turns", f"{step % 2}.weight"] for step, record in enumerate(watch.history)]
    assert shown == [1, 1, 2, 2, 3, 3]
