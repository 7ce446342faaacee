"""The index follows the model: whatever changes in mid run is on record within one step."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from gradwatch import Watch
from gradwatch.records import StepRecord
from gradwatch.watch import _model_now

Change = Callable[[nn.Sequential, torch.optim.Optimizer], None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Identity(), nn.Linear(16, 1))


class Adapted(nn.Module):
    """A low-rank adapter around a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def unfreeze(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)


def freeze(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2].requires_grad_(False)


def inject(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2] = Adapted(model[2])
    optimizer.add_param_group({"params": [p for p in model[2].parameters() if p.requires_grad]})


def inject_untold(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2] = Adapted(model[2])


def replace_untold(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[4] = nn.Linear(16, 1)


def replace_told(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[4] = nn.Linear(16, 1)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def fill_a_placeholder(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[3].add_module("inner", nn.Linear(2, 2))


def assign(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def swap(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[1] = nn.GELU()


def cut(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    del model[3]


def grow_in_place(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    first, second = model[0], model[2]
    first.weight.data = torch.cat([first.weight.data, torch.randn(4, 8)])
    first.bias.data = torch.cat([first.bias.data, torch.zeros(4)])
    second.weight.data = torch.cat([second.weight.data, torch.randn(16, 4)], 1)
    for p in (first.weight, first.bias, second.weight):
        p.grad = None
        optimizer.state.pop(p, None)


def tie(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2].bias = model[0].bias


def parametrized(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    parametrize.register_parametrization(model[2], "weight", nn.Identity())


def spectral(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    parametrizations.spectral_norm(model[2])


def weight_norm(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    parametrizations.weight_norm(model[2])


def pruned(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    prune.l1_unstructured(model[2], "weight", amount=0.5)


def double(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.to(torch.float64)


CHANGES = [
    unfreeze, freeze, inject, inject_untold, replace_untold, replace_told, fill_a_placeholder, assign, swap, cut,
    grow_in_place, tie, parametrized, spectral, weight_norm, pruned, double,
]  # fmt: skip


def expected(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[bool, bool, tuple[int, ...]]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {path: (id(p) in held, p.requires_grad, tuple(p.shape)) for path, p in model.named_parameters()}


def listed(record: StepRecord) -> dict[str, tuple[bool, bool, tuple[int, ...]]]:
    """Return what `expected` does, of a record's parameters."""
    index = record.index
    return {
        path: (bool(index.in_optimizer[i]), bool(index.trainable[i]), index.shapes[i])
        for path, i in index.positions.items()
        if index.kinds[i] == "parameter"
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_step_after_a_change_is_a_record_of_the_model_as_it_is_now(change: Change) -> None:
    model = net()
    if change is unfreeze:
        model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, activations_every=1, updates_every=1, histograms_every=1, on_error="raise") as watch:
        for step in range(4):
            if step == 2:
                change(model, optimizer)
            x = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
            model(x).square().mean().backward()
            true = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
            watch.step()
            model.zero_grad()
        at, after = watch.history[2:]
        standing = watch.session.coverage()
    wanted = expected(model, optimizer)
    assert listed(at) == listed(after) == wanted
    assert set(after.index.paths) - wanted.keys() == {path for path, _ in model.named_modules() if path}
    held = {path: true[path] for path, (is_held, _, _) in wanted.items() if is_held and path in true}
    assert {p: after["grad_norm", p] for p in held} == pytest.approx(held, rel=1e-5)
    whole = sum(v**2 for v in held.values()) ** 0.5 if held else float("nan")
    assert after.global_norm == pytest.approx(whole, rel=1e-5, nan_ok=True)
    assert after.has_gradient == bool(held)
    called = {path for path, _ in model.named_modules() if path and not path.endswith("inner")}
    called -= {path for path in called if "parametrizations" in path}
    assert {path for path in called if after["output_rms", path] >= 0} == called
    assert {path: standing[path].state for path in wanted} == {
        path: "measured" if path in held else "in no optimizer" if trainable and not is_held else "no gradient"
        for path, (is_held, trainable, _) in wanted.items()
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_among_thousands_is_on_record_at_once(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_model_now, "_AT_A_LOOK", 1)
    model = net()
    if change is unfreeze:
        model[0].requires_grad_(False)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(held, lr=0.01)
    num_turns = len(list(model.parameters()))
    with Watch(model, optimizer, activations_every=None, updates_every=None, on_error="raise") as watch:
        for step in range(20 + num_turns):
            if step == 19:
                change(model, optimizer)
            x = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
            model(x).square().mean().backward()
            true = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
            watch.step()
            model.zero_grad()
        assert watch.session.engine.meter.model_now.is_large
        at, last = watch.history[19], watch.history[-1]
    wanted = expected(model, optimizer)
    assert listed(at) == listed(last) == wanted
    norms = {path: true[path] for path, (is_held, _, _) in wanted.items() if is_held and path in true}
    assert {path: last["grad_norm", path] for path in norms} == pytest.approx(norms, rel=1e-5)


def test_a_model_that_stays_is_never_indexed_anew() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, activations_every=2) as watch:
        for _ in range(6):
            model(torch.randn(4, 8)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
        assert len({id(r.index) for r in watch.history[1:]}) == 1


def test_optimizers_that_take_turns_and_freeze_each_others_parameters_share_a_few_indices() -> None:
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    model = nn.ModuleDict({"g": generator, "c": critic})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (generator, critic)]
    with Watch(model, optimizers, activations_every=None) as watch:
        for step in range(10):
            turn = step % 2
            for i, part in enumerate((generator, critic)):
                part.requires_grad_(i == turn)
            critic(generator(torch.randn(3, 4))).square().mean().backward()
            watch.step(optimizer=optimizers[turn])
            model.zero_grad()
        for record in watch.history:
            mine = "g" if record.scalars["optimizer"] == 0 else "c"
            measured = {p for p, m in zip(record.index.paths, record.measured("grad_norm"), strict=True) if m}
            assert measured == {f"{mine}.weight", f"{mine}.bias"}
            assert {p for p, t in zip(record.index.paths, record.index.trainable, strict=True) if t} == measured
        assert len({id(r.index) for r in watch.history}) == 2


@pytest.mark.parametrize("is_recording", [True, False], ids=["recording", "no-grad"])
def test_what_is_frozen_and_unfrozen_at_every_other_step_is_on_record_at_each(is_recording: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, rules="observe") as watch:
        for step in range(12):
            is_trained = step % 2 == 0 or 4 < step < 8
            model[2].requires_grad_(is_trained)
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            with torch.set_grad_enabled(is_recording):
                record = watch.step(loss=loss).record
            assert record is not None
            places = record.index.positions
            assert bool(record.index.trainable[places["2.weight"]]) is is_trained
            optimizer.zero_grad()


def test_what_is_replaced_and_still_held_is_said_and_never_judged() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, activations_every=None) as watch:
        for step in range(120):
            if step == 30:
                model[4] = nn.Linear(16, 1)
            loss = (model(torch.randn(16, 8)) - 1).square().mean()
            loss.backward()
            watch.step(loss=loss)
            model.zero_grad()
        standing, text = watch.session.coverage(), watch.summary()
    assert standing["<optimizer>.4.weight"].state == "replaced"
    assert "since step 30" in standing["<optimizer>.4.weight"].reason
    assert standing["4.weight"].state == "in no optimizer"
    assert "replaced in the model, though an optimizer still holds the old: 4.weight, 4.bias" in text
    assert {(i.rule, i.first_path) for i in watch.incidents} == {("not_updating", "4.weight")}


def test_a_parameter_that_comes_back_is_not_replaced() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept = model[4]
    with Watch(model, optimizer, activations_every=None) as watch:
        for step in range(4):
            model[4] = copy.deepcopy(kept) if step == 1 else kept
            model(torch.randn(4, 8)).square().mean().backward()
            watch.step()
            model.zero_grad()
        assert watch.session.coverage()["4.weight"].state == "measured"
        assert not any("replaced" in note for note in watch.session.notes)


@pytest.mark.parametrize("rules", ["default", "autoclip"])
def test_a_lazy_layer_is_on_record_as_soon_as_it_has_a_shape(rules: str) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda *given: None)  # a veto then rests on more than the gradients
    with Watch(model, optimizer, rules=rules, activations_every=1, on_error="raise") as watch:
        for _ in range(2):
            model(torch.randn(3, 5)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
        assert watch.history[0].index.shapes[0] == (4, 5)
        assert watch.history[1]["grad_norm", "0.weight"] > 0


def test_patterns_whose_layers_went_away_do_not_end_the_watching() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, paths="4.*", activations_every=1, on_error="raise") as watch:
        for step in range(3):
            if step == 1:
                del model[4]
            model(torch.randn(4, 8)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
        assert len(watch.history) == 3


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_layers_in_a_plain_container_are_named_as_not_seen(kind: type) -> None:
    class Hider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 1)
            self.hidden = {"a": nn.Linear(4, 4)} if kind is dict else kind([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            layers = self.hidden.values() if isinstance(self.hidden, dict) else self.hidden
            for layer in layers:
                x = layer(x)
            return self.head(x)  # type: ignore[no-any-return]

    model = Hider()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer) as watch:
        model(torch.randn(2, 4)).sum().backward()
        watch.step()
        name = "hidden.a" if kind is dict else "hidden.0"
        assert watch.session.coverage()[name].state == "unseen"
        assert any(note.startswith(f"{name}: it stands in a plain") for note in watch.session.notes)


@pytest.mark.parametrize(
    "everything", [{}, {"activations_every": 1, "updates_every": 1}], ids=["default", "everything"]
)
def test_a_layer_that_is_replaced_is_let_go_while_the_watch_runs_on(everything: dict[str, int]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, **everything) as watch:
        for step in range(24):
            if step == 20:
                old = weakref.ref(model[2].weight)
                model[2] = nn.Linear(16, 16)
                optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            watch.step()
        gc.collect()
        assert old() is None
