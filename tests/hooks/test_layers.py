"""Runs over a part of the layers, and caches of a part of the positions."""

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, HookNeverFired
from gradwatch.hooks import HookManager, zero

transformers = pytest.importorskip("transformers")

from ._families import family, inputs  # noqa: E402

TOKENS = torch.tensor([[3, 5, 4, 9, 7, 6]])
PROMPT = torch.tensor([[3, 5, 4, 9, 7, 6], [11, 5, 13, 4, 8, 10]])


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    return family(request.param, "sdpa")


def test_a_run_ends_before_a_layer_and_goes_on_from_there(model):
    hooks = HookManager(model)
    whole, cache = hooks.run_with_cache(PROMPT)
    for layer, name in ((0, ("resid_pre", 0)), (1, ("resid_pre", 1)), (2, ("resid_post", 1)), (-1, ("resid_pre", 1))):
        residual, kept = hooks.run_with_cache(PROMPT, stop_at_layer=layer)
        assert torch.equal(residual, cache[name])
        assert "blocks.1.hook_resid_post" not in kept or layer == 2
        assert torch.equal(hooks.run_with_hooks(PROMPT, stop_at_layer=layer), residual)
    for layer in (0, 1):
        output, kept = hooks.run_with_cache(cache["resid_pre", layer], start_at_layer=layer)
        assert torch.equal(output.logits, whole.logits)
        assert ("blocks.0.hook_resid_post" in kept) == (layer == 0)
        assert torch.equal(kept["resid_pre", 1], cache["resid_pre", 1])
    residual = hooks.run_with_hooks(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2)
    assert torch.equal(residual, cache["resid_post", 1])


def test_a_change_of_the_residual_goes_through_the_layers_that_are_run(model):
    hooks = HookManager(model)
    _, cache = hooks.run_with_cache(PROMPT)
    other = torch.randn_like(cache["resid_pre", 1])
    wanted = hooks.run_with_hooks(PROMPT, hooks=[("blocks.1.hook_resid_pre", lambda t, p: other)]).logits
    assert torch.equal(hooks.run_with_hooks(other, start_at_layer=1).logits, wanted)
    with pytest.raises(ConfigError, match=r"the run starts after 'blocks.0.hook_mlp_out'"):
        hooks.run_with_hooks(other, start_at_layer=1, hooks=[("blocks.0.hook_mlp_out", zero())])
    with pytest.raises(ConfigError, match="takes the residual stream there as its first argument"):
        hooks.run_with_hooks(PROMPT, start_at_layer=1)
    with pytest.raises(ConfigError, match=r"`stop_at_layer` is a number of layers from 0 to 2. Got 3"):
        hooks.run_with_hooks(PROMPT, stop_at_layer=3)


def test_a_stack_that_takes_states_starts_with_them():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    hooks = HookManager(stack)
    whole, cache = hooks.run_with_cache(x)
    assert torch.equal(hooks.run_with_hooks(cache["layers.1:output"], start_at_layer=2), whole)


def test_a_cache_of_some_positions_is_that_part_of_the_whole(model):
    hooks = HookManager(model)
    loss = lambda out: out.logits.square().mean()  # noqa: E731
    names = ["*.hook_resid_pre", "*.attn.hook_pattern", "*.attn.hook_q"]
    _, whole = hooks.run_with_cache(PROMPT, points=names, gradients=loss)
    for part in (slice(-2, None), [1, 4], 3):
        _, kept = hooks.run_with_cache(PROMPT, points=names, gradients=loss, pos_slice=part)
        assert torch.equal(kept["resid_pre", 1], whole["resid_pre", 1][:, part])
        assert torch.equal(kept["pattern", 1], whole["pattern", 1][:, :, part])
        assert torch.equal(kept["q", 1], whole["q", 1][:, part])
        name = "blocks.1.hook_resid_pre"
        assert torch.equal(kept.gradients[name], whole.gradients[name][:, part])


def test_a_batch_of_one_may_be_kept_without_its_dimension(model):
    hooks = HookManager(model)
    names = ["*.hook_resid_pre", "*.attn.hook_pattern", "*.attn.hook_z"]
    _, whole = hooks.run_with_cache(TOKENS, points=names)
    _, kept = hooks.run_with_cache(TOKENS, points=names, remove_batch_dim=True)
    for name in ("resid_pre", "pattern", "z"):
        assert torch.equal(kept[name, 1], whole[name, 1][0])
    with pytest.raises(ConfigError, match="`remove_batch_dim` is for batches of one"):
        hooks.run_with_cache(PROMPT, points=names, remove_batch_dim=True)


def test_steering_that_reaches_no_token_is_an_error(model):
    hooks = HookManager(model)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(HookNeverFired, match="no token that was computed is among 40"):
        hooks.generate(PROMPT, hooks=[("layer 0", zero(), 40)], **options)
    hooks.generate(PROMPT, hooks=[("layer 0", zero(), 40)], missing="ignore", **options)
    assert not hooks.hooks
    assert set(inputs("llama")) == {"input_ids"}
