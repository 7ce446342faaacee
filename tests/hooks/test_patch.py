"""Interventions ready-made, and sweeps of them."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.errors import ConfigError, HookError, MissingExtraError
from gradwatch.hooks import HookManager, add, mean, noise, patch, scale, zero


class Probe(nn.Module):
    """Its child returns what it is given."""

    def __init__(self):
        super().__init__()
        self.at = nn.Identity()

    def forward(self, x):
        return self.at(x) * 1


def changed(x, fn):
    return HookManager(Probe()).run_with_hooks(x, hooks=[("at", fn)])


@pytest.fixture
def tensor():
    return torch.arange(2 * 3 * 8, dtype=torch.float32).reshape(2, 3, 8) + 1


def test_zero_at_positions_heads_and_an_index(tensor):
    assert not changed(tensor, zero()).any()
    out = changed(tensor, zero(positions=[0, 2]))
    assert not out[:, [0, 2]].any()
    assert torch.equal(out[:, 1], tensor[:, 1])
    out = changed(tensor, zero(positions=-1))
    assert not out[:, 2].any()
    out = changed(tensor, zero(heads=1, num_heads=4)).unflatten(-1, (4, 2))
    assert not out[:, :, 1].any()
    assert out[:, :, [0, 2, 3]].all()
    out = changed(tensor, zero(heads=[0, 3], positions=[1, 2], num_heads=4)).unflatten(-1, (4, 2))
    assert not out[:, 1:][:, :, [0, 3]].any()
    assert out[:, 0].all()
    assert out[:, 1:][:, :, [1, 2]].all()
    out = changed(tensor, zero(index=(0, slice(None), 5)))
    assert not out[0, :, 5].any()
    assert out[1].all()


def test_scale_add_mean_patch(tensor):
    assert torch.equal(changed(tensor, scale(0.5)), tensor / 2)
    assert torch.equal(changed(tensor, scale(0.5, positions=1))[:, 1], tensor[:, 1] / 2)
    steering = torch.randn(8)
    assert torch.equal(changed(tensor, add(steering, factor=2.0)), tensor + 2 * steering)
    assert torch.equal(changed(tensor, add(1.0)), tensor + 1)
    assert torch.allclose(changed(tensor, mean()), tensor.mean(0, keepdim=True).expand_as(tensor))
    assert torch.allclose(changed(tensor, mean(dims=(0, 1), positions=slice(0, 2)))[0, 0], tensor[:, :2].mean((0, 1)))
    other = torch.randn_like(tensor)
    assert torch.equal(changed(tensor, patch(other)), other)
    out = changed(tensor, patch(other, positions=1))
    assert torch.equal(out[:, 1], other[:, 1])
    assert torch.equal(out[:, 0], tensor[:, 0])
    assert torch.equal(changed(tensor, patch({"at:output": other})), other)
    assert torch.equal(changed(tensor, patch(lambda point: other * 0 + point.step)), other * 0)
    assert torch.equal(changed(tensor, mean(other)), other.mean(0, keepdim=True).expand_as(other))
    assert torch.equal(changed(tensor, patch(3.0)), torch.full_like(tensor, 3.0))


def test_noise_draws_from_a_generator_of_its_own_and_alike_for_alike(tensor):
    state = torch.random.get_rng_state()
    first = changed(tensor, noise(0.1, seed=1))
    assert torch.equal(first, changed(tensor, noise(0.1, seed=1)))
    assert not torch.equal(first, changed(tensor, noise(0.1, seed=2)))
    assert torch.equal(torch.random.get_rng_state(), state)
    spread = (changed(torch.zeros(1000, 10), noise(0.5))).std()
    assert abs(spread - 0.5) < 0.02
    assert (changed(tensor, noise(0.0, relative=True)) == tensor).all()
    with pytest.raises(ConfigError, match=r"`std` is a number from 0 up. Got nan"):
        noise(float("nan"))


def test_noise_is_the_same_when_checkpointing_recomputes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(lambda x: self.b(self.a(x)).tanh(), x, use_reentrant=False)

    model = Model()
    hooks = HookManager(model)
    hooks.add("a", noise(1.0))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    found = model.b.weight.grad.clone()
    model.zero_grad()
    hooks.step = 0
    plain = model.b(model.a(x)).tanh()
    plain.sum().backward()
    assert torch.allclose(found, model.b.weight.grad)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        pytest.param(lambda: zero(positions=7), "there is no position 7: there are 3", id="position"),
        pytest.param(lambda: zero(heads=4, num_heads=4), "there is no head 4: there are 4", id="head"),
        pytest.param(lambda: zero(heads=0, num_heads=3), "does not split into 3 heads", id="split"),
    ],
)
def test_places_that_are_not_there_are_errors(tensor, fn, message):
    with pytest.raises(HookError, match=message):
        changed(tensor, fn())
    with pytest.raises(ConfigError, match="not both"):
        zero(positions=1, index=(0,))


def test_gradients_flow_through_partial_changes(tensor):
    x = tensor.clone().requires_grad_()
    changed(x, scale(3.0, positions=1)).sum().backward()
    assert torch.equal(x.grad[:, 1], torch.full((2, 8), 3.0))
    assert torch.equal(x.grad[:, 0], torch.ones(2, 8))


def patching_setup(net, x):
    hooks = HookManager(net)
    clean, corrupted = x, x.clone()
    corrupted[:, 2] = 0
    _, cache = hooks.run_with_cache(clean)
    return hooks, cache, corrupted


def test_sweep_finds_the_position_that_differs(net, x, capsys):
    hooks, cache, corrupted = patching_setup(net, x)
    wanted = float(cache["head:output"].sum())
    found = hooks.sweep("blocks.?:output", range(5), lambda out: out.sum(), inputs=corrupted, source=cache)
    assert found.values.shape == (6, 5)
    assert found.points[3] == "blocks.3:output"
    assert np.allclose(found.values[:, 2], wanted, rtol=1e-4)  # the net treats positions apart
    assert np.allclose(found.values[:, 0], found.baseline)
    assert np.allclose(found.normalised(wanted)[:, 2], 1, atol=1e-3)
    assert "6/6" in capsys.readouterr().err
    assert len(hooks) == 0


def test_sweep_ablates_heads(net, x):
    hooks = HookManager(net)
    found = hooks.sweep(
        "blocks.?.attn:output",
        heads=[0, 1],
        metric=lambda out: out.abs().mean(),
        inputs=(x,),
        intervention=lambda heads: zero(heads=heads, num_heads=2),
        progress=False,
    )
    assert (found.values.shape, found.axis) == ((6, 2), "head")
    with pytest.raises(ConfigError, match="runs over `positions` or over `heads`"):
        hooks.sweep("head", metric=len, inputs=x, source={})
    with pytest.raises(ConfigError, match="needs a `source`"):
        hooks.sweep("head", [0], len, inputs=x)


def test_sweep_draws_a_heatmap(net, x, tmp_path):
    hooks, cache, corrupted = patching_setup(net, x)
    found = hooks.sweep("blocks.?:output", [1, 2], lambda o: o.sum(), inputs=corrupted, source=cache, progress=False)
    found.plot(tmp_path / "a.png", title="restored", place_labels=["one", "two"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_without_matplotlib_names_the_extra(net, x, monkeypatch):
    hooks, cache, corrupted = patching_setup(net, x)
    found = hooks.sweep("blocks.0", [1], lambda o: o.sum(), inputs=corrupted, source=cache, progress=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradwatch\[plots\]'"):
        found.plot()


@pytest.mark.parametrize(
    "mask",
    [[True, False, True], torch.tensor([True, False, True]), np.array([True, False, True])],
    ids=["list", "tensor", "array"],
)
def test_a_mask_means_the_positions_where_it_is_true(mask):
    x = torch.ones(2, 3, 4)
    out = HookManager(nn.Identity()).run_with_hooks(x, hooks=[("", zero(positions=mask))])
    assert [bool(out[:, i].any()) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("positions", [[], [False, False], 1.5, [1.5], "3", True])
@pytest.mark.parametrize("which", ["positions", "heads"])
def test_positions_and_heads_that_are_none_or_no_numbers_are_refused(which, positions):
    with pytest.raises(ConfigError, match=f"`{which}` (names none|is a number)"):
        zero(**{which: positions})
