"""torch hooks: types, uses, activations in a dict, gradient surgery."""

import torch
from torch import nn

from gradwatch.hooks import HookManager, exceeds, scale

from ._base import by_hand, cnn, encoder, feature, gpt2, grads, ids, image, mlp, raises, row, same, words

SOURCE = "torch hooks"


@feature(SOURCE, "forward hook, inspect input & output shapes together")
def _():
    seen = []
    hooks = HookManager(mlp())
    hooks.add("fc1", lambda raw, p: seen.append((raw.args[0].shape, raw.output.shape)), raw=True)
    hooks.model(row())
    assert seen == [((3, 4), (3, 6))]


@feature(SOURCE, "modify output (custom transform)")
def _():
    m = mlp()
    wanted, _ = by_hand(m, "fc1", lambda: m(row()), lambda t: t * 2)
    assert torch.equal(HookManager(m).run_with_hooks(row(), hooks=[("fc1", lambda t, p: t * 2)]), wanted)


@feature(SOURCE, "backward hook: grad_input & grad_output at fc2")
def _():
    seen, hooks = {}, HookManager(mlp())
    hooks.observe(["fc2:grad_input", "fc2:grad_output"], lambda t, p: seen.setdefault(p.port, t.shape))
    hooks.model(row()).sum().backward()
    assert seen == {"grad_output": (3, 2), "grad_input": (3, 6)}


@feature(SOURCE, "backward hook: both in one call (raw)")
def _():
    seen, hooks = [], HookManager(mlp())
    hooks.add("fc2:grad_input", lambda raw, p: seen.append((raw.args[0].shape, raw.output[0].shape)), raw=True)
    hooks.model(row()).sum().backward()
    assert seen == [((3, 6), (3, 2))]


@feature(SOURCE, "grad_input at FIRST layer (input needs no grad)")
def _():
    seen, hooks = [], HookManager(mlp())
    hooks.add("fc1:grad_input", lambda raw, p: seen.append(raw.args), raw=True)
    quiet = hooks.observe("fc1:grad_input", lambda t, p: None)
    hooks.model(row()).sum().backward()
    assert seen == [(None,)]
    assert "none of its inputs requires a gradient" in str([c for c in hooks.coverage() if c.hook_id == quiet.id])


@feature(SOURCE, "gradient clipping at a layer")
def _():
    seen, hooks = [], HookManager(mlp())
    hooks.add("fc2:grad_output", lambda g, p: g.clamp(-0.1, 0.1))
    hooks.observe("fc2:grad_output", lambda g, p: seen.append(g.abs().max().item()))
    hooks.model(row()).sum().backward()
    assert seen == [torch.tensor(0.1).item()]


@feature(SOURCE, "clip each param grad")
def _():
    m = mlp()
    HookManager(m).add("*:grad", lambda g, p: g.clamp(-0.01, 0.01))
    m(row()).sum().backward()
    assert all(p.grad.abs().max() <= 0.01 for p in m.parameters())


@feature(SOURCE, "custom regularisation on activation (backprops)")
def _():
    m, kept = mlp(), []
    hooks = HookManager(m)
    hooks.add("relu", lambda t, p: kept.append(t))
    out = m(row())
    found = grads(m, out.sum() + kept[0].abs().sum())
    h = m.relu(m.fc1(row()))
    hooks.close()
    assert same(found, grads(m, m.fc2(h).sum() + h.abs().sum()))


@feature(SOURCE, "collect activations in dict, several layers")
def _():
    kept, m = {}, mlp()
    HookManager(m).observe(["fc1", "fc2"], lambda t, p: kept.__setitem__(p.path, t))
    out = m(row())
    assert list(kept) == ["fc1", "fc2"]
    assert torch.equal(kept["fc2"], out)


@feature(SOURCE, "cache key without port: cache['fc1']")
def _():
    m = mlp()
    assert torch.equal(HookManager(m).run_with_cache(row())[1]["fc1"], m.fc1(row()))


@feature(SOURCE, "CNN feature maps, conv layers by class")
def _():
    _, cache = HookManager(cnn()).run_with_cache(image(), points=nn.Conv2d)
    assert [tuple(t.shape) for t in cache.values()] == [(2, 8, 8, 8), (2, 8, 2, 2)]


@feature(SOURCE, "CNN feature map before inplace ReLU is unspoiled")
def _():
    m = cnn().eval()
    _, cache = HookManager(m).run_with_cache(image(), points="1")
    assert torch.equal(cache["1:output"], m[1](m[0](image())))


@feature(SOURCE, "attention maps: nn.TransformerEncoder weights")
def _():
    m = encoder().eval()
    _, cache = HookManager(m).run_with_cache(words(), points="blocks.0.attn.hook_pattern")
    _, wanted = m.layers[0].self_attn(words(), words(), words(), average_attn_weights=False)
    found = cache["blocks.0.attn.hook_pattern"]
    assert torch.allclose(found.reshape(wanted.shape), wanted, atol=1e-6)


@feature(SOURCE, "attention maps: HF GPT2 eager hook_pattern")
def _():
    m = gpt2()
    _, cache = HookManager(m).run_with_cache(ids(), points="blocks.*.attn.hook_pattern")
    wanted = m(ids(), output_attentions=True).attentions
    assert all(torch.equal(cache[f"blocks.{i}.attn.hook_pattern"], w) for i, w in enumerate(wanted))


@feature(SOURCE, "attention maps: HF GPT2 default (sdpa)")
def _():
    _, cache = HookManager(gpt2("sdpa")).run_with_cache(ids(), points="blocks.*.attn.hook_pattern")
    wanted = gpt2()(ids(), output_attentions=True).attentions
    assert all(torch.allclose(cache[f"blocks.{i}.attn.hook_pattern"], w, atol=1e-6) for i, w in enumerate(wanted))


@feature(SOURCE, "add attention mask / adversarial perturbation by hook on input kwarg")
def _():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x, mask=torch.ones(4))

    class Inner(nn.Module):
        def forward(self, x, mask=None):
            return x * mask

    found = HookManager(Masked()).run_with_hooks(
        row(), hooks=[("inner:input", lambda t, p: t * 0 if p.leaf == "mask" else None)]
    )
    assert not found.any()


@feature(SOURCE, "modify attention mask of one layer")
def _():
    m = gpt2()
    hooks, leaves = HookManager(m), []
    hooks.observe("transformer.h.1:input", lambda t, p: leaves.append(p.leaf))
    before = m(ids()).logits
    hooks.add("transformer.h.1:input", lambda t, p: torch.full_like(t, -1e4).triu(0), leaf="attention_mask")
    assert not torch.equal(m(ids(), attention_mask=torch.ones(1, 6)).logits, before)
    assert leaves


@feature(SOURCE, "gradient surgery in hook: project")
def _():
    m, against = mlp(), torch.ones(2)
    HookManager(m).add("fc2:grad_output", lambda g, p: g - (g @ against)[:, None] * against / 2)
    m(row()).sum().backward()
    assert not m.fc2.bias.grad.any()


@feature(SOURCE, "breakpoint inside graph (pdb)")
def _():
    import builtins
    from unittest import mock

    hooks = HookManager(mlp())
    hooks.break_when("fc1", exceeds(0.0), action="debugger")
    with mock.patch.object(builtins, "breakpoint") as stopped:
        hooks.model(row())
    assert stopped.call_count == 1


@feature(SOURCE, "logit inspection (lm_head in/out) GPT2")
def _():
    m = gpt2()
    out, cache = HookManager(m).run_with_cache(ids(), points=["lm_head:input", "lm_head:output"])
    assert torch.equal(cache["lm_head:output"], out.logits)
    assert torch.equal(m.lm_head(cache["lm_head:input"]), out.logits)


@feature(SOURCE, "tensor hook on an arbitrary tensor (not a module) e.g. F.relu out")
def _():
    class Functional(nn.Module):
        def forward(self, x):
            return nn.functional.relu(x) * 2

    error = raises(LookupError, HookManager(Functional()).add, "relu", scale(0.0))
    raise LookupError(f"what a function makes inside a forward has no name: {error}")
