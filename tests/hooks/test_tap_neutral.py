"""A tap changes nothing: bit for bit, over every awkward model."""

import copy
import pickle

import pytest
import torch

from gradwatch.hooks import ModuleTap
from tests.zoo import Case, zoo

CASES = [pytest.param(case, id=case.id) for case in zoo()]


def snapshot(model):
    return {
        name: (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks), m._is_full_backward_hook,
               dict(m._forward_hooks_with_kwargs), dict(m._forward_pre_hooks_with_kwargs), sorted(m.__dict__))
        for name, m in model.named_modules()
    }  # fmt: skip


def run(case: Case, tap_with=None, steps: int = 3):
    """Return everything training leaves behind: outputs' losses, gradients, parameters, buffers, random state."""
    model, args, kwargs = case.make()
    params = [p for p in model.parameters() if p.requires_grad]
    tap = tap_with(model) if tap_with else None
    trace = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for _ in range(steps):
            if tap:
                tap.arm()
            loss = case.loss(model(*args, **kwargs))
            if case.has_grad:
                loss.backward()
            if tap:
                tap.disarm()
                tap.take()
            trace.append(loss.detach().clone())
            with torch.no_grad():
                for p in params:
                    if p.grad is not None:
                        trace.append(p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad.clone())
                        p.add_(p.grad, alpha=-1e-3)
                        p.grad = None
        trace.append(torch.get_rng_state())
    trace.extend(b.clone() for b in model.buffers())
    trace.extend(a.grad for a in args if isinstance(a, torch.Tensor) and a.grad is not None)
    return trace, model


def every_module(backend):
    return lambda model: ModuleTap(model, [n for n, _ in model.named_modules(remove_duplicate=False)], backend=backend)


def listening(model: torch.nn.Module) -> ModuleTap:
    return ModuleTap(model, [name for name, _ in model.named_modules() if name], on_output=lambda output: None)


def registers_again(tap: ModuleTap, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Arm a tap; return whether it went to torch for new handles."""
    asked = []
    register = torch.nn.Module.register_forward_hook
    monkeypatch.setattr(
        torch.nn.Module, "register_forward_hook", lambda m, *a, **k: asked.append(m) or register(m, *a, **k)
    )
    tap.arm()
    monkeypatch.undo()
    return bool(asked)


def test_hooks_are_made_once_and_hung_again_behind_those_that_came_meanwhile(monkeypatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    before, tap = snapshot(model), listening(model)
    assert registers_again(tap, monkeypatch)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        tap.disarm()
        assert snapshot(model) == before
        tap.take()
        theirs = model[0].register_forward_hook(lambda *_: None)
        assert not registers_again(tap, monkeypatch)
        assert next(iter(model[0]._forward_hooks)) == theirs.id
        model(torch.ones(1, 2)).sum().backward()
        found = tap.take()
        assert found is not None
        assert found.paths == ("0", "1")
        assert bool((found.sums != 0).any(dim=1).all())
        theirs.remove()
    tap.close()
    assert snapshot(model) == before


def test_a_module_whose_hooks_lie_elsewhere_gets_new_ones(monkeypatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    tap = listening(model)
    tap.arm()
    tap.disarm()
    old = model[1]._forward_hooks
    model[1]._forward_hooks = type(old)()
    assert registers_again(tap, monkeypatch)
    assert len(model[1]._forward_hooks) == len(model[0]._forward_hooks) == 1
    assert not old
    tap.disarm()
    assert not registers_again(tap, monkeypatch)
    tap.close()
    assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


@pytest.mark.filterwarnings("ignore:.*lazy.*:UserWarning", "ignore:enable_nested_tensor", "ignore:.*use_reentrant.*")
@pytest.mark.parametrize("case", CASES)
def test_training_with_a_tap_is_bitwise_equal_to_training_without(case: Case) -> None:
    bare, _ = run(case)
    tapped, _ = run(case, every_module("tensor"))
    assert len(bare) == len(tapped)
    for a, b in zip(bare, tapped, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["tensor", "full"])
@pytest.mark.parametrize("case", CASES)
def test_disarming_leaves_every_module_as_it_was(case: Case, backend: str) -> None:
    model, args, kwargs = case.make()
    before = snapshot(model)
    tap = every_module(backend)(model)
    for _ in range(3):
        tap.arm()
        loss = case.loss(model(*args, **kwargs))
        if case.has_grad:
            loss.backward()
        tap.disarm()
    assert snapshot(model) == before
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_full_hooks_go_only_where_they_neither_raise_nor_stay_silent(case: Case) -> None:
    bare, _ = run(case)
    full, _ = run(case, every_module("full"))
    for a, b in zip(bare, full, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_both_backends_measure_the_same(case: Case) -> None:
    measured = []
    for backend in ("tensor", "full"):
        model, args, kwargs = case.make()
        tap = every_module(backend)(model)
        for step in range(2):
            torch.manual_seed(step)
            tap.arm()
            loss = case.loss(model(*args, **kwargs))
            if case.has_grad:
                loss.backward()
            tap.disarm()
            stats = tap.take()
        assert not any("could not" in reason for reason in tap.coverage().values()), tap.coverage()
        measured.append(stats)
    assert (measured[0] is None) == (measured[1] is None)
    if measured[0] is not None:
        torch.testing.assert_close(measured[0].sums, measured[1].sums, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(measured[0].maxima, measured[1].maxima, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_copies_of_an_armed_model_are_silent(case: Case) -> None:
    model, args, kwargs = case.make()
    if case.id in {"weight-norm-old", "pruned"}:
        pytest.skip("holds a tensor that is no leaf: can't be copied, with or without hooks")
    tap = every_module("tensor")(model)
    tap.arm()
    twin = copy.deepcopy(model)
    case.loss(twin(*args, **kwargs))
    assert tap.take() is None


def test_armed_model_can_be_pickled_and_its_copy_is_silent() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    tap = every_module("full")(model)
    tap.arm()
    twin = pickle.loads(pickle.dumps(model))
    twin(torch.ones(1, 2)).sum().backward()
    assert tap.take() is None
