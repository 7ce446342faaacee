"""A hook's life: added, ordered, switched, removed; contexts, threads, copies, leaks."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gradwatch.errors import ConfigError, GradwatchError, UnknownNameError
from gradwatch.hooks import HookManager, Observer

from .conftest import Net, num_torch_hooks


def test_a_hook_fires_once_per_call_with_its_point(net, x):
    seen = []
    hook = HookManager(net).add("head:output", lambda t, p: seen.append((p, t.shape)))
    net(x)
    net(x)
    assert [repr(p) for p, _ in seen] == [
        "Point('head:output', call=0, step=0)",
        "Point('head:output', call=0, step=1)",
    ]
    assert hook.calls == 2
    assert hook.id == "hook-1"
    assert seen[0][0].module is net.head
    assert seen[0][0].hook is hook


def test_disable_enable_remove(net, x):
    seen = []
    hooks = HookManager(net)
    hook = hooks.add("head", lambda t, p: seen.append(1))
    hook.disable()
    assert not hook.is_enabled
    assert num_torch_hooks(net) == 0  # a disabled hook costs nothing
    net(x)
    hook.enable()
    net(x)
    hook.remove()
    hook.remove()
    net(x)
    assert seen == [1]
    assert hook.is_removed
    assert len(hooks) == 0
    assert num_torch_hooks(net) == 0


def test_priority_then_prepend_then_order_of_adding(net, x):
    order = []
    hooks = HookManager(net)
    for name, options in [("a", {}), ("b", {}), ("first", {"prepend": True}), ("top", {"priority": 5})]:
        hooks.add("head", lambda t, p, name=name: order.append(name), **options)
    net(x)
    assert order == ["top", "first", "a", "b"]


def test_later_hooks_see_what_earlier_ones_leave(net, x):
    hooks = HookManager(net)
    hooks.add("head", lambda t, p: torch.ones_like(t))
    hooks.add("head", lambda t, p: t + 1)
    assert torch.equal(net(x), torch.full((2, 5, 3), 2.0))


def test_every_when_once(net, x):
    counts = {"every": 0, "when": 0, "once": 0}

    def count(name):
        def fn(t, p):
            counts[name] += 1

        return fn

    hooks = HookManager(net)
    hooks.add("head", count("every"), every=3)
    hooks.add("blocks.?", count("when"), when=lambda p: p.layer == 2 and p.step > 0)
    once = hooks.add("blocks.?", count("once"), once=True)
    for _ in range(4):
        net(x)
    assert counts == {"every": 2, "when": 3, "once": 6}
    assert once.is_removed


def test_step_can_be_set_by_who_counts_otherwise(net, x):
    hooks = HookManager(net)
    steps = []
    hooks.add("head", lambda t, p: steps.append(p.step))
    net(x)
    hooks.step = 100
    net(x)
    net(x)
    assert steps == [0, 100, 100]


def test_calls_of_a_module_that_runs_twice_are_numbered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            return self.cell(self.cell(x).relu_())

    model = Twice()
    calls, back = [], []
    hooks = HookManager(model)
    hooks.add("cell:output", lambda t, p: calls.append(p.call))
    hooks.add("cell:grad_output", lambda t, p: back.append(p.call))
    for _ in range(2):
        model(torch.randn(2, 3)).sum().backward()
    assert calls == [0, 1, 0, 1]
    assert back == [1, 0, 1, 0]


def test_points_may_be_kept(net, x):
    kept = []
    HookManager(net).add("blocks.0", lambda t, p: kept.append(p))
    for _ in range(3):
        net(x)
    assert [p.step for p in kept] == [0, 1, 2]


def test_ids_are_unique_and_hooks_are_found_by_them(net):
    hooks = HookManager(net)
    hook = hooks.add("head", print, id="mine")
    assert hooks["mine"] is hook
    assert "mine" in hooks
    with pytest.raises(ConfigError, match="there is a hook 'mine' already, at head:output"):
        hooks.add("head", print, id="mine")
    with pytest.raises(UnknownNameError, match=r"there is no hook 'mien'. Did you mean 'mine'"):
        hooks["mien"]
    hooks.remove("mine")
    assert len(hooks) == 0


def test_remove_all_spares_permanent_hooks_and_close_does_not(net):
    hooks = HookManager(net)
    hooks.add("head", print)
    kept = hooks.add("head", print, permanent=True)
    assert hooks.remove_all() == 1
    assert hooks.hooks == [kept]
    assert hooks.remove_all(including_permanent=True) == 1
    hooks.add("head", print, permanent=True)
    hooks.close()
    assert num_torch_hooks(net) == 0
    with pytest.raises(ConfigError, match="closed"):
        hooks.add("head", print)


def test_others_hooks_are_never_touched(net, x):
    """H21: weight norm, pruning and users' own hooks are torch hooks too."""
    old = []
    net.head.register_forward_hook(lambda m, a, o: old.append(1))
    nn.utils.spectral_norm(net.embed)
    before = num_torch_hooks(net)
    first, second = HookManager(net), HookManager(net)
    first.add("*:output", lambda t, p: None)
    second.add("*:output", lambda t, p: None)
    first.close()
    assert len(second) == 1
    net(x)
    second.close()
    net(x)
    assert num_torch_hooks(net) == before
    assert len(old) == 2


def test_registration_is_all_or_nothing(net, monkeypatch):
    hooks = HookManager(net)

    def refuse(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(net.blocks[3], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no"):
        hooks.add("blocks.?", print)
    assert num_torch_hooks(net) == 0
    assert len(hooks) == 0


def test_temporary_contexts_nest_and_restore_what_they_found(net, x):
    hooks = HookManager(net)
    seen = []
    hooks.add("head", lambda t, p: seen.append("mine"))
    before = num_torch_hooks(net)
    with hooks.temporary(("head", lambda t, p: seen.append("outer"))):
        with pytest.raises(ZeroDivisionError), hooks.temporary(("head", lambda t, p: seen.append("inner"))):
            raise ZeroDivisionError(net(x))
        net(x)
    net(x)
    assert seen == ["mine", "outer", "inner", "mine", "outer", "mine"]
    assert num_torch_hooks(net) == before


def test_a_temporary_context_that_cannot_be_opened_leaves_nothing(net):
    hooks = HookManager(net)
    with pytest.raises(GradwatchError), hooks.temporary(("head", print), ("nowhere", print)):
        pass
    assert num_torch_hooks(net) == 0


def test_disabled_context_restores_each_as_it_was(net, x):
    hooks = HookManager(net)
    on, off = [hooks.add("head", lambda t, p: t * 0) for _ in range(2)]
    off.disable()
    with hooks.disabled():
        assert net(x).any()
    assert not net(x).any()
    assert [on.is_enabled, off.is_enabled] == [True, False]
    with on.disabled():
        assert net(x).any()
    assert on.is_enabled


def test_a_hook_removed_after_forward_does_not_fire_in_backward(net, x):
    """H9: torch's own tensor hooks and full hooks live on in the graph."""
    hooks = HookManager(net)
    seen = []
    hook = hooks.add("blocks.?:grad_output", lambda t, p: seen.append(1))
    loss = net(x).sum()
    hook.remove()
    loss.backward()
    other = hooks.add("blocks.?:grad_output", lambda t, p: seen.append(1))
    loss = net(x).sum()
    other.disable()
    loss.backward()
    hooks.add("blocks.?:grad_output", lambda t, p: seen.append(1))
    loss = net(x).sum()
    hooks.close()
    loss.backward()
    assert seen == []


def test_two_threads_in_temporary_contexts_see_their_own_hooks_only(net, x):
    hooks = HookManager(net)
    wanted = {name: net(x) * 0 + value for name, value in (("a", 1.0), ("b", 2.0))}
    wrong, gate = [], threading.Barrier(2)

    def work(name, value):
        gate.wait()
        for _ in range(30):
            with hooks.temporary(("head", lambda t, p: torch.full_like(t, value))):
                if not torch.equal(net(x), wanted[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=pair) for pair in (("a", 1.0), ("b", 2.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert num_torch_hooks(net) == 0


def test_threads_number_their_calls_apart(net, x):
    hooks = HookManager(net)
    seen, gate = [], threading.Barrier(3)
    hooks.add("blocks.0", lambda t, p: seen.append(p.call))

    def work():
        gate.wait()
        for _ in range(20):
            net(x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0] * 60


class Counting(Observer):
    def __init__(self):
        super().__init__(author="me")
        self.count = 0
        self.lock = threading.Lock()  # what makes deepcopy of closures and bound methods fail

    def observe(self, tensor, point):
        self.count += 1

    def reset(self):
        self.count = 0


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        pytest.param(AveragedModel, id="ema"),
        pytest.param(lambda model: save_and_load(model), id="torch.save"),
    ],
)
def test_copies_of_a_hooked_model_are_silent_and_the_original_goes_on(net, x, copied):
    seen = Counting()
    hooks = HookManager(net)
    for port in ("input", "output", "grad_output", "grad_input"):
        hooks.add(f"head:{port}", seen)
    hooks.add("head.weight:grad", seen)
    hooks.add("head.bias:accumulated_grad", seen)
    hooks.add("blocks.0:output", seen)
    profile = hooks.profile()
    other = copied(net)
    other(x).sum().backward()
    assert seen.count == 0
    profile.stop()
    net(x).sum().backward()
    assert seen.count == 7


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_attaching_and_detaching_a_thousand_times_leaves_no_object_behind(x):
    net = Net(1)

    def cycle():
        with HookManager(net) as hooks:
            hooks.add("*:output", lambda t, p: None)
            hooks.add("head:grad_output", lambda t, p: None)
            hooks.add("head.weight:grad", lambda t, p: None)

    for _ in range(5):
        cycle()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        cycle()
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert num_torch_hooks(net) == 0


def test_one_manager_attaching_a_thousand_times_leaves_no_object_behind(x):
    net = Net(1)
    hooks = HookManager(net)

    def cycle():
        with hooks.temporary(("*:output", lambda t, p: None)):
            net(x)
        hooks.run_with_hooks(x, hooks=[("head:grad_output", lambda t, p: None)])

    for _ in range(5):
        cycle()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        cycle()
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_a_closure_that_holds_its_output_does_not_keep_the_graph(net, x):
    """H15: an output tensor hook whose closure holds the output keeps every graph alive; ours holds the call only."""
    hooks = HookManager(net)
    graphs = []

    def hold(tensor, point):
        hold.latest = tensor  # the user's own reference, replaced at each call

    hooks.add("head:output", hold)
    hooks.observe("head:grad_output", lambda t, p: hold.latest.sum())
    for _ in range(10):
        output = net(x)
        graphs.append(weakref.ref(output))
        output.sum().backward()
        del output
    hold.latest = None
    gc.collect()
    assert [ref() for ref in graphs] == [None] * 10


def test_context_store_metadata_and_reset(net, x):
    hooks = HookManager(net)
    seen = Counting()
    hook = hooks.add("head", seen)
    other = hooks.observe("embed", lambda t, p: p.hook.context.store.setdefault("n", 41))
    net(x)
    assert hook.context.manager is hooks
    assert hook.context.model is net
    assert hook.context.hooks == (hook, other)
    assert seen.context is hook.context
    assert hooks.store == {"n": 41}
    assert hook.metadata == {"author": "me"}
    hook.reset()
    assert (seen.count, hook.calls) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"every": 0}, "`every` is a whole number", id="every"),
        pytest.param({"on_error": "ignore"}, "`on_error` is one of 'raise', 'disable', 'close'", id="on-error"),
        pytest.param({"priority": float("nan")}, "`priority` is a finite number", id="nan-priority"),
        pytest.param({"when": 3}, "`when` is a function", id="when"),
    ],
)
def test_options_that_cannot_be_are_errors(net, options, message):
    with pytest.raises(ConfigError, match=message):
        HookManager(net).add("head", print, **options)


def test_a_frozen_parameter_cannot_be_hooked_and_says_so(net):
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'head.weight' does not require a gradient"):
        HookManager(net).add("head.*:grad", print)


def test_full_hooks_are_forgotten_when_removed(net):
    """H8: torch itself would refuse the other kind of backward hook for ever."""
    HookManager(net).add("head:grad_input", print).remove()
    assert net.head._is_full_backward_hook is None
