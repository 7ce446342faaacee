"""The usual examples of TransformerLens, mi-crow, hook managers and bare torch hooks, written with our interface."""

import pytest
import torch

from gradwatch.errors import GradwatchWarning, HookError
from gradwatch.hooks import HookManager, add, patch, scale, zero

from .conftest import num_torch_hooks


@pytest.fixture
def hooks(net):
    with HookManager(net) as manager:
        yield manager
    assert num_torch_hooks(net) == 0


def test_collect_activations_in_a_dict(net, x, hooks):
    activations = {}
    hooks.observe("blocks.*.mlp", lambda tensor, point: activations.update({point.name: tensor.detach()}))
    net(x)
    assert list(activations) == [f"blocks.{i}.mlp:output" for i in range(6)]


def test_or_simply(net, x, hooks):
    _, activations = hooks.run_with_cache(x, points="blocks.*.mlp")
    assert dict(activations).keys() == {f"blocks.{i}.mlp:output" for i in range(6)}


def test_double_an_input(net, x, hooks):
    hooks.add("embed:input", lambda tensor, point: tensor * 2)
    doubled = net(x)
    hooks.disable()
    assert torch.equal(doubled, net(x * 2))


def test_add_one_to_an_output(net, x, hooks):
    plain = net(x)
    hooks.add("head:output", lambda tensor, point: tensor + 1)
    assert torch.equal(net(x), plain + 1)
    assert torch.allclose(hooks.run_with_hooks(x, hooks=[("head", add(1.0))]), plain + 2)


def test_zero_the_gradient(net, x, hooks):
    hooks.add("blocks.3:grad_output", lambda grad, point: torch.zeros_like(grad))
    net(x).sum().backward()
    assert not net.blocks[3].attn.weight.grad.any()
    assert not net.embed.weight.grad.any()
    assert net.blocks[4].attn.weight.grad.any()


def test_zero_the_gradient_of_one_parameter(net, x, hooks):
    hooks.add("embed.weight:grad", zero())
    net(x).sum().backward()
    assert not net.embed.weight.grad.any()
    assert net.embed.bias.grad.any()


def test_ablate_a_head(net, x, hooks):
    seen = {}
    with hooks.temporary(("blocks.2.attn", zero(heads=1, num_heads=4))):
        hooks.observe("blocks.2.attn", lambda t, p: seen.update(out=t.clone()))
        net(x)
    assert not seen["out"][..., 2:4].any()
    assert seen["out"][..., :2].any()


def test_scale_a_gradient_by_a_tenth(net, x, hooks):
    net(x).sum().backward()
    before = net.embed.weight.grad.clone()
    net.zero_grad()
    hooks.add("embed:grad_output", scale(0.1))
    net(x).sum().backward()
    assert torch.allclose(net.embed.weight.grad, before * 0.1)


def test_patch_the_residual_stream(net, x, hooks):
    clean, cache = hooks.run_with_cache(x)
    other = torch.randn_like(x)
    patched = hooks.run_with_hooks(other, hooks=[("layer 2", patch(cache))])
    assert torch.equal(patched, clean)
    at_one_position = hooks.run_with_hooks(other, hooks=[("layer 2", patch(cache, positions=3))])
    assert torch.allclose(at_one_position[:, 3], clean[:, 3], atol=1e-6)
    assert torch.allclose(at_one_position[:, 0], net(other)[:, 0], atol=1e-6)


def test_capture_input_and_output_of_layer_4_with_a_limit(net, x, hooks):
    captured = hooks.capture("layer 4", inputs=True, outputs=True, max_states=2)
    for _ in range(3):
        net(x)
    assert len(captured) == 2
    assert torch.equal(net.blocks[4](captured[-1].input), captured[-1].output)


def test_enable_and_disable_for_an_a_b_test(net, x, hooks):
    hook = hooks.add("blocks.1", zero())
    with_hook = net(x)
    with hook.disabled():
        without = net(x)
    assert not torch.equal(with_hook, without)
    assert torch.equal(net(x), with_hook)


def test_handle_a_failing_hook(net, x, hooks):
    plain = net(x)

    def broken(tensor, point):
        raise KeyError(point.name)

    hook = hooks.add("head", broken)
    with pytest.raises(HookError) as caught:
        net(x)
    assert caught.value.hook_id == hook.id
    assert isinstance(caught.value.__cause__, KeyError)
    hook.remove()
    hooks.add("head", broken, on_error="disable")
    with pytest.warns(GradwatchWarning, match="the hook was disabled"):
        assert torch.equal(net(x), plain)


def test_a_steering_vector_from_two_prompts(net, x, hooks):
    _, one = hooks.run_with_cache(x)
    _, two = hooks.run_with_cache(-x)
    vector = (one["blocks.2:output"] - two["blocks.2:output"]).mean((0, 1))
    steered = hooks.run_with_hooks(x, hooks=[("blocks.2", add(vector, factor=3.0))])
    assert not torch.equal(steered, net(x))


def test_gradient_times_activation(net, x, hooks):
    _, cache = hooks.run_with_cache(x, points="blocks.?", gradients=lambda out: out[..., 0].sum())
    attribution = (cache.stack("blocks.?") * cache.gradients.stack("blocks.?")).sum(-1)
    assert attribution.shape == (6, 2, 5)
