"""What users of pyvene and captum do, in gradwatch's terms."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from gradwatch.errors import HookNeverFired
from gradwatch.hooks import HookManager, add, mean, noise, patch, zero

from ._base import behaviour, cnn, gpt2, ids, image, mlp, net, raises, row, x

PEER = "pyvene"


def logits(m, hooks, tokens, *hooked):
    return hooks.run_with_hooks(tokens, hooks=list(hooked)).logits


@behaviour(PEER, "interchange at a layer and position from a source run")
def _():
    m = gpt2()
    hooks = HookManager(m)
    source, cache = hooks.run_with_cache(ids() + 3)
    found = logits(m, hooks, ids(), ("blocks.2.hook_resid_post", patch(cache, positions=3)))
    assert torch.equal(found[:, 3], source.logits[:, 3])
    assert torch.equal(found[:, 4], m(ids()).logits[:, 4])


@behaviour(PEER, "zero, add and subtract interventions")
def _():
    m, v = mlp(), torch.ones(6)
    hooks = HookManager(m)
    up, down = (hooks.run_with_hooks(row(), hooks=[("fc1", add(v, factor=f))]) for f in (1.0, -1.0))
    assert torch.allclose(up, m.fc2(torch.relu(m.fc1(row()) + 1)))
    assert torch.allclose(down, m.fc2(torch.relu(m.fc1(row()) - 1)))
    assert torch.equal(hooks.run_with_hooks(row(), hooks=[("fc1", zero())]), m.fc2(torch.zeros(3, 6)))


@behaviour(PEER, "collected without a change to the run")
def _():
    m = gpt2()
    out, cache = HookManager(m).run_with_cache(ids(), points="blocks.1.hook_mlp_out")
    assert torch.equal(out.logits, m(ids()).logits)
    assert len(cache) == 1


@behaviour(PEER, "two places patched from two sources in one run")
def _():
    hooks = HookManager(gpt2())
    (_, one), (_, two) = hooks.run_with_cache(ids() + 1), hooks.run_with_cache(ids() + 2)
    hooked = [("blocks.0.hook_mlp_out", patch(one)), ("blocks.1.hook_mlp_out", patch(two))]
    _, cache = hooks.run_with_cache(ids(), hooks=hooked)
    assert torch.equal(cache["blocks.0.hook_mlp_out"], one["blocks.0.hook_mlp_out"])
    assert torch.equal(cache["blocks.1.hook_mlp_out"], two["blocks.1.hook_mlp_out"])


@behaviour(PEER, "a source that is itself a run with an intervention")
def _():
    m = gpt2()
    hooks = HookManager(m)
    middle, cache = hooks.run_with_cache(ids() + 1, hooks=[("blocks.0.hook_mlp_out", zero())])
    found = logits(m, hooks, ids(), ("blocks.2.hook_resid_post", patch(cache)))
    assert torch.equal(found, middle.logits)


@behaviour(PEER, "a subspace: some dimensions alone")
def _():
    hooks = HookManager(mlp())
    _, cache = hooks.run_with_cache(row() * 2, points="fc1")
    _, found = hooks.run_with_cache(row(), points="fc1", hooks=[("fc1", patch(cache, index=(..., slice(0, 2))))])
    assert torch.equal(found["fc1"][:, :2], cache["fc1"][:, :2])
    assert torch.equal(found["fc1"][:, 2:], hooks.model.fc1(row())[:, 2:])


class Rotated(nn.Module):
    """Swaps a learnt subspace with that of a source."""

    def __init__(self, width, rank, source):
        super().__init__()
        self.basis = nn.Parameter(torch.linalg.qr(torch.eye(width)[:, :rank] + 0.1).Q)
        self.source = source

    def forward(self, tensor, point):
        return tensor + (self.source - tensor) @ self.basis @ self.basis.T


def trainable():
    m = mlp().requires_grad_(False)
    hooks = HookManager(m)
    _, cache = hooks.run_with_cache(row() * -1, points="fc1")
    return m, hooks, Rotated(6, 2, cache["fc1"])


@behaviour(PEER, "a trainable intervention learns while the model stays frozen")
def _():
    m, hooks, rotated = trainable()
    hooks.add("fc1", rotated, id="rotated")
    before = [p.clone() for p in m.parameters()]
    optimizer, losses = torch.optim.SGD(rotated.parameters(), lr=0.05), []
    for _ in range(5):
        loss = m(row()).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters(), strict=True))


@behaviour(PEER, "trainable interventions saved, and loaded into new ones")
def _():
    m, hooks, rotated = trainable()
    path = Path(tempfile.mkdtemp()) / "interventions.safetensors"
    hooks.add("fc1", rotated, id="rotated")
    rotated.basis.data.mul_(0.5)
    wanted = m(row())
    hooks.save_interventions(path)
    other, again, fresh = trainable()
    again.add("fc1", fresh, id="rotated")
    assert not torch.equal(other(row()), wanted)
    again.load_interventions(path)
    assert torch.equal(other(row()), wanted)


@behaviour(PEER, "a recurrent cell at one time step")
def _():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x):
            state = torch.zeros(x.shape[1], 4)
            for step in x:
                state = self.cell(step, state)
            return state

    m = Steps()
    hooks = HookManager(m)
    given = torch.randn(5, 2, 4)
    found = hooks.run_with_hooks(given, hooks=[("cell", lambda t, p: t * 0 if p.call == 2 else None)])
    assert torch.equal(found, m(given[3:]))


@behaviour(PEER, "one attention head")
def _():
    hooks = HookManager(gpt2())
    hooked = [("blocks.1.attn.hook_z", zero(heads=2))]
    _, cache = hooks.run_with_cache(ids(), points="blocks.1.attn.hook_z", hooks=hooked)
    assert [bool(cache["blocks.1.attn.hook_z"][:, :, h].any()) for h in range(4)] == [True, True, False, True]


@behaviour(PEER, "a function of the base value and the source value")
def _():
    hooks = HookManager(mlp())
    _, cache = hooks.run_with_cache(row() * 2, points="fc1")
    hooked = [("fc1", lambda t, p: (t + cache[p.name]) / 2)]
    _, found = hooks.run_with_cache(row(), points="fc1", hooks=hooked)
    assert torch.allclose(found["fc1"], (hooks.model.fc1(row()) + cache["fc1"]) / 2)


@behaviour(PEER, "causal tracing: noisy embeddings, one state restored")
def _():
    m = gpt2()
    hooks = HookManager(m)
    clean, cache = hooks.run_with_cache(ids())
    noisy = ("hook_embed", noise(3.0, positions=[0, 1]))
    corrupted = logits(m, hooks, ids(), noisy)
    restored = logits(m, hooks, ids(), noisy, ("blocks.2.hook_resid_post", patch(cache, positions=5)))
    assert torch.equal(restored[:, 5], clean.logits[:, 5])
    assert not torch.allclose(corrupted[:, 5], clean.logits[:, 5])


@behaviour(PEER, "an intervention in generation, at the prompt's tokens alone")
def _():
    m = gpt2()
    hooks = HookManager(m)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    prompt = ("blocks.1.hook_resid_post", lambda t, p: t * 0 if t.shape[1] > 1 else None)
    seen = []
    with hooks.temporary(prompt, ("blocks.1.hook_resid_post", lambda t, p: seen.append((t.shape[1], bool(t.any()))))):
        m.generate(ids(3), **settings)
    assert seen == [(3, False), (1, True), (1, True)]


@behaviour(PEER, "gradients flow through a patch to its source")
def _():
    m = mlp()
    source = torch.ones(3, 6, requires_grad=True)
    HookManager(m).run_with_hooks(row(), hooks=[("fc1", lambda t, p: source * 1)]).sum().backward()
    assert source.grad.any()
    assert m.fc1.weight.grad is None or not m.fc1.weight.grad.any()


@behaviour(PEER, "positions that differ by example")
def _():
    hooks = HookManager(gpt2())
    where = (torch.arange(2), torch.tensor([1, 4]))
    _, cache = hooks.run_with_cache(ids(6, 2), hooks=[("blocks.0.hook_resid_post", zero(index=where))])
    gone = ~cache["blocks.0.hook_resid_post"].any(-1)
    assert gone.nonzero().tolist() == [[0, 1], [1, 4]]


@behaviour(PEER, "mean ablation from a data set's activations")
def _():
    hooks = HookManager(mlp())
    _, cache = hooks.run_with_cache(torch.randn(50, 4), points="fc1")
    hooked = [("fc1", mean(cache))]
    _, found = hooks.run_with_cache(row(), points="fc1", hooks=hooked)
    assert torch.allclose(found["fc1"], cache["fc1"].mean(0).expand(3, 6), atol=1e-6)


@behaviour(PEER, "a place that the run never reaches is an error")
def _():
    m = net()
    m.unused = nn.Linear(1, 1)
    raises(HookNeverFired, HookManager(m).run_with_hooks, x(), hooks=[("unused", zero())])


CAPTUM = "captum"


@behaviour(CAPTUM, "activations of a layer, of its input or its output")
def _():
    m = mlp()
    _, cache = HookManager(m).run_with_cache(row(), points=["relu:input", "relu:output"])
    assert torch.equal(cache["relu:input"].relu(), cache["relu:output"])


@behaviour(CAPTUM, "gradient times activation of a layer")
def _():
    m = mlp()
    _, cache = HookManager(m).run_with_cache(row(), points="fc1", gradients=lambda out: out[:, 1].sum())
    found = cache["fc1"] * cache.gradients["fc1"]
    h = m.fc1(row()).detach().requires_grad_()
    (grad,) = torch.autograd.grad(m.fc2(m.relu(h))[:, 1].sum(), h)
    assert torch.allclose(found, grad * h)


@behaviour(CAPTUM, "gradient of one neuron with respect to the input")
def _():
    m = mlp()
    _, cache = HookManager(m).run_with_cache(
        row(), points=":input", stop_at="fc1", gradients=lambda out: out[:, 3].sum()
    )
    assert torch.allclose(cache.gradients[":input"], m.fc1.weight[3].expand(3, 4))


@behaviour(CAPTUM, "integrated gradients of a layer: they sum to the difference")
def _():
    m = mlp()
    hooks = HookManager(m)
    value, base = m.fc1(row()).detach(), torch.zeros(3, 6)
    total = torch.zeros_like(value)
    steps = 200
    for k in range(steps):
        between = base + (value - base) * (k + 0.5) / steps
        hooked = [("fc1", patch(between))]
        _, cache = hooks.run_with_cache(row(), points="fc1", hooks=hooked, gradients=lambda out: out.sum())
        total += cache.gradients["fc1"] / steps
    difference = m(row()).sum() - m.fc2(torch.relu(base)).sum()
    assert abs((total * (value - base)).sum() - difference) < 1e-3


@behaviour(CAPTUM, "Grad-CAM of a convolution before an in-place ReLU")
def _():
    m = cnn().eval()
    _, cache = HookManager(m).run_with_cache(image(), points="1", gradients=lambda out: out[:, 0].sum())
    weights = cache.gradients["1"].mean((2, 3), keepdim=True)
    cam = torch.relu((weights * cache["1"]).sum(1))
    assert cam.shape == (2, 8, 8)
    assert cam.isfinite().all()


@behaviour(CAPTUM, "guided backprop: only positive gradients pass a ReLU")
def _():
    m, given = mlp(), row().requires_grad_()
    HookManager(m).run_with_hooks(given, hooks=[("relu:grad_output", lambda g, p: g.clamp(min=0))]).sum().backward()
    active = (m.fc1(row()) > 0).float()
    assert torch.allclose(given.grad, (m.fc2.weight.sum(0).clamp(min=0) * active) @ m.fc1.weight)


@behaviour(CAPTUM, "ablation of each unit of a layer")
def _():
    m = mlp()
    hooks = HookManager(m)
    plain = m(row())
    effects = [
        (plain - hooks.run_with_hooks(row(), hooks=[("relu", zero(index=(..., unit)))])).sum() for unit in range(6)
    ]
    wanted = (m.relu(m.fc1(row())) * m.fc2.weight.sum(0)).sum(0)
    assert torch.allclose(torch.stack(effects), wanted, atol=1e-5)


@behaviour(CAPTUM, "nothing is left on the model after an attribution")
def _():
    m = mlp()
    HookManager(m).run_with_cache(row(), gradients=lambda out: out.sum())
    assert not any(mod._forward_hooks or mod._backward_hooks for mod in m.modules())
    assert all(p.grad is None for p in m.parameters())


@behaviour(CAPTUM, "a layer that gives a tuple")
def _():
    m = nn.Sequential()
    m.add_module("lstm", nn.LSTM(4, 3))

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x):
            return self.lstm(x)[0]

    _, cache = HookManager(Uses()).run_with_cache(x(), points="lstm", gradients=lambda out: out.sum())
    assert cache.gradients["lstm", "0"].shape == (2, 5, 3)


@behaviour(CAPTUM, "several layers in one pass")
def _():
    _, cache = HookManager(mlp()).run_with_cache(row(), points=["fc1", "fc2"], gradients=lambda out: out.sum())
    assert list(cache.gradients) == ["fc1:output", "fc2:output"]


@behaviour(CAPTUM, "noise on the input, averaged over draws")
def _():
    m = mlp()
    hooks = HookManager(m)
    draws = [hooks.run_with_hooks(row(), hooks=[(":input", noise(0.1, seed=s))]) for s in range(8)]
    assert torch.stack(draws).std(0).gt(0).all()


@behaviour(CAPTUM, "a frozen model gives its layers' gradients all the same")
def _():
    m = mlp().requires_grad_(False)
    _, cache = HookManager(m).run_with_cache(row(), points="fc1", gradients=lambda out: out.sum())
    assert cache.gradients["fc1"].any()


@behaviour(CAPTUM, "attribution under torch.no_grad around it")
def _():
    m = mlp()
    with torch.no_grad():
        _, cache = HookManager(m).run_with_cache(row(), points="fc1", gradients=lambda out: out.sum())
    assert cache.gradients["fc1"].any()


_ = (ids, net)
