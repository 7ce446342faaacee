"""mi-crow: base class, ids, layers by name or index, life cycle, errors, detectors and controllers."""

import pickle
import tempfile
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from gradwatch.errors import ConfigError, HookError
from gradwatch.hooks import ActivationStore, HookManager, Intervention, Observer

from ._base import bert, cnn, encoder, feature, gpt2, ids, image, llama, mlp, net, raises, row, words, x

SOURCE = "mi-crow"


@feature(SOURCE, "auto id / custom id / duplicate refused / lookup")
def _():
    hooks = HookManager(mlp())
    auto, own = hooks.observe("fc1", print), hooks.observe("fc2", print, id="mine")
    assert auto.id
    assert hooks["mine"] is own
    assert "Ids are unique" in str(raises(ConfigError, hooks.observe, "fc1", print, id="mine"))


@feature(SOURCE, "one id survives remove -> reuse id; auto ids unique across managers?")
def _():
    hooks = HookManager(mlp())
    hooks.observe("fc1", print, id="mine").remove()
    assert hooks.observe("fc1", print, id="mine").id == "mine"
    one, two = HookManager(mlp()), HookManager(mlp())
    assert {one.observe("fc1", print).id, two.observe("fc1", print).id} <= {"hook-1"}  # unique in each manager


@feature(SOURCE, "layer association: hook.points")
def _():
    assert HookManager(mlp()).observe("fc*", print).points == ("fc1:output", "fc2:output")


@feature(SOURCE, "hook type: which port(s)")
def _():
    hook = HookManager(mlp()).observe(["fc1:input", "fc1:output"], print)
    assert [p.port for p in hook.points] == ["input", "output"]


@feature(SOURCE, "PRE_FORWARD modifies input")
def _():
    m = mlp()
    assert torch.equal(HookManager(m).run_with_hooks(row(), hooks=[(":input", lambda t, p: t * 2)]), m(row() * 2))


@feature(SOURCE, "PRE_FORWARD at block without leaf= (GPT2 input is many tensors)")
def _():
    seen = []
    HookManager(m := gpt2()).observe("transformer.h.0:input", lambda t, p: seen.append(p.leaf))
    m(ids())
    assert "0" in seen


@feature(SOURCE, "FORWARD modifies output, dict/ModelOutput/tuple")
def _():
    m = gpt2()
    found = HookManager(m).run_with_hooks(
        ids(), hooks=[(":output", lambda t, p: t * 0 if p.leaf == "logits" else None)]
    )
    assert not found.logits.any()


@feature(SOURCE, "creation before registration (inactive object)")
def _():
    class Count(Observer):
        n = 0

        def observe(self, tensor, point):
            self.n += 1

    count, m = Count(), mlp()
    m(row())
    HookManager(m).add("fc1", count)
    m(row())
    assert count.n == 1


@feature(SOURCE, "enable/disable from hook object; A/B")
def _():
    m = mlp()
    hook, plain = HookManager(m).add("fc1", lambda t, p: t * 0), None
    changed = m(row())
    with hook.disabled():
        plain = m(row())
    assert not torch.equal(changed, plain)
    assert torch.equal(m(row()), changed)


@feature(SOURCE, "enable/disable by id on manager (all, one)")
def _():
    hooks = HookManager(mlp())
    a, b = hooks.observe("fc1", print, id="a"), hooks.observe("fc2", print, id="b")
    hooks.disable("a")
    assert (a.is_enabled, b.is_enabled) == (False, True)
    hooks.disable()
    assert not b.is_enabled
    hooks.enable()
    assert a.is_enabled


@feature(SOURCE, "unknown id: enable/remove -> clear error")
def _():
    hooks = HookManager(mlp())
    hooks.observe("fc1", print, id="abc")
    assert "Did you mean 'abc'?" in str(raises(LookupError, hooks.enable, "abd"))
    assert "Did you mean 'abc'?" in str(raises(LookupError, hooks.remove, "abd"))


@feature(SOURCE, "layer by index (int); list layers")
def _():
    hooks = HookManager(net())
    assert hooks.layers == [f"blocks.{i}" for i in range(6)]
    assert hooks.observe(4, print).points == ("blocks.4:output",)


@feature(SOURCE, "layer by index on CNN Sequential / enc / bert / llama")
def _():
    for model, first in (
        (cnn(), "0"),
        (encoder(), "layers.0"),
        (bert(), "encoder.layer.0"),
        (llama(), "model.layers.0"),
    ):
        assert HookManager(model).layers[0] == first


@feature(SOURCE, "layer by index: a plain 2-layer Net (no stack) & ResNet-like w/ several stacks")
def _():
    assert "Name one: HookManager(model, layers=" in str(raises(ConfigError, HookManager(mlp()).observe, 0, print))
    several = nn.ModuleDict({s: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for s in ("stage1", "stage2")})
    assert "stage1" in str(raises(ConfigError, HookManager(several).observe, 0, print))
    assert HookManager(several, layers="stage2").layers == ["stage2.0", "stage2.1"]


@feature(SOURCE, "hook context: model, manager, store, other hooks")
def _():
    hooks = HookManager(m := mlp())
    hook = hooks.observe("fc1", lambda t, p: p.hook.context.store.setdefault("seen", 1))
    m(row())
    context = hook.context
    assert (context.model, context.manager, context.store, context.hooks) == (m, hooks, {"seen": 1}, (hook,))


@feature(SOURCE, "same Observer on two managers: context is last one's")
def _():
    look = Observer(lambda t, p: None)
    HookManager(mlp()).add("fc1", look)
    last = HookManager(mlp())
    last.add("fc1", look)
    assert look.context.manager is last


@feature(SOURCE, "HookError: id, original error, cause")
def _():
    m = mlp()
    HookManager(m).add("fc1", lambda t, p: 1 / 0, id="bad")
    error = raises(HookError, m, row())
    assert error.hook_id == "bad"
    assert isinstance(error.__cause__, ZeroDivisionError)


@feature(SOURCE, "HookError isn't caught by model's own try/except -> state after")
def _():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.fc(x)
            except ValueError:
                return x

    m = Catches()
    HookManager(m).add("fc", lambda t, p: 1 / 0)
    raises(HookError, m, row())


@feature(SOURCE, "graceful degradation on_error=disable, 1 warning, run goes on")
def _():
    m = mlp()
    wanted = m(row())
    hook = HookManager(m).add("fc1", lambda t, p: 1 / 0, on_error="disable")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(m(row()), wanted)
        m(row())
    assert len(said) == 1
    assert not hook.is_enabled


@feature(SOURCE, "graceful: keep calling after an error (log, don't disable)")
def _():
    m, calls = mlp(), []
    wanted = m(row())

    def fails(tensor, point):
        calls.append(1)
        raise ValueError

    HookManager(m).add("fc1", fails, on_error="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(m(row()), wanted)
        m(row())
    assert len(calls) == 2


@feature(SOURCE, "HookError pickles (multi-process)")
def _():
    m = mlp()
    HookManager(m).add("fc1", lambda t, p: 1 / 0, id="bad")
    error = pickle.loads(pickle.dumps(raises(HookError, m, row())))
    assert (error.hook_id, error.point, error.phase) == ("bad", "fc1:output", "forward")
    assert "ZeroDivisionError" in str(error)


@feature(SOURCE, "detector + store: activations persisted by layer")
def _():
    folder, m = tempfile.mkdtemp(), mlp()
    with HookManager(m).capture("fc*", store=folder):
        m(row())
    assert ActivationStore(folder).names == ["fc1:output", "fc2:output"]


@feature(SOURCE, "try/finally cleanup -> context manager 'with hooks.observe()'")
def _():
    m = mlp()
    with HookManager(m).observe("fc1", lambda t, p: None) as hook:
        m(row())
    assert hook.is_removed
    assert hook.calls == 1
    assert not m.fc1._forward_hooks


@feature(SOURCE, "Capture as with-block")
def _():
    m = mlp()
    with HookManager(m).capture("fc1") as captured:
        m(row())
    m(row())
    assert len(captured) == 1


@feature(SOURCE, "conditional hook: when=")
def _():
    m = mlp()
    hook = HookManager(m).observe("fc*", lambda t, p: None, when=lambda p: p.path == "fc2")
    m(row())
    assert [e.fired for e in hook.entries] == [0, 1]


@feature(SOURCE, "composition: detector + controller + 2 detectors same layer, order")
def _():
    m, seen = mlp(), []
    hooks = HookManager(m)
    hooks.observe("fc1", lambda t, p: seen.append(t.clone()))
    hooks.add("fc1", Intervention(lambda t, p: t * 2))
    hooks.observe("fc1", lambda t, p: seen.append(t.clone()))
    m(row())
    assert torch.equal(seen[1], 2 * seen[0])


@feature(SOURCE, "metadata on hook; hook.metadata")
def _():
    assert HookManager(mlp()).add("fc1", Observer(print, author="me")).metadata == {"author": "me"}


@feature(SOURCE, "list hooks by layer / by type")
def _():
    hooks = HookManager(mlp())
    look, change = hooks.observe("fc1", print), hooks.add("fc2", Intervention(print))
    assert hooks.hooks_at("fc1") == [look]
    assert hooks.hooks_at(kind=Intervention) == [change]


@feature(SOURCE, "controller keeps gradient flow (mi-crow's bug)")
def _():
    m = mlp()
    HookManager(m).run_with_hooks(row(), hooks=[("fc1", lambda t, p: t * 2)]).sum().backward()
    assert m.fc1.weight.grad.any()


@feature(SOURCE, "hook.set_options after registering (change every/priority)")
def _():
    m = mlp()
    hook = HookManager(m).observe("fc1", lambda t, p: None)
    hook.set_options(every=2)
    for _ in range(4):
        m(row())
    assert hook.calls == 2


@feature(SOURCE, "hook observer returning value is dropped; add() returning int is error")
def _():
    m = mlp()
    wanted = m(row())
    hooks = HookManager(m)
    hooks.observe("fc1", lambda t, p: t * 0)
    assert torch.equal(m(row()), wanted)
    hooks.add("fc1", lambda t, p: 3)
    assert "returns None or a tensor" in str(raises(HookError, m, row()))


@dataclass
class Out:
    logits: torch.Tensor


_ = (image, words, x)
