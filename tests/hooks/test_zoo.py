"""Every port over the zoo: nothing is changed by looking, and what is seen is what a plain reference sees."""

import warnings

import pytest
import torch

from gradwatch.hooks import HookManager
from gradwatch.torchside import tensors_of
from tests.zoo import zoo

CASES = [pytest.param(case, id=case.id) for case in zoo()]
NEUTRAL_PORTS = ("input", "output", "grad_output", "grad", "accumulated_grad")


def run(case, hook=lambda model: None):
    """Return outputs and gradients of one training step from a fixed seed, as a flat list of (name, tensor)."""
    model, args, kwargs = case.make()
    made = hook(model)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules of the zoo warn about themselves
        output = model(*args, **kwargs)
        if case.has_grad:
            case.loss(output).backward()
    found = [(f"output {leaf}", tensor.detach()) for leaf, tensor in tensors_of(output)]
    found += [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    found += [(name, b) for name, b in model.named_buffers()]
    return found, made, model


def assert_same(found, reference):
    assert [name for name, _ in found] == [name for name, _ in reference]
    for (name, tensor), (_, wanted) in zip(found, reference, strict=True):
        dense, wanted = (t.to_dense() if t.is_sparse else t for t in (tensor, wanted))
        assert torch.equal(dense.nan_to_num(), wanted.nan_to_num()), name


def observe_all(ports, seen):
    def hook(model):
        manager = HookManager(model, research_names=False)
        for port in ports:
            points = manager.points(f"*:{port}") if port.endswith("put") or _has_trainable(model) else []
            if points:
                manager.observe(points, lambda t, p: seen.append(p))
        return manager

    return hook


def hook_by_hand(model, outputs, grads):
    """What ours should see, with bare torch hooks."""

    def keep(table, key, tensor):
        if tensor is not None:  # a state that got no gradient: torch calls hooks with None
            table.setdefault(key, []).append(tensor.detach().clone())

    def hook_for(path):
        def hook(module, args, output):
            is_recompute = torch._C._current_graph_task_id() != -1
            for leaf, tensor in tensors_of(output):
                key = (path, leaf)
                if not is_recompute:
                    keep(outputs, key, tensor)
                if tensor.requires_grad and torch.is_grad_enabled() and not tensor.is_leaf:
                    tensor.register_hook(lambda g, key=key: keep(grads, key, g))

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(hook_for(path))


def _has_trainable(model):
    return any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_observers_at_all_ports_are_bitwise_neutral(case):
    seen = []
    found, manager, model = run(case, observe_all(NEUTRAL_PORTS, seen))
    reference, _, _ = run(case)
    assert_same(found, reference)
    assert seen
    manager.close()
    ours = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in ours if "gradwatch" in getattr(h, "__module__", "")]


@pytest.mark.parametrize("case", CASES)
def test_observed_outputs_and_their_gradients_equal_those_of_a_plain_reference(case):
    seen, grads = {}, {}

    def ours(model):
        manager = HookManager(model, research_names=False)
        manager.observe("*:output", lambda t, p: seen.setdefault((p.path, p.leaf), []).append(t.detach().clone()))
        manager.observe("*:grad_output", lambda t, p: grads.setdefault((p.path, p.leaf), []).append(t.detach().clone()))
        return manager

    plain, plain_grads = {}, {}
    run(case, ours)
    run(case, lambda model: hook_by_hand(model, plain, plain_grads))
    assert seen.keys() == plain.keys()
    for key, tensors in seen.items():
        assert len(tensors) == len(plain[key])
        assert_same([(str(key), t) for t in tensors], [(str(key), t) for t in plain[key]])
    for key, tensors in plain_grads.items():
        assert_same([(str(key), t) for t in grads[key]], [(str(key), t) for t in tensors])


@pytest.mark.parametrize("case", CASES)
def test_doubling_and_halving_at_every_forward_port_gives_the_reference_back(case):
    """Interventions at each output by exact powers of two undo each other; identity replacements change nothing."""

    def hook(model):
        manager = HookManager(model, research_names=False)
        manager.add("*:output", lambda t, p: t * 2 if t.is_floating_point() else None)
        manager.add("*:output", lambda t, p: t / 2 if t.is_floating_point() else None)
        manager.add("*:input", lambda t, p: t.clone())
        return manager

    found, _, _ = run(case, hook)
    reference, _, _ = run(case)
    assert [n for n, _ in found] == [n for n, _ in reference]
    for (name, tensor), (_, wanted) in zip(found, reference, strict=True):
        dense, wanted = (t.to_dense() if t.is_sparse else t for t in (tensor, wanted))
        torch.testing.assert_close(dense, wanted, equal_nan=True, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_scaling_every_gradient_at_grad_by_a_power_of_two_scales_each(case):
    def hook(model):
        if not _has_trainable(model):
            return None
        manager = HookManager(model, research_names=False)
        manager.add("*:grad", lambda g, p: g * 2)
        return manager

    found, _, _ = run(case, hook)
    reference, _, model = run(case)
    names = {name for name, _ in model.named_parameters()}
    for (name, tensor), (_, wanted) in zip(found, reference, strict=True):
        dense, wanted = (t.to_dense() if t.is_sparse else t for t in (tensor, wanted))
        assert torch.equal(dense.nan_to_num(), (wanted * 2 if name in names else wanted).nan_to_num()), name


SAFE_FOR_FULL_HOOKS = [p for p in CASES if "in-place" not in p.id]


@pytest.mark.parametrize("case", SAFE_FOR_FULL_HOOKS)
def test_grad_input_sees_what_torchs_full_backward_hook_sees(case):
    """At grad_input sit torch's full hooks with dangers: in-place operations raise, attention changes bits."""

    def full(table):
        def hook(model):
            for path, module in model.named_modules():
                module.register_full_backward_hook(
                    lambda m, gi, go, path=path: table.setdefault(path, []).extend(g for g in gi if g is not None)
                )

        return hook

    ours, theirs = {}, {}

    def mine(model):
        manager = HookManager(model, research_names=False)
        manager.add("*:grad_input", lambda t, p: ours.setdefault(p.path, []).append(t))
        return manager

    try:
        run(case, full(theirs))
    except RuntimeError as refused:
        with pytest.raises(RuntimeError, match=str(refused)[:30].replace("(", r"\(")):
            run(case, mine)
        return
    run(case, mine)
    assert {k for k, v in theirs.items() if v} == set(ours)
    for path, grads in ours.items():
        assert_same([(path, g) for g in grads], [(path, g) for g in theirs[path]])


def test_zoo_is_large():
    assert len(CASES) >= 40
