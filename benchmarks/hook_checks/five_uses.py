"""Pre-hooks, post-hooks, backward hooks and five uses."""

import json
import math
import tempfile
import time
import warnings

import torch
from torch import nn

from gradwatch.errors import HookBreak
from gradwatch.hooks import ActivationStore, HookManager, exceeds, noise

from ._base import cnn, feature, gpt2, grads, ids, image, mlp, net, raises, row, same, x

SOURCE = "five uses"


@feature(SOURCE, "pre hook doubles input")
def _():
    m = mlp()
    assert torch.equal(HookManager(m).run_with_hooks(row(), hooks=[("fc1:input", lambda t, p: t * 2)]), m(row() * 2))


@feature(SOURCE, "forward hook +1")
def _():
    m = mlp()
    assert torch.equal(HookManager(m).run_with_hooks(row(), hooks=[("fc2", lambda t, p: t + 1)]), m(row()) + 1)


@feature(SOURCE, "root point named as '' / ':output' / '(root)' / '*'")
def _():
    hooks = HookManager(mlp())
    for name in ("", ":output"):
        assert hooks.observe(name, print).points == (":output",)
    assert ":output" in hooks.observe("*", print).points
    assert "Known" in str(raises(LookupError, hooks.observe, "(root)", print))


@feature(SOURCE, "backward hook zeroes grad_input of first layer w/ input grad")
def _():
    given = row().requires_grad_()
    m = mlp()
    HookManager(m).add("fc1:grad_input", lambda g, p: g * 0)
    m(given).sum().backward()
    assert not given.grad.any()
    assert m.fc1.weight.grad.any()


@feature(SOURCE, "backward hook zeroes grad_output (weights too)")
def _():
    m = mlp()
    HookManager(m).add("fc1:grad_output", lambda g, p: g * 0)
    m(row()).sum().backward()
    assert not m.fc1.weight.grad.any()


@feature(SOURCE, "profile forward & backward per layer")
def _():
    m = mlp()
    with HookManager(m).profile() as profile:
        m(row()).sum().backward()
    assert all(profile[name].forward_ms > 0 and profile[name].backward_ms > 0 for name in ("fc1", "fc2"))


class Sleep(nn.Module):
    def forward(self, x):
        time.sleep(0.03)
        return x


@feature(SOURCE, "profile: sums plausible vs sleep module")
def _():
    m = nn.Sequential(nn.Linear(4, 4), Sleep(), nn.Linear(4, 4))
    with HookManager(m).profile() as profile:
        m(row()).sum().backward()
    assert profile["1"].forward_ms >= 30
    assert profile[""].forward_ms >= profile["1"].forward_ms
    assert profile[""].forward_self_ms < profile["1"].forward_ms


@feature(SOURCE, "profile HF GPT2 with generate / chrome trace")
def _():
    m = gpt2()
    with HookManager(m).profile() as profile:
        m.generate(ids(3), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert profile["transformer.h.0"].calls == 2
    assert json.loads(json.dumps(profile.chrome_trace()))["traceEvents"]


@feature(SOURCE, "profile bitwise neutral (cnn inplace relu)")
def _():
    m = cnn().eval()
    wanted = grads(m, m(image()).sum())
    with HookManager(m).profile():
        found = grads(m, m(image()).sum())
    assert same(found, wanted)


@feature(SOURCE, "gradient noise")
def _():
    m = mlp()
    wanted = grads(m, m(row()).sum())
    HookManager(m).add("fc1.weight:grad", noise(0.1))
    found = grads(m, m(row()).sum())
    assert not torch.equal(found["fc1.weight"], wanted["fc1.weight"])
    assert torch.equal(found["fc2.weight"], wanted["fc2.weight"])


@feature(SOURCE, "activation noise leaves global RNG alone, differs per step, equal seeds equal")
def _():
    m, before = mlp(), torch.get_rng_state()
    one, two = HookManager(m), HookManager(m)
    first, second = (one.run_with_hooks(row(), hooks=[("fc1", noise(1.0, seed=3))]) for _ in range(2))
    again = two.run_with_hooks(row(), hooks=[("fc1", noise(1.0, seed=3))])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@feature(SOURCE, "feature extraction from intermediate layer, stop early")
def _():
    m = net()
    value, cache = HookManager(m).run_with_cache(x(), points="embed", stop_at="blocks.1")
    assert torch.equal(value, m.blocks[1](m.blocks[0](m.embed(x()))))
    assert list(cache) == ["embed:output"]


@feature(SOURCE, "feature extraction over a dataset to disk / one tensor")
def _():
    m, folder = mlp(), tempfile.mkdtemp()
    batches = [row() * k for k in (1, 2, 3)]
    with HookManager(m).capture("fc1", store=folder):
        for batch in batches:
            m(batch)
    assert torch.equal(ActivationStore(folder).load("fc1:output"), torch.cat([m.fc1(b) for b in batches]))


@feature(SOURCE, "exploding gradient: break_when at *:grad_output")
def _():
    m = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(8)])
    for layer in m:
        nn.init.constant_(layer.weight, 2.0)
    HookManager(m).break_when("*:grad_output", exceeds(1e3))
    error = raises(HookBreak, m(row()).sum().backward)
    assert error.point.path == "3"


@feature(SOURCE, "vanishing gradient: monitor at *:grad_output")
def _():
    m = net()
    with HookManager(m).monitor("*:grad_output") as monitor:
        m(x()).sum().backward()
    assert monitor["blocks.0:grad_output"].rms > 0
    assert "blocks.0:grad_output" in monitor.table()


@feature(SOURCE, "monitor param gradients")
def _():
    m = mlp()
    with HookManager(m).monitor("*:grad") as monitor:
        m(row()).sum().backward()
    assert math.isclose(monitor["fc1.weight:grad"].absmax, m.fc1.weight.grad.abs().max().item(), rel_tol=1e-6)


@feature(SOURCE, "printing hooks: print(hooks) overview")
def _():
    hooks = HookManager(mlp())
    hook = hooks.observe("fc1", print, id="mine")
    assert "1 hooks" in repr(hooks)
    assert "mine" in repr(hook)


_ = warnings
