"""Runs with a cache, with hooks, and that end early."""

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, HookError, UnknownPathError
from gradwatch.hooks import HookManager, patch, scale

from .conftest import num_torch_hooks

ALIASES = {"blocks.{i}.hook_resid_post": "blocks.{i}:output", "blocks.{i}.hook_mlp_out": "blocks.{i}.mlp:output"}


def test_cache_holds_outputs_by_name_alias_glob_and_layer(net, x):
    hooks = HookManager(net, aliases=ALIASES)
    out, cache = hooks.run_with_cache(x)
    assert torch.equal(cache["head:output"], out)
    assert torch.equal(cache["blocks.3.hook_resid_post"], cache["blocks.3:output"])
    assert torch.equal(cache["resid_post", 3], cache["blocks.3:output"])
    assert list(cache["blocks.*.mlp:output"]) == [f"blocks.{i}.mlp:output" for i in range(6)]
    assert cache.stack("blocks.*.hook_resid_post").shape == (6, 2, 5, 8)
    assert cache.get("nothing:output", 3) == 3
    assert "head:output" in cache
    assert len(cache) == sum(1 for m in net.modules() if not isinstance(m, nn.ModuleList))
    assert num_torch_hooks(net) == 0


def test_only_what_was_asked_for_is_kept_and_the_rest_is_an_error(net, x):
    _, cache = HookManager(net).run_with_cache(x, points=["blocks.?.mlp:input", "head"])
    assert cache.names == [*(f"blocks.{i}.mlp:input" for i in range(6)), "head:output"]
    with pytest.raises(UnknownPathError, match=r"the cache has no point that matches 'embed:output' \(7 known\)"):
        cache["embed:output"]
    with pytest.raises(UnknownPathError):
        cache["embed*"]


def test_calls_of_a_reused_module_are_kept_apart():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            for _ in range(3):
                x = self.cell(x)
            return x

    model, x = Loop(), torch.randn(2, 3)
    out, cache = HookManager(model).run_with_cache(x, gradients=lambda out: out.sum())
    assert list(cache) == ["cell:output#0", "cell:output#1", "cell:output#2", ":output"]
    assert torch.equal(cache["cell:output", 2], out)
    assert torch.equal(cache["cell:output#0"], model.cell(x))
    assert len(cache.calls("cell:output")) == 3
    assert torch.equal(cache.gradients["cell:output", 2], torch.ones(2, 3))
    with pytest.raises(ConfigError, match="'cell:output' ran 3 times: ask for"):
        cache["cell:output"]


def test_nested_outputs_are_dicts_by_leaf():
    model = nn.LSTM(3, 4, batch_first=True)
    out, cache = HookManager(model).run_with_cache(torch.randn(2, 5, 3))
    assert sorted(cache[":output"]) == ["0", "1.0", "1.1"]
    assert torch.equal(cache[":output", "1.0"], out[1][0])


def test_gradients_come_beside_activations_and_parameters_are_left_alone(net, x):
    hooks = HookManager(net)
    _, cache = hooks.run_with_cache(
        x, points=["blocks.?:output", "blocks.?:input"], gradients=lambda out: out.square().sum()
    )
    assert all(p.grad is None for p in net.parameters())
    kept = []
    hooks.add("blocks.2:grad_output", lambda g, p: kept.append(g))
    net(x).square().sum().backward()
    assert torch.equal(cache.gradients["blocks.2:output"], kept[0])
    assert torch.equal(cache["blocks.2:grad_output"], kept[0])
    assert torch.equal(cache.gradients["blocks.3:input"], kept[0])


def test_gradients_of_a_frozen_model_and_before_in_place_operations(net, x):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    wanted = HookManager(model).run_with_cache(x, gradients=lambda out: out.sum())[1].gradients
    model.requires_grad_(False)
    with torch.no_grad():
        found = HookManager(model).run_with_cache(x, gradients=lambda out: out.sum())[1].gradients
    assert torch.equal(found["0:output"], wanted["0:output"])
    assert not torch.equal(found["0:output"], found["1:output"])


def test_gradients_true_needs_a_model_that_returns_its_loss(net, x):
    with pytest.raises(ConfigError, match=r"Got a tensor of shape \(2, 5, 3\)"):
        HookManager(net).run_with_cache(x, gradients=True)
    with pytest.raises(ConfigError, match="'head:grad_output' is a gradient: ask with gradients="):
        HookManager(net).run_with_cache(x, points="head:grad_output")

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"loss": self.net(x).sum()}["loss"]

    _, cache = HookManager(Loss()).run_with_cache(x, gradients=True)
    assert torch.equal(cache.gradients["net:output"], torch.ones(2, 5, 3))


def test_device_dtype_clone_and_detach(net, x):
    hooks = HookManager(net)
    _, cache = hooks.run_with_cache(x, dtype=torch.float16)
    assert cache["head:output"].dtype == torch.float16
    assert cache.to(torch.float64)["head:output"].dtype == torch.float64
    assert cache.to("meta")["head:output"].is_meta
    out, cache = hooks.run_with_cache(x, clone=False)
    assert cache["head:output"].data_ptr() == out.data_ptr()
    out, cache = hooks.run_with_cache(x, detach=False)
    assert cache["head:output"].requires_grad
    assert not hooks.run_with_cache(x)[1]["head:output"].requires_grad


def test_one_tensor_under_two_names_is_kept_once(net, x):
    _, cache = HookManager(net).run_with_cache(x, points=["blocks.0:output", "blocks.1:input"])
    assert cache["blocks.0:output"] is cache["blocks.1:input"]
    assert cache.num_bytes == 2 * 5 * 8 * 4


@pytest.mark.parametrize("stop_at", ["blocks.2:output", "layer 2", "blocks.3:input"])
def test_stop_at_ends_the_run_and_returns_what_is_there(net, x, stop_at):
    hooks = HookManager(net)
    _, full = hooks.run_with_cache(x)
    ran = []
    hooks.add("blocks.*", lambda t, p: ran.append(p.layer))
    value, cache = hooks.run_with_cache(x, stop_at=stop_at)
    assert torch.equal(value, full["blocks.2:output"])
    assert max(layer for layer in ran if layer is not None) == 2
    assert "blocks.2:output" in cache
    assert torch.equal(hooks.run_with_hooks(x, stop_at=stop_at), value)


def test_a_stop_that_is_never_reached_is_an_error(net, x):
    net.unused = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="never came to stop_at='unused'"):
        HookManager(net).run_with_hooks(x, stop_at="unused")


def test_run_with_hooks_acts_in_this_run_and_in_its_graph_only(net, x):
    hooks = HookManager(net)
    reference = net(x)
    out = hooks.run_with_hooks(x, hooks=[("head", lambda t, p: t + 1), ("head:grad_output", scale(0.1))])
    assert torch.equal(out, reference + 1)
    assert num_torch_hooks(net) == 0
    out.sum().backward()
    assert torch.allclose(net.head.bias.grad, torch.full((3,), 1.0))
    assert torch.equal(net(x), reference)


def test_closing_silences_hooks_of_run_with_hooks_too(net, x):
    with HookManager(net) as hooks:
        out = hooks.run_with_hooks(x, hooks=[("head:grad_output", scale(0.0))])
    out.sum().backward()  # closed in between
    assert net.head.bias.grad.any()


def test_run_with_hooks_refuses_parameters_since_backward_comes_later(net, x):
    with pytest.raises(ConfigError, match=r"use `with hooks.temporary"):
        HookManager(net).run_with_hooks(x, hooks=[("head.weight:grad", print)])


def test_a_run_that_fails_leaves_nothing_and_the_users_hooks_alone(net, x):
    hooks = HookManager(net)
    mine = hooks.add("head", lambda t, p: None)
    before = num_torch_hooks(net)

    def fails(t, p):
        raise RuntimeError("no")

    for run in (hooks.run_with_hooks, hooks.run_with_cache):
        with pytest.raises(HookError):
            run(x, hooks=[("blocks.1", fails)])
    with pytest.raises(RuntimeError):
        hooks.run_with_cache(torch.randn(1, 1, 9))
    assert num_torch_hooks(net) == before
    assert hooks.hooks == [mine]


def test_the_cache_holds_what_hooks_of_the_run_leave(net, x):
    hooks = HookManager(net)
    _, clean = hooks.run_with_cache(x)
    corrupted = torch.randn_like(x)
    out, cache = hooks.run_with_cache(corrupted, hooks=[("blocks.5:output", patch(clean))])
    assert torch.equal(cache["blocks.5:output"], clean["blocks.5:output"])
    assert torch.equal(out, clean[":output"])


def test_stack_of_different_shapes_says_so(net, x):
    _, cache = HookManager(net).run_with_cache(x)
    with pytest.raises(ConfigError, match="stack needs tensors of one shape"):
        cache.stack("*:output")
