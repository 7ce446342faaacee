"""A place that is hooked again and again: each hook is as on a place that nobody hooked before."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from gradwatch.hooks import HookManager, Observer

PORTS = ["output", "grad_output"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def run(model):
    model(torch.ones(2, 4)).sum().backward()


class Seen:
    def __init__(self):
        self.calls = []

    def __call__(self, tensor, point):
        self.calls.append((point.name, point.call, point.hook.id))


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("first", [Seen, lambda: Observer(Seen())], ids=["function", "observer"])
@pytest.mark.parametrize("second", [Seen, lambda: Observer(Seen())], ids=["function", "observer"])
def test_a_place_hooked_again_counts_and_calls_for_its_own_hook_alone(port, first, second):
    model = net()
    hooks = HookManager(model)
    one, two = first(), second()
    old = hooks.add(f"1:{port}", one)
    run(model)
    run(model)
    old.remove()
    new = hooks.add(f"1:{port}", two)
    run(model)
    assert (old.calls, new.calls) == (2, 1)
    told = [getattr(fn, "fn", fn).calls for fn in (one, two)]
    assert told == [[(f"1:{port}", 0, old.id)] * 2, [(f"1:{port}", 0, new.id)]]


@pytest.mark.parametrize("port", PORTS)
def test_a_place_hooked_again_counts_calls_within_a_pass_from_the_start(port):
    layer = nn.Linear(4, 4)
    hooks = HookManager(nn.Sequential(layer, nn.Sequential(layer, layer)))
    for _ in range(3):  # parts run alone: no pass of the whole model begins in between
        seen = Seen()
        with hooks.temporary((f"0:{port}", seen)):
            x = layer(torch.ones(2, 4))
            layer(x).sum().backward()
        assert sorted(call for _, call, _ in seen.calls) == [0, 1]


@pytest.mark.parametrize("port", PORTS)
def test_what_a_hook_held_is_free_when_its_run_is_over(port):
    model = net()
    hooks = HookManager(model)
    seen = Seen()
    gone = weakref.ref(seen)
    output = hooks.run_with_hooks(torch.ones(2, 4), hooks=[(f"re:\\d+:{port}", seen)])
    output.sum().backward()
    assert len(seen.calls) == 3
    del seen, output
    assert gone() is None


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("ends", ["dropped", "closed", "left"])
def test_a_model_is_free_at_once_when_its_manager_is(port, ends):
    gc.collect()
    gc.disable()
    try:
        model = net()
        gone = weakref.ref(model)
        hooks = HookManager(model)
        for _ in range(2):
            hooks.run_with_hooks(torch.ones(2, 4), hooks=[(f"re:\\d+:{port}", Seen())]).sum().backward()
        if ends == "closed":
            hooks.close()
        elif ends == "left":
            with hooks:
                hooks.add(f"1:{port}", Seen())
        del model, hooks
        assert gone() is None
    finally:
        gc.enable()


def test_a_module_that_was_hooked_and_replaced_is_free_when_names_are_asked_for_again():
    model = net()
    hooks = HookManager(model)
    hooks.run_with_hooks(torch.ones(2, 4), hooks=[("0:output", Seen())])
    gone = weakref.ref(model[0])
    model[0] = nn.Linear(4, 4)
    seen = Seen()
    hooks.run_with_hooks(torch.ones(2, 4), hooks=[("0:output", seen)])
    gc.collect()
    assert gone() is None
    assert len(seen.calls) == 1


def test_a_hook_taken_off_in_the_midst_of_a_call_of_its_module_stays_silent():
    model = net()
    hooks = HookManager(model)
    late = Seen()
    removed = []
    model[1].register_forward_hook(lambda *_: removed.append(ours.remove()))
    ours = hooks.add("1:output", late)
    model(torch.ones(2, 4))
    assert removed == [None]
    assert late.calls == []
    assert ours.calls == 0


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("fn", [Seen, lambda: Observer(Seen())], ids=["function", "observer"])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_the_hook_itself_is_nothing_on_a_copy_of_any_kind(port, fn, copied):
    model = net()
    seen = fn()
    HookManager(model).add(f"1:{port}", seen)
    (hook,) = model[1]._forward_hooks.values()
    (twin,) = copied([hook]) if copied is not copy.copy else [copy.copy(hook.__self__).__call__]
    output = torch.ones(2, 4, requires_grad=True) * 2
    assert twin(model[1], (output,), output) is None
    output.sum().backward()
    assert getattr(seen, "fn", seen).calls == []


@pytest.mark.parametrize("others", [(), ("1:input", "1:output")], ids=["alone", "among-others"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("port", ["input", "output", "grad_output", "grad_input"])
def test_hooks_taken_off_by_a_hook_of_the_same_module_are_silent_and_harmless(port, first, others):
    model = net()
    hooks = HookManager(model)
    seen = Seen()
    ours = [hooks.add(name, seen) for name in (f"1:{port}", *others)]

    def off(*_):
        for hook in ours:
            hook.remove()

    model[1].register_forward_pre_hook(off, prepend=first)
    model[1].register_forward_hook(off, prepend=first)
    run(model)
    # What came before it in the walk was told; nothing after it.
    assert [name for name, *_ in seen.calls] == ([] if first else [name for name, *_ in seen.calls if "input" in name])
    before = len(seen.calls)
    run(model)
    assert len(seen.calls) == before
