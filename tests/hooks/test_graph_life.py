"""An intervention lives as long as the graph of its run: checkpointing repeats it, and nothing of it stays."""

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.hooks import HookManager, noise, scale

from .conftest import num_torch_hooks

NESTINGS = [(False, False), (True, True), (True, False), (False, True)]


class Nested(nn.Module):
    """Two checkpoints, one in the other; `modes` is (outer, inner) `use_reentrant`, or None for none."""

    def __init__(self, modes):
        super().__init__()
        torch.manual_seed(0)
        self.modes = modes
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def inner(self, x):
        return torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.b(x))))))

    def outer(self, x):
        x = torch.tanh(self.a(x))
        return torch.tanh(self.d(self.run(1, self.inner, x)))

    def run(self, which, fn, x):
        return fn(x) if self.modes is None else checkpoint(fn, x, use_reentrant=self.modes[which])

    def forward(self, x):
        return self.run(0, self.outer, x)


SPECS = [
    ("b:output", lambda t, p: t * (3 + p.call)),
    ("c:input", lambda t, p: t + 0.5),
    ("c:grad_output", scale(2.0)),
    ("d:grad_input", lambda g, p: g * 1.5),
    ("b:output", noise(0.3)),
]


def run_with_hooks(model, hooks, x):
    return hooks.run_with_hooks(x, hooks=SPECS)


def temporary(model, hooks, x):
    with hooks.temporary(*SPECS):
        return model(x)


def without_its_manager(model, hooks, x):
    out = HookManager(model).run_with_hooks(x, hooks=SPECS)
    gc.collect()
    return out


def other_runs_between(model, hooks, x):
    out = hooks.run_with_hooks(x, hooks=SPECS)
    model(x)
    hooks.run_with_hooks(x, hooks=[("b:output", lambda t, p: t * 0)])
    return out


def one_loss_of_two_runs(model, hooks, x):
    return hooks.run_with_hooks(x, hooks=SPECS) - 2 * model(x)


def a_hook_added_since(model, hooks, x):
    out = hooks.run_with_hooks(x, hooks=SPECS)
    hooks.add("b:output", lambda t, p: t * 7)
    return out


def a_hook_removed_since(model, hooks, x):
    added = [hooks.add(*spec) for spec in SPECS[:2]]
    out = model(x)
    for hook in added:
        hook.remove()
    return out


def a_hook_that_keeps_what_it_sees(model, hooks, x):
    kept = []

    def keep(tensor, point):
        kept.append(tensor)
        return tensor * 3

    return hooks.run_with_hooks(x, hooks=[("b:output", keep)])


def a_manager_closed_since(model, hooks, x):
    with HookManager(model) as own:
        own.add("b:output", lambda t, p: t * 3)
        return model(x)


WAYS = [
    run_with_hooks,
    temporary,
    without_its_manager,
    other_runs_between,
    one_loss_of_two_runs,
    a_hook_added_since,
    a_hook_removed_since,
    a_hook_that_keeps_what_it_sees,
    a_manager_closed_since,
]


def gradients(modes, way):
    model = Nested(modes)
    hooks = HookManager(model)
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    way(model, hooks, x).sum().backward()
    left = num_torch_hooks(model) - (2 if way is a_hook_added_since else 0)
    return [x.grad, *(p.grad for p in model.parameters())], left


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("modes", NESTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_under_checkpointing_are_those_without_it(way, modes):
    wanted, _ = gradients(None, way)
    found, left = gradients(modes, way)
    # Of two runs with reentrant checkpoints torch adds the gradients up in another order.
    reordered = way is one_loss_of_two_runs and any(modes)
    same = torch.allclose if reordered else torch.equal
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    assert left == 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_repeated_forward_is_told_its_own_step_and_calls(use_reentrant):
    model = Nested((use_reentrant, use_reentrant))
    hooks = HookManager(model)
    seen = {}
    x = torch.randn(3, 4, requires_grad=True)

    def look(tensor, point):
        seen.setdefault(point.is_recompute, []).append((point.step, point.call))

    outs = [hooks.run_with_hooks(x, hooks=[("b:output", look)]) for _ in range(3)]
    model(x)
    outs[1].sum().backward()
    assert seen[False] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert set(seen[True]) == {(1, 0), (1, 1)}


class Layered(nn.Module):
    """The same two layers twice in a pass, each call in a checkpoint of its own (`mode` None: in none)."""

    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x):
        for layer in [*self.layers, *self.layers]:
            x = layer(x) if self.mode is None else checkpoint(layer, x, use_reentrant=self.mode)
        return x


LAYERED = {
    "by-call": [("layers.1.0", lambda t, p: t * (1 + p.call))],
    "input-and-output-by-call": [
        ("layers.0.2:input", lambda t, p: t * (1 + p.call)),
        ("layers.0.2:output", lambda t, p: t * (3 + p.call)),
    ],
    "noise": [("layers.*", noise(0.3))],
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("specs", LAYERED.values(), ids=LAYERED.keys())
@pytest.mark.parametrize("way", ["run", "stays"])
def test_each_of_several_checkpoints_repeats_its_own_calls(specs, use_reentrant, way):
    gradients = []
    for mode in (None, use_reentrant):
        model, x = Layered(mode), torch.ones(3, 4, requires_grad=True)
        hooks = HookManager(model)
        if way == "stays":
            for spec in specs:
                hooks.add(*spec)
        hooks.run_with_hooks(x, hooks=specs if way == "run" else []).sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_graph_that_is_let_go_of_takes_its_interventions_with_it():
    """A function that keeps its tensors would keep the graph that keeps the function."""
    program = """
    import gc, weakref, torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint
    from gradwatch.hooks import HookManager
    torch.set_num_threads(1)
    class Net(nn.Module):
        def __init__(self, use_reentrant):
            super().__init__()
            self.b, self.use_reentrant = nn.Linear(4, 4), use_reentrant
        def forward(self, x):
            return checkpoint(self.b, x, use_reentrant=self.use_reentrant)
    def left(use_reentrant, kept):
        model, x = Net(use_reentrant), torch.randn(3, 4, requires_grad=True)
        hooks, alive = HookManager(model), []
        def run():
            held = []
            def fn(tensor, point):
                if kept:
                    held.append(tensor)
                return tensor * 3
            out = hooks.run_with_hooks(x, hooks=[("b", fn), ("b:grad_output", lambda g, p: g)])
            alive.extend((weakref.ref(fn), weakref.ref(out)))
        for _ in range(5):
            run()
        hooks.run_with_hooks(x, hooks=[("b", lambda t, p: t)])
        gc.collect()
        return sum(ref() is not None for ref in alive) + len(hooks) + len(model.b._forward_hooks)
    print(*(left(reentrant, kept) for reentrant in (False, True) for kept in (False, True)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"] * 4


def test_a_hook_on_the_gradient_of_a_view_that_is_changed_later_acts_or_raises():
    class Half(nn.Module):
        def forward(self, x):
            return x[:, :2]

    torch.manual_seed(0)
    hooked = nn.Sequential(nn.Linear(4, 4), Half(), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    out = HookManager(hooked).run_with_hooks(x, hooks=[("1:grad_output", scale(0.0))])
    with pytest.raises(RuntimeError, match="a view that was changed in place after its module returned it"):
        out.sum().backward()
    plain = nn.Sequential(*hooked[:2])
    plain.zero_grad()
    HookManager(plain).run_with_hooks(x, hooks=[("1:grad_output", scale(0.0))]).sum().backward()
    assert not plain[0].weight.grad.any()


def test_what_a_patch_puts_in_is_not_changed_by_a_later_in_place_operation():
    from gradwatch.hooks import patch

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(torch.randn(3, 4), points="0")
    before = cache["0:output"].clone()
    with torch.no_grad():
        hooks.run_with_hooks(torch.randn(3, 4), hooks=[("0", patch(cache))])
    assert torch.equal(cache["0:output"], before)
