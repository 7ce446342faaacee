"""What torch's own tests ask of hooks, in gradwatch's terms."""

import weakref

import torch
from torch import nn

from gradwatch.errors import HookError
from gradwatch.hooks import HookManager

from ._base import behaviour, grads, mlp, raises, row

PEER = "torch"


def order_at(port, run):
    order, m = [], mlp()
    theirs = {
        "output": lambda: m.fc2.register_forward_hook(lambda *a: order.append("theirs")),
        "input": lambda: m.fc2.register_forward_pre_hook(lambda *a: order.append("theirs")),
        "grad_input": lambda: m.fc2.register_full_backward_hook(lambda *a: order.append("theirs")),
    }
    if port in theirs:
        theirs[port]()
    hooks = HookManager(m)
    hooks.add(f"fc2:{port}", lambda t, p: order.append("second"))
    hooks.add(f"fc2:{port}", lambda t, p: order.append("first"), prepend=True)
    run(m)
    return order


@behaviour(PEER, "fwd order with prepend")
def _():
    assert order_at("output", lambda m: m(row())) == ["first", "theirs", "second"]


@behaviour(PEER, "fwd-pre order with prepend")
def _():
    assert order_at("input", lambda m: m(row())) == ["first", "theirs", "second"]


@behaviour(PEER, "bwd order with prepend (grad_input)")
def _():
    assert order_at("grad_input", lambda m: m(row()).sum().backward()) == ["first", "theirs", "second"]


@behaviour(PEER, "bwd-pre order with prepend (grad_output)")
def _():
    assert order_at("grad_output", lambda m: m(row()).sum().backward()) == ["first", "second"]


@behaviour(PEER, "bwd-pre zero propagates to the input's grad")
def _():
    given, m = row().requires_grad_(), mlp()
    HookManager(m).add("fc2:grad_output", lambda g, p: g * 0)
    m(given).sum().backward()
    assert not given.grad.any()


def ports_in_order(given):
    m, order = mlp(), []
    hooks = HookManager(m)
    for port in ("input", "output", "grad_output"):
        hooks.observe(f":{port}", lambda t, p: order.append(p.port))
    hooks.add(":grad_input", lambda raw, p: order.append(p.port), raw=True)
    m(given).sum().backward()
    return order


@behaviour(PEER, "mixed on root: order pre,fwd,bwd-pre,bwd")
def _():
    assert ports_in_order(row().requires_grad_()) == ["input", "output", "grad_output", "grad_input"]


@behaviour(PEER, "mixed on root, input w/o grad: grad_input hook still fires (torch does w/ None)")
def _():
    assert sorted(ports_in_order(row())) == ["grad_input", "grad_output", "input", "output"]


class Adds(nn.Module):
    def forward(self, x, bias=None):
        return x + bias


@behaviour(PEER, "kwargs pre-hook doubles bias")
def _():
    m = Adds()
    HookManager(m).add(":input", lambda t, p: t * 2, leaf="bias")
    assert torch.equal(m(row(), bias=torch.ones(4)), row() + 2)


@behaviour(PEER, "kwargs pre + fwd hook with kwargs (raw sees modified kwargs)")
def _():
    m, seen = Adds(), []
    hooks = HookManager(m)
    hooks.add(":input", lambda t, p: t * 2, leaf="bias")
    hooks.add(":output", lambda raw, p: seen.append(raw.kwargs["bias"][0].item()), raw=True)
    m(row(), bias=torch.ones(4))
    assert seen == [2.0]


@behaviour(PEER, "dict in/out: bwd hooks fire where torch's don't")
def _():
    class Dicts(nn.Module):
        def forward(self, tree):
            return {"y": tree["x"] * 2}

    m, seen = Dicts(), []
    HookManager(m).observe(":grad_output", lambda g, p: seen.append(p.leaf))
    m({"x": row().requires_grad_()})["y"].sum().backward()
    assert seen == ["y"]


@behaviour(PEER, "removing hooks inside forward (self-removing)")
def _():
    m = mlp()
    hook = HookManager(m).add("fc1", lambda t, p: p.hook.remove())
    m(row())
    m(row())
    assert hook.calls == 1


@behaviour(PEER, "global + local order: torch global hooks first")
def _():
    m, order = mlp(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda mod, a, o: order.append("g") if mod is m.fc1 else None
    )
    HookManager(m).observe("fc1", lambda t, p: order.append("l"))
    m(row())
    handle.remove()
    assert order == ["g", "l"]


@behaviour(PEER, "counts: retain_graph twice fires bwd twice")
def _():
    m = mlp()
    hook = HookManager(m).observe("fc1:grad_output", lambda g, p: None)
    loss = m(row()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert hook.calls == 2


@behaviour(PEER, "BatchNorm (cpp node) grad_input")
def _():
    m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    hook = HookManager(m).observe("1:grad_input", lambda g, p: None)
    m(row()).square().sum().backward()
    assert hook.calls == 1


@behaviour(PEER, "bwd-pre change is seen by bwd hook's grad_output (raw)")
def _():
    m, seen = mlp(), []
    m.fc2.register_full_backward_pre_hook(lambda mod, g: (g[0] * 3,))
    HookManager(m).add("fc2:grad_input", lambda raw, p: seen.append(raw.output[0]), raw=True)
    m(row()).sum().backward()
    assert torch.equal(seen[0], torch.full((3, 2), 3.0))


@behaviour(PEER, "invalid bwd return: wrong shape refused")
def _():
    m = mlp()
    HookManager(m).add("fc2:grad_output", lambda g, p: g[0])
    assert "keeps the shape" in str(raises(HookError, m(row()).sum().backward))


@behaviour(PEER, "requires_grad of args preserved with bwd hook attached")
def _():
    class Asks(nn.Module):
        def forward(self, a, b):
            self.asked = (a.requires_grad, b.requires_grad)
            return a + b

    m = Asks()
    HookManager(m).observe(":grad_input", lambda g, p: None)
    m(row().requires_grad_(), row())
    assert m.asked == (True, False)


@behaviour(PEER, "no-grad input: grad_output fires with shape")
def _():
    m, seen = mlp(), []
    HookManager(m).observe("fc1:grad_output", lambda g, p: seen.append(g.shape))
    m(row()).sum().backward()
    assert seen == [(3, 6)]


@behaviour(PEER, "last arg requires grad (L1Loss)")
def _():
    m, seen = nn.L1Loss(), []
    HookManager(m).observe(":grad_output", lambda g, p: seen.append(g.item()))
    m(row(), row().mul(2).requires_grad_()).backward()
    assert seen == [1.0]


@behaviour(PEER, "non-tensor extra args & outputs")
def _():
    class Extra(nn.Module):
        def forward(self, x, flag, text):
            return x * 2, flag, text

    m = Extra()
    hook = HookManager(m).observe([":input", ":output", ":grad_output"], lambda t, p: None)
    m(row().requires_grad_(), True, "a")[0].sum().backward()
    assert hook.calls == 3


@behaviour(PEER, "in-place on input/output: grad_output hooks work where torch raises")
def _():
    m = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    hook = HookManager(m).observe("*:grad_output", lambda g, p: None)
    m(row()).sum().backward()
    assert hook.calls == 3


@behaviour(PEER, "list/dict outputs, different nodes: grads at leaves")
def _():
    class Lists(nn.Module):
        def forward(self, x):
            return [x * 2, {"b": x * 3}]

    m, seen = Lists(), {}
    HookManager(m).observe(":grad_output", lambda g, p: seen.setdefault(p.leaf, g[0, 0].item()))
    out = m(row().requires_grad_())
    (out[0] * 5 + out[1]["b"] * 7).sum().backward()
    assert seen == {"0": 5.0, "1.b": 7.0}


@behaviour(PEER, "sizes of two inputs' gradients (raw)")
def _():
    m, seen = nn.Bilinear(2, 3, 4), []
    HookManager(m).add(":grad_input", lambda raw, p: seen.extend(g.shape for g in raw.args), raw=True)
    m(torch.ones(5, 2, requires_grad=True), torch.ones(5, 3, requires_grad=True)).sum().backward()
    assert seen == [(5, 2), (5, 3)]


@behaviour(PEER, "bwd writeable: grad_input x2")
def _():
    m = mlp()
    plain, changed = row().requires_grad_(), row().requires_grad_()
    m(plain).sum().backward()
    HookManager(m).add(":grad_input", lambda g, p: g * 2)
    m(changed).sum().backward()
    assert torch.equal(changed.grad, plain.grad * 2)


@behaviour(PEER, "pre relu + fwd neg, grads right")
def _():
    m, given = nn.Linear(4, 2), row().requires_grad_()
    hooked = [(":input", lambda t, p: t.relu()), (":output", lambda t, p: -t)]
    HookManager(m).run_with_hooks(given, hooks=hooked).sum().backward()
    assert torch.allclose(given.grad, -m.weight.sum(0) * (row() > 0))


@behaviour(PEER, "double backward (gradient penalty) with grad_output observer")
def _():
    m, given = mlp(), row().requires_grad_()
    hook = HookManager(m).observe("fc1:grad_output", lambda g, p: None)
    (first,) = torch.autograd.grad(m(given).square().sum(), given, create_graph=True)
    first.square().sum().backward()
    assert hook.calls >= 1
    assert m.fc1.weight.grad.any()


@behaviour(PEER, "double backward with scale at grad_output: differentiable? equals hand hook")
def _():
    def penalty(m, attach):
        given = row().requires_grad_()
        attach(m)
        (first,) = torch.autograd.grad(m(given).square().sum(), given, create_graph=True)
        return grads(m, first.square().sum())

    def by_hand(m):
        m.fc1.register_forward_hook(lambda mod, a, out: out.register_hook(lambda g: g * 0.5) and None)

    ours = penalty(mlp(), lambda m: HookManager(m).add("fc1:grad_output", lambda g, p: g * 0.5))
    theirs = penalty(mlp(), by_hand)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@behaviour(PEER, "no reference kept: model freed w/o gc when manager dropped")
def _():
    import gc

    gc.collect()
    gc.disable()
    try:
        m = mlp()
        with HookManager(m) as hooks:
            hooks.observe("fc1", lambda t, p: None)
            hooks.run_with_cache(row())
        alive = weakref.ref(m)
        del m, hooks
        assert alive() is None
    finally:
        gc.enable()
