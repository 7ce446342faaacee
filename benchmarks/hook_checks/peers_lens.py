"""What TransformerLens' and mi-crow's tests ask of hooks, in gradwatch's terms."""

import tempfile
import warnings

import torch
from torch import nn

from gradwatch.errors import ConfigError, HookNeverFired
from gradwatch.hooks import ActivationStore, HookManager, Intervention, Observer, patch, zero

from ._base import behaviour, gpt2, ids, mlp, net, raises, row, x

PEER = "TransformerLens"
RESID = "blocks.0.hook_resid_post"


@behaviour(PEER, "temp hook in run: gone after, fired once")
def _():
    hooks, seen = HookManager(gpt2()), []
    hooks.run_with_hooks(ids(), hooks=[(RESID, lambda t, p: seen.append(1))])
    hooks.model(ids())
    assert seen == [1]
    assert len(hooks) == 0


@behaviour(PEER, "permanent persists across runs")
def _():
    hooks = HookManager(net())
    hook = hooks.observe("head", lambda t, p: None, permanent=True)
    for _ in range(2):
        hooks.run_with_hooks(x())
        hooks.remove_all()
    assert hook.calls == 2


@behaviour(PEER, "context; nested 2 inner")
def _():
    hooks, order = HookManager(net()), []
    with hooks.temporary(("head", lambda t, p: order.append(0))):
        with hooks.temporary(("head", lambda t, p: order.append(1)), ("head", lambda t, p: order.append(2))):
            hooks.model(x())
        hooks.model(x())
    assert order == [0, 1, 2, 0]


@behaviour(PEER, "run_with_cache inside context keeps outer")
def _():
    hooks = HookManager(net())
    with hooks.temporary(("head", lambda t, p: t * 0)):
        _, cache = hooks.run_with_cache(x())
        assert not cache["head"].any()
        assert len(hooks) == 1


@behaviour(PEER, "bwd hook: not in fwd, once in bwd; tuple return")
def _():
    hooks, seen = HookManager(net()), []
    out = hooks.run_with_hooks(x(), hooks=[("head:grad_output", lambda g, p: seen.append(1))])
    assert seen == []
    out.sum().backward()
    assert seen == [1]


@behaviour(PEER, "bwd bare tensor; None")
def _():
    m = net()
    HookManager(m).run_with_hooks(x(), hooks=[("head:grad_output", lambda g, p: g * 0)]).sum().backward()
    assert not m.head.weight.grad.any()


@behaviour(PEER, "nested with failure leaves outer intact")
def _():
    hooks = HookManager(net())

    def inner():
        with hooks.temporary(("embed", zero())):
            raise KeyError

    with hooks.temporary(("head", zero())):
        raises(KeyError, inner)
        assert len(hooks) == 1
        assert not hooks.model(x()).any()


@behaviour(PEER, "reset inside context")
def _():
    hooks = HookManager(net())
    plain = hooks.model(x())
    with hooks.temporary(("head", zero())):
        hooks.remove_all()
        assert torch.equal(hooks.model(x()), plain)
    assert len(hooks) == 0


@behaviour(PEER, "prepend x4: zero/randn decide the final state")
def _():
    hooks = HookManager(net())
    for fn, first in ((lambda t, p: t * 0, False), (lambda t, p: t + 1, False), (lambda t, p: t + 5, True)):
        hooks.add("head", fn, prepend=first)
    assert torch.equal(hooks.model(x()), torch.ones(2, 5, 3))
    hooks.add("head", lambda t, p: t * 0 + 9, prepend=True)
    assert torch.equal(hooks.model(x()), torch.ones(2, 5, 3))


@behaviour(PEER, "list hooks by name / dir / permanence, user fn kept")
def _():
    hooks = HookManager(net())
    fn = lambda t, p: None  # noqa: E731
    hook = hooks.add("head:grad_output", fn, permanent=True)
    hooks.observe("embed", fn)
    assert hooks.hooks_at("head:grad_output", permanent=True) == [hook]
    assert hook.fn is fn


@behaviour(PEER, "has_hooks at point")
def _():
    hooks = HookManager(net())
    hooks.observe("head", print)
    assert hooks.hooks_at("head")
    assert not hooks.hooks_at("embed")


@behaviour(PEER, "cache: keys/items/values same order, equal tensors")
def _():
    _, cache = HookManager(net()).run_with_cache(x())
    assert [k for k, _ in cache.items()] == list(cache.keys())
    assert all(a is b for (_, a), b in zip(cache.items(), cache.values(), strict=True))


@behaviour(PEER, "cache keys under alias asked for: list(cache)==['blocks.0.hook_resid_post']")
def _():
    assert list(HookManager(gpt2()).run_with_cache(ids(), points=RESID)[1]) == [RESID]


@behaviour(PEER, "cache value by iterating: hook_z iterated shows heads?")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids(), points="*.hook_z")
    assert [v.shape for v in cache.values()] == [(1, 6, 4, 8)] * 3


@behaviour(PEER, "negative layer, k/-1; embed")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids(), points=["*.hook_k", "hook_embed"])
    assert torch.equal(cache["k", -1], cache["blocks.2.attn.hook_k"])
    assert torch.equal(cache["embed"], cache["hook_embed"])


@behaviour(PEER, "apply slice to batch dim / remove_batch_dim")
def _():
    hooks = HookManager(gpt2())
    _, cache = hooks.run_with_cache(ids(), points=RESID, remove_batch_dim=True)
    assert cache[RESID].shape == (6, 32)


@behaviour(PEER, "pos_slice in run_with_cache")
def _():
    hooks = HookManager(gpt2())
    _, whole = hooks.run_with_cache(ids(), points=RESID)
    _, cache = hooks.run_with_cache(ids(), points=RESID, pos_slice=slice(2, 4))
    assert torch.equal(cache[RESID], whole[RESID][:, 2:4])


@behaviour(PEER, "stack_activation up to a layer")
def _():
    _, cache = HookManager(gpt2()).run_with_cache(ids(), points="*.hook_resid_post")
    assert cache.stack("blocks.[01].hook_resid_post").shape == (2, 1, 6, 32)


@behaviour(PEER, "cache to cpu / dtype; autodiff via detach=False")
def _():
    hooks = HookManager(net())
    _, cache = hooks.run_with_cache(x(), points="head", detach=False)
    assert cache["head"].requires_grad
    assert cache.to("cpu", torch.float64)["head"].dtype == torch.float64


@behaviour(PEER, "hook fires once per forward; layer(); pattern hooks once a layer")
def _():
    hooks, seen = HookManager(gpt2()), []
    hooks.run_with_hooks(ids(), hooks=[("*.hook_resid_post", lambda t, p: seen.append(p.layer))])
    assert seen == [0, 1, 2]


@behaviour(PEER, "run_with_cache doesn't remove user's bwd hooks; equals plain forward")
def _():
    hooks = HookManager(net())
    plain = hooks.model(x())
    hook = hooks.observe("head:grad_output", lambda g, p: None)
    out, _ = hooks.run_with_cache(x())
    out.sum().backward()
    assert torch.equal(out, plain)
    assert hook.calls == 1


@behaviour(PEER, "1-D tokens auto promoted")
def _():
    m = gpt2()
    out, _ = HookManager(m).run_with_cache(ids()[0])
    assert torch.equal(out.logits, m(ids()).logits)


@behaviour(PEER, "direct path / mlp_in (patch the input of MLP only) : ln_2 output point")
def _():
    m = gpt2()
    hooks = HookManager(m)
    _, cache = hooks.run_with_cache(ids())
    out, patched = hooks.run_with_cache(ids(), hooks=[("blocks.1.ln2.hook_normalized", lambda t, p: t * 0)])
    assert torch.equal(patched["blocks.1.hook_resid_mid"], cache["blocks.1.hook_resid_mid"])
    assert not torch.equal(patched["blocks.1.hook_mlp_out"], cache["blocks.1.hook_mlp_out"])
    assert out.logits.isfinite().all()


@behaviour(PEER, "patch a token id at the embedding input (test_hook_tokens)")
def _():
    m = gpt2()

    def swap(tokens, point):
        tokens = tokens.clone()
        tokens[0, 2] = 9
        return tokens

    swapped = ids().clone()
    swapped[0, 2] = 9
    found = HookManager(m).run_with_hooks(ids(), hooks=[("transformer.wte:input", swap)])
    assert torch.equal(found.logits, m(swapped).logits)


@behaviour(PEER, "get_act_patch_attn_head_all_pos_every [5,layers,heads] in one call")
def _():
    hooks = HookManager(gpt2())
    _, cache = hooks.run_with_cache(ids())
    names = ["hook_z", "hook_q", "hook_k", "hook_v"]
    points = [f"blocks.{i}.attn.{n}" for n in names for i in range(3)]
    found = hooks.sweep(
        points, heads=range(4), metric=lambda o: o.logits[0, -1, 3], inputs=ids() + 7, source=cache, progress=False
    )
    assert found.values.reshape(4, 3, 4).shape == (4, 3, 4)


CROW = "mi-crow"


@behaviour(CROW, "invalid port name refused")
def _():
    raises(ConfigError, HookManager(mlp()).observe, "fc1:outptu", print)
    raises(ConfigError, HookManager(mlp()).observe, "fc1", print, port="outptu")


@behaviour(CROW, "non-callable / None function refused")
def _():
    raises(ConfigError, HookManager(mlp()).add, "fc1", None)
    raises(ConfigError, HookManager(mlp()).add, "fc1", 3)


@behaviour(CROW, "None/None-layer refused")
def _():
    raises(ConfigError, HookManager(mlp()).add, None, print)


@behaviour(CROW, "disabled: no change; pre & fwd")
def _():
    m = mlp()
    plain = m(row())
    HookManager(m).add(["fc1:input", "fc1:output"], lambda t, p: t * 0).disable()
    assert torch.equal(m(row()), plain)


@behaviour(CROW, "list / tuple / object output modified")
def _():
    class Trees(nn.Module):
        def forward(self, x):
            return [x, (x, x)]

    found = HookManager(Trees()).run_with_hooks(row(), hooks=[(":output", lambda t, p: t * 0)])
    assert isinstance(found, list)
    assert isinstance(found[1], tuple)
    assert not any(t.any() for t in (found[0], *found[1]))


@behaviour(CROW, "plain object output: coverage says why")
def _():
    class Thing:
        def __init__(self, t):
            self.t = t

    class Things(nn.Module):
        def forward(self, x):
            return Thing(x)

    error = raises(HookNeverFired, HookManager(Things()).run_with_hooks, row(), hooks=[(":output", zero())])
    assert "Thing" in str(error)


@behaviour(CROW, "None output tolerated")
def _():
    class Nothing(nn.Module):
        def forward(self, x):
            return None

    m = Nothing()
    HookManager(m).observe(":output", lambda t, p: None)
    assert m(row()) is None


@behaviour(CROW, "detector overwrites / capture keeps; detached")
def _():
    m = mlp()
    captured = HookManager(m).capture("fc1")
    m(row())
    m(row() * 2)
    assert len(captured) == 2
    assert not captured[0].output.requires_grad


@behaviour(CROW, "unregister by object, by id, unknown -> message")
def _():
    hooks = HookManager(mlp())
    hooks.remove(hooks.observe("fc1", print))
    hooks.observe("fc1", print, id="mine")
    hooks.remove("mine")
    assert len(hooks) == 0
    assert "there is no hook 'mine'" in str(raises(LookupError, hooks.remove, "mine"))


@behaviour(CROW, "get_controllers/get_detectors")
def _():
    hooks = HookManager(mlp())
    look, change = hooks.observe("fc1", print), hooks.add("fc1", Intervention(print))
    assert hooks.hooks_at(kind=Observer) == [look]
    assert hooks.hooks_at(kind=Intervention) == [change]


@behaviour(CROW, "observer error doesn't stop a controller on the same layer (disable)")
def _():
    m = mlp()
    hooks = HookManager(m)
    hooks.observe("fc2", lambda t, p: 1 / 0, on_error="disable")
    hooks.add("fc2", lambda t, p: t * 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not m(row()).any()


@behaviour(CROW, "replace layer after registering: warned / re-resolved?")
def _():
    m = mlp()
    hooks = HookManager(m)
    hooks.observe("fc1", lambda t, p: None)
    m.fc1 = nn.Linear(4, 6)
    m(row())
    assert "another one now" in str(hooks.coverage())


@behaviour(CROW, "save activations of a dataset per batch, resume folder")
def _():
    folder, m = tempfile.mkdtemp(), mlp()
    for _ in range(2):
        with HookManager(m).capture("fc1", store=folder):
            m(row())
            m(row())
    assert len(ActivationStore(folder)) == 4


_ = patch
