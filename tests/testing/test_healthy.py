"""`assert_healthy` passes what trains and fails, in words, what does not."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from gradwatch.errors import ConfigError
from gradwatch.testing import assert_healthy

LOSS = nn.CrossEntropyLoss()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    return torch.randn(4, 8, generator=generator)[y] + 0.3 * torch.randn(32, 8, generator=generator), y


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_sound_model_passes(net, batch):
    assert assert_healthy(net, batch, LOSS, Adam(net.parameters(), 1e-2)).ok


def test_sound_model_passes_without_an_optimizer(net, batch):
    assert assert_healthy(net, batch, LOSS).ok


def test_fixture_is_the_function(gradwatch_healthy, net, batch):
    assert gradwatch_healthy(net, batch, LOSS, SGD(net.parameters(), 0.1)).ok


def test_missing_parameters_fail_with_cause_and_advice(net, batch):
    with pytest.raises(AssertionError) as raised:
        assert_healthy(net, batch, LOSS, SGD(net[2].parameters(), 0.1))
    assert str(raised.value) == (
        "Sequential is not healthy:\n"
        "[warning] not_in_optimizer at 0.weight: 2 of 4 parameters that get a gradient are in no optimizer: "
        "0.weight, 0.bias\n"
        "    cause: the optimizer was made before the model was replaced, copied or extended; or from a part of it\n"
        "    try: make the optimizer from model.parameters() last; freeze what shall not train"
    )


def test_dead_layer_fails(net, batch):
    nn.init.constant_(net[0].bias, -100.0)
    with pytest.raises(
        AssertionError, match=r"\[critical\] dead at 2\.weight: 2 of 4 parameters have a gradient of exactly 0"
    ):
        assert_healthy(net, batch, LOSS, SGD(net.parameters(), 0.1))


def test_frozen_model_fails(net, batch):
    with pytest.raises(AssertionError, match="nothing_trainable"):
        assert_healthy(net.requires_grad_(False), batch, LOSS)


def test_loss_that_leaves_the_numbers_after_some_steps_fails(net, batch):
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return LOSS(outputs, targets) * (float("nan") if len(calls) > 40 else 1.0)

    with pytest.raises(AssertionError, match="non_finite"):
        assert_healthy(net, batch, loss, SGD(net.parameters(), 0.1), steps=40)


def test_updates_that_round_to_nothing_fail(net, batch):
    with pytest.raises(AssertionError, match="not_updating"):
        assert_healthy(net, batch, LOSS, SGD(net.parameters(), 1e-30))


def test_what_is_ignored_does_not_fail(net, batch):
    scaled = (batch[0] * 100, batch[1])
    with pytest.raises(AssertionError, match="unnormalised_input"):
        assert_healthy(net, scaled, LOSS, SGD(net.parameters(), 1e-6), ignore=["bad_initial_loss"])
    assert_healthy(net, scaled, LOSS, SGD(net.parameters(), 1e-6), ignore=["unnormalised_input", "bad_initial_loss"])


def test_model_optimizer_and_random_state_stay_as_they_were(net, batch):
    optimizer = Adam(net.parameters(), 1e-2)
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert_healthy(net, batch, LOSS, optimizer)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not optimizer.state
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_steps_below_zero_are_an_error(net, batch):
    with pytest.raises(ConfigError) as raised:
        assert_healthy(net, batch, LOSS, steps=-1)
    assert str(raised.value) == "`steps` must be 0 or more. Got -1."


def test_plugin_imports_no_torch():
    code = "import sys, gradwatch.testing.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
