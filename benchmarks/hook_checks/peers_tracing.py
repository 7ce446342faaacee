"""What users of nnsight and baukit do, in gradwatch's terms."""

import torch
from torch import nn

from gradwatch.errors import UnknownPathError
from gradwatch.hooks import HookManager, add, patch, scale, zero

from ._base import behaviour, by_hand, cnn, gpt2, grads, ids, image, mlp, net, raises, row, same, x

PEER = "nnsight"


@behaviour(PEER, "the output of a layer, saved from a trace, is what a hook by hand sees")
def _():
    m = gpt2()
    _, wanted = by_hand(m, "transformer.h.1", lambda: m(ids()))
    assert torch.equal(HookManager(m).run_with_cache(ids(), points="blocks.1.hook_resid_post")[1].stack("*")[0], wanted)


@behaviour(PEER, "the input of a layer, saved from a trace")
def _():
    m = gpt2()
    _, wanted = by_hand(m, "transformer.h.1.mlp", lambda: m(ids()), input=True)
    assert torch.equal(
        HookManager(m).run_with_cache(ids(), points="transformer.h.1.mlp:input")[1].stack("*")[0], wanted
    )


@behaviour(PEER, "an output assigned to is what the model goes on with")
def _():
    m, value = mlp(), torch.ones(3, 6)
    assert torch.equal(HookManager(m).run_with_hooks(row(), hooks=[("fc1", patch(value))]), m.fc2(value))


@behaviour(PEER, "one position set in place, nothing returned")
def _():
    def clear(t, point):
        t[:, 1] = 0

    found = HookManager(gpt2()).run_with_cache(ids(), hooks=[("blocks.0.hook_resid_post", clear)])[1]
    assert not found["blocks.0.hook_resid_post"][:, 1].any()
    assert found["blocks.0.hook_resid_post"][:, 2].any()


@behaviour(PEER, "a value of one prompt put into another's run")
def _():
    hooks = HookManager(gpt2())
    clean, cache = hooks.run_with_cache(ids())
    out = hooks.run_with_hooks(ids() + 3, hooks=[("blocks.2.hook_resid_post", patch(cache, positions=5))])
    assert torch.equal(out.logits[:, 5], clean.logits[:, 5])


@behaviour(PEER, "the gradient at an inner output, read")
def _():
    m = mlp()
    _, cache = HookManager(m).run_with_cache(row(), points="fc1", gradients=lambda out: out.sum())
    wanted = m.fc2.weight.sum(0) * (m.fc1(row()) > 0)
    assert torch.allclose(cache.gradients["fc1"], wanted)


@behaviour(PEER, "the gradient at an inner output, replaced")
def _():
    m = mlp()
    HookManager(m).run_with_hooks(row(), hooks=[("relu:grad_output", lambda g, p: g * 0)]).sum().backward()
    assert not m.fc1.weight.grad.any()
    assert m.fc2.weight.grad.any()


@behaviour(PEER, "a trace that stops after a layer runs nothing behind it")
def _():
    ran, hooks = [], HookManager(net())
    hooks.observe("*", lambda t, p: ran.append(p.path))
    hooks.run_with_hooks(x(), stop_at="blocks.1")
    assert not any(path.startswith(("blocks.2", "head")) for path in ran)


@behaviour(PEER, "shapes without a real run (a scan): on the meta device")
def _():
    m = net().to("meta")
    _, cache = HookManager(m).run_with_cache(x().to("meta"), points="blocks.3.mlp.0")
    assert cache["blocks.3.mlp.0"].shape == (2, 5, 16)


@behaviour(PEER, "generation: a layer's output at each token")
def _():
    found = HookManager(gpt2()).generate(ids(3), points="blocks.0.hook_resid_post", max_new_tokens=4, do_sample=False)
    _, cache = found
    assert cache["blocks.0.hook_resid_post"].shape[1] >= 6


@behaviour(PEER, "generation: an intervention at every token changes what comes")
def _():
    m = gpt2()
    hooks = HookManager(m)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = m.generate(ids(3), **settings)
    with hooks.temporary(("blocks.2.hook_resid_post", lambda t, p: t * 0 + torch.linspace(-9, 9, 32))):
        steered = m.generate(ids(3), **settings)
    assert torch.equal(m.generate(ids(3), **settings), plain)
    assert not torch.equal(steered, plain)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


@behaviour(PEER, "the second call of a module alone is read and changed")
def _():
    m = Loop()
    hooks = HookManager(m)
    hooked = [("cell", lambda t, p: t * 0 if p.call == 1 else None)]
    _, cache = hooks.run_with_cache(row(), points="cell", hooks=hooked)
    assert [bool(t.any()) for t in cache.calls("cell")] == [True, False, True]


@behaviour(PEER, "modules under names of one's own")
def _():
    hooks = HookManager(net(), aliases={"layer{i}": "blocks.{i}:output"})
    assert "layer3" in hooks.run_with_cache(x(), points="layer3")[1]


@behaviour(PEER, "a module skipped: its input goes on as its output")
def _():
    m = net()
    hooked = [("blocks.2", lambda t, p: None), ("blocks.3", lambda t, p: None)]
    hooks = HookManager(m)
    hooks.add("blocks.3", lambda raw, p: raw.args[0], raw=True)
    _, cache = hooks.run_with_cache(x(), points=["blocks.2", "blocks.3"], hooks=hooked)
    assert torch.equal(cache["blocks.2"], cache["blocks.3"])


@behaviour(PEER, "an edit that stays on the model until it is cleared")
def _():
    m = mlp()
    hooks, plain = HookManager(m), m(row())
    hooks.add("fc1", zero(), permanent=True)
    hooks.remove_all()
    assert torch.equal(m(row()), m(row() * 3))
    hooks.remove_all(including_permanent=True)
    assert torch.equal(m(row()), plain)


@behaviour(PEER, "an edit under a condition on the value")
def _():
    m = mlp()
    hooked = [("fc1", lambda t, p: t * 0 if t.sum() > 1e9 else None)]
    assert torch.equal(HookManager(m).run_with_hooks(row(), hooks=hooked), m(row()))


@behaviour(PEER, "edits of many layers from a loop")
def _():
    hooks = HookManager(net())
    hooked = [(f"blocks.{i}.mlp", scale(0.0)) for i in range(6)]
    _, cache = hooks.run_with_cache(x(), hooks=hooked)
    assert not any(cache[f"blocks.{i}.mlp"].any() for i in range(6))


@behaviour(PEER, "an error inside a trace leaves the model clean")
def _():
    m = mlp()
    raises(RuntimeError, HookManager(m).run_with_hooks, row(), hooks=[("fc2", lambda t, p: 1 / 0)])
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.modules())


@behaviour(PEER, "several prompts in one batch, one of them edited")
def _():
    hooks = HookManager(gpt2())
    plain = hooks.model(ids(6, 2)).logits
    out = hooks.run_with_hooks(ids(6, 2), hooks=[("blocks.1.hook_resid_post", zero(index=1))]).logits
    assert torch.equal(out[0], plain[0])
    assert not torch.equal(out[1], plain[1])


@behaviour(PEER, "inside a function of the forward: attention scores read and set")
def _():
    hooks = HookManager(gpt2("sdpa"))
    hooked = [("blocks.0.attn.hook_attn_scores", lambda t, p: t * 0)]
    _, cache = hooks.run_with_cache(ids(), points="blocks.0.attn.hook_pattern", hooks=hooked)
    pattern = cache["blocks.0.attn.hook_pattern"]
    assert torch.allclose(pattern.sum(-1), torch.ones(1, 4, 6))


@behaviour(PEER, "everything of some modules, moved to a device and dtype")
def _():
    _, cache = HookManager(net()).run_with_cache(x(), points="blocks.*.attn", device="cpu", dtype=torch.float64)
    assert all(t.dtype == torch.float64 for t in cache.values())


@behaviour(PEER, "logit lens: the final norm and head on a middle layer")
def _():
    m = gpt2()
    _, cache = HookManager(m).run_with_cache(ids())
    early = m.lm_head(m.transformer.ln_f(cache["blocks.2.hook_resid_post"]))
    assert torch.allclose(early, m(ids()).logits, atol=1e-5)


BAUKIT = "baukit"


@behaviour(BAUKIT, "one layer's output and input kept together")
def _():
    m = mlp()
    with HookManager(m).capture("fc2", inputs=True) as captured:
        out = m(row())
    assert torch.equal(captured[0].output, out)
    assert torch.equal(m.fc2(captured[0].input), out)


@behaviour(BAUKIT, "many layers at once, by a list of names, in order")
def _():
    names = ["fc2:output", "fc1:output"]
    assert list(HookManager(mlp()).run_with_cache(row(), points=names)[1]) == sorted(names)


@behaviour(BAUKIT, "an output edited by a function that is told the layer")
def _():
    m = mlp()
    hooked = [(["fc1", "fc2"], lambda t, p: t * 0 if p.path == "fc2" else None)]
    assert not HookManager(m).run_with_hooks(row(), hooks=hooked).any()


@behaviour(BAUKIT, "stopped at the last layer wanted")
def _():
    m = mlp()
    assert torch.equal(HookManager(m).run_with_hooks(row(), stop_at="fc1"), m.fc1(row()))


@behaviour(BAUKIT, "an output kept with its graph, for a gradient afterwards")
def _():
    m = mlp()
    out, cache = HookManager(m).run_with_cache(row(), points="fc1", detach=False, clone=False)
    (grad,) = torch.autograd.grad(out.sum(), cache["fc1"])
    assert grad.shape == (3, 6)


@behaviour(BAUKIT, "kept as a copy, or as the tensor itself")
def _():
    m = cnn().eval()
    points = "1:output"
    copied = HookManager(m).run_with_cache(image(), points=points)[1][points]
    itself = HookManager(m).run_with_cache(image(), points=points, clone=False)[1][points]
    assert (copied < 0).any()
    assert not (itself < 0).any()


@behaviour(BAUKIT, "a part of the model alone, from a layer to a layer")
def _():
    m = gpt2()
    hooks = HookManager(m)
    _, cache = hooks.run_with_cache(ids())
    out = hooks.run_with_hooks(cache["blocks.1.hook_resid_pre"], start_at_layer=1)
    assert torch.allclose(out.logits, m(ids()).logits, atol=1e-6)


@behaviour(BAUKIT, "a name that is none is an error that names the nearest")
def _():
    assert "fc1" in str(raises(UnknownPathError, HookManager(mlp()).run_with_cache, row(), points="fc11"))


@behaviour(BAUKIT, "hooks are off after an exception in the block")
def _():
    m = mlp()

    def block():
        with HookManager(m).capture("fc1"):
            raise KeyError

    raises(KeyError, block)
    assert not m.fc1._forward_hooks


@behaviour(BAUKIT, "a parameter found by its dotted name, its gradient hooked")
def _():
    m = mlp()
    hooks = HookManager(m)
    assert hooks.points("fc1.weight:grad")[0].target is m.fc1.weight
    hooks.add("fc1.weight:grad", lambda g, p: g * 0)
    assert not grads(m, m(row()).sum())["fc1.weight"].any()


@behaviour(BAUKIT, "nested outputs kept whole, by leaf")
def _():
    m = nn.LSTM(4, 3)
    out, (h, c) = m(x())
    found = HookManager(m).run_with_cache(x())[1][":output"]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), (out, h, c), strict=True))


_ = (add, same)
