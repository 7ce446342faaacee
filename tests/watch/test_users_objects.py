"""What users hand over may be of any kind: it trains watched as it trains unwatched, and only its own numbers miss."""

import dataclasses
import warnings
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from gradwatch import Watch
from gradwatch.rules import NonFinite
from gradwatch.treatments import SkipStep
from gradwatch.watch._batch import batch_scalars, num_samples, split_batch

X, Y = torch.ones(4, 3), torch.tensor([0, 1, 2, 0])


@dataclasses.dataclass
class Late:
    x: Tensor
    y: Tensor
    cache: object = dataclasses.field(init=False, repr=False)


class Raises:
    def __getattribute__(self, name):
        raise RuntimeError("hands off")


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        pytest.param((X, Y), 4, id="pair"),
        pytest.param(UserDict(x=X), 4, id="user-dict"),
        pytest.param(Late(X, Y), 4, id="dataclass"),
        pytest.param(SimpleNamespace(x=X), 4, id="plain-object"),
        pytest.param([torch.tensor(1.0), X], 4, id="a-number-first"),
        pytest.param((pack_sequence([X, X[:2]]), Y), 2, id="packed-sequences"),
        pytest.param(X.to_sparse(), 4, id="sparse"),
        pytest.param(X.to("meta"), 4, id="meta"),
        pytest.param({"x": np.ones((5, 2))}, 5, id="arrays"),
        pytest.param(["a", "b"], 0, id="texts"),
        pytest.param((i for i in range(3)), 0, id="generator"),
        pytest.param(Raises, 0, id="raises-on-all"),
        pytest.param(None, 0, id="none"),
    ],
)
def test_samples_are_counted_where_there_are_any_and_nothing_raises(batch, count):
    batch = Raises() if batch is Raises else batch
    assert num_samples(batch) == count
    batch_scalars(batch, batch, batch)


def test_targets_are_found_by_name_in_mappings_dataclasses_and_pairs():
    assert split_batch({"x": X, "labels": Y})[1] is Y
    assert split_batch(UserDict(x=X, y=Y))[1] is Y
    assert split_batch(Late(X, Y))[1] is Y
    assert split_batch((X, Y)) == (X, Y)
    assert split_batch(X) == (X, None)


@pytest.mark.parametrize("strange", [X.to("meta"), X.to_sparse(), X.to(torch.complex64), X.to(torch.float8_e5m2)])
def test_inputs_that_can_not_be_measured_leave_the_numbers_of_outputs_and_targets(strange):
    missed = {}
    found = batch_scalars(strange, torch.randn(4, 3), Y, missed=missed.setdefault)
    assert found["num_classes"] == 3
    assert {"output_max", "target_max", "cross_entropy"} <= set(found)
    assert all(type(v) in (float, Tensor) and not (isinstance(v, Tensor) and v.is_meta) for v in found.values())


class Image(Tensor):
    """What a library of images calls its tensors."""


def ragged(x: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x[:1], x[1:]], layout=layout)


KINDS = {
    "sparse": lambda x: x.to_sparse(),
    "sparse-rows": lambda x: x.to_sparse_csr(),
    "nested": lambda x: ragged(x, torch.strided),
    "jagged": lambda x: ragged(x, torch.jagged),
    "of-a-class": lambda x: x.as_subclass(Image),
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:, :1].expand(-1, 3),
    "float8": lambda x: x.to(torch.float8_e5m2),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_of_any_layout_and_class_give_the_numbers_of_their_elements(kind):
    plain = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -3.0], [1.0, 0.0, 0.0]])
    plain = plain[:, :1].expand(-1, 3) if kind == "expanded" else plain
    strange, missed = KINDS[kind](plain), {}
    found = batch_scalars((strange, Y[:3]), strange, missed=missed.setdefault)
    assert not [what for what in missed if "inputs" in what], missed
    wanted = {"input_mean": plain.mean(), "input_std": plain.std(correction=0), "input_absmax": plain.abs().max()}
    wanted |= {"output_min": plain.min(), "output_max": plain.max()}
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-6), name
    assert found["target_max"] == 2


def test_of_what_can_not_be_read_all_numbers_are_told_in_one_line():
    missed = {}
    batch_scalars((X.to("meta"), Y), missed=missed.setdefault)
    assert list(missed) == ["numbers of the inputs (spread, range)"]


def step_with_loss(loss):
    model = nn.Linear(3, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), rules=[]) as watch:
        value = model(X).mean()
        value.backward()
        return watch.step(loss=loss(value)).record


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        pytest.param(lambda v: 2, 2.0, id="int"),
        pytest.param(lambda v: np.float32(0.5), 0.5, id="numpy-scalar"),
        pytest.param(lambda v: np.array(0.5), 0.5, id="array-of-no-dimension"),
        pytest.param(lambda v: torch.tensor([1.0, 3.0]), 2.0, id="several-elements"),
        pytest.param(lambda v: {"loss": v * 0 + 3}, 3.0, id="dict"),
        pytest.param(lambda v: v * 0 + 1, 1.0, id="on-the-graph"),
    ],
)
def test_a_loss_may_be_of_many_kinds(loss, expected):
    assert step_with_loss(loss).loss == expected


@pytest.mark.parametrize(
    "loss", ["text", object(), torch.ones(2, device="meta"), Raises, np.complex64(1j), np.ones(2) * 1j]
)
def test_a_loss_that_is_none_is_told_once_and_the_step_is_measured(loss):
    with pytest.warns(UserWarning, match="gradwatch: the loss can't be read"):
        record = step_with_loss(lambda v: Raises() if loss is Raises else loss)
    assert not record.has_loss
    assert record.global_norm > 0


class Delegates(nn.Module):
    """Hands what it lacks on to another, that raises in its own way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def __getattr__(self, name):
        if name in self.__dict__["_modules"]:
            return self.__dict__["_modules"][name]
        raise RuntimeError(f"nobody has a {name}")

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "options", [{}, {"backward": "full", "local_norms": True, "autopsy": True}, {"rules": "autoclip"}]
)
def test_a_model_whose_attributes_raise_is_watched_as_any_other(options):
    model = Delegates()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, activations_every=1, on_error="raise", **options) as watch:
        for _ in range(3):
            loss = model(X).mean()
            loss.backward()
            watch.step(loss=loss)
            optimizer.zero_grad()
    assert [record.has_gradient for record in watch.history] == [True] * 3


class Wrapper(torch.optim.Optimizer):
    """Never calls `Optimizer.__init__`."""

    def __init__(self, inner):
        self.hidden = inner

    param_groups = property(lambda self: self.hidden.param_groups)
    state = property(lambda self: self.hidden.state)

    def zero_grad(self, set_to_none=True):
        self.hidden.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.hidden.step()


class Duck:
    """No torch optimizer at all; moves parameters without a gradient too."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": None}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= 0.05 * (1.0 if p.grad is None else p.grad)

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


class Refuses(torch.optim.SGD):
    def register_step_pre_hook(self, hook):
        raise RuntimeError("no hooks here")


def sgd(params, kind=torch.optim.SGD):
    return kind(params, lr=0.05, momentum=0.9)


MAKERS = {"wrapper": lambda p: Wrapper(sgd(p)), "duck": Duck, "refuses": lambda p: sgd(p, Refuses)}


def train(make, *, watched, bad_step=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = make(model.parameters())
    watch = Watch(model, optimizer, updates_every=1, **options) if watched else None
    for i in range(6):
        loss = model(torch.randn(5, 4)).square().mean() * (float("nan") if i == bad_step else 1)
        if watch is None and i == bad_step:
            continue
        loss.backward()
        optimizer.step() if watch is None else watch.step(loss=loss)
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
    return [p.detach() for p in model.parameters()], watch


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_optimizer_of_any_making_trains_watched_bit_for_bit_as_unwatched(make):
    bare, _ = train(make, watched=False)
    seen, watch = train(make, watched=True, rules=[], on_error="raise")
    assert all(torch.equal(a, b) for a, b in zip(bare, seen, strict=True))
    assert all("update_ratio" in r.columns for r in watch.history)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.filterwarnings("ignore:gradwatch. .* a veto takes hold before it")
def test_a_veto_holds_for_an_optimizer_that_takes_no_hooks(make):
    bare, _ = train(make, watched=False, bad_step=3)
    seen, watch = train(make, watched=True, bad_step=3, rules=[NonFinite(then=SkipStep())])
    assert all(torch.equal(a, b) for a, b in zip(bare, seen, strict=True))
    assert [r.step for r in watch.history if r.skipped] == [3]


def test_a_step_that_tells_nothing_of_itself_is_told_once_with_a_treatment_and_noted_without():
    _, watch = train(Duck, watched=True, rules=[])
    assert [n for n in watch.session.notes if "a veto takes hold before it" in n]
    with pytest.warns(UserWarning, match="Duck takes no step hooks") as said:
        train(Duck, watched=True, rules=[NonFinite(then=SkipStep())])
    assert len(said) == 1


def test_warnings_as_errors_and_numpy_that_raises_make_no_fault_of_watching():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "on_error": "raise"}
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        with Watch(model, optimizer, **options) as watch:
            for scale in (1, 1e-30, 1e30, float("inf"), float("nan"), 1):
                out = model(torch.randn(4, 3))
                loss = nn.functional.cross_entropy(out, Y) * scale
                loss.backward()
                watch.step(loss=loss, batch=(X, Y), outputs=out)
                optimizer.zero_grad()
            watch.summary()
    assert watch.session.engine.guard.notes == []
