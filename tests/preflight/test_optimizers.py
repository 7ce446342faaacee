"""What is said of optimizers and of parameters that take no part."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from gradwatch._preflight import preflight

LOSS = nn.CrossEntropyLoss()


def checks(report, severity=None):
    return {f.check for f in report if severity in (None, f.severity)}


def test_optimizer_of_a_copied_model_is_found(net, images):
    report = preflight(net, images, LOSS, SGD(copy.deepcopy(net).parameters(), 0.1))
    (finding,) = [f for f in report.alarms if f.check == "not_in_optimizer"]
    assert finding.severity == "critical"
    assert finding.message == (
        "4 of 4 parameters that get a gradient are in no optimizer, which holds 4 that are not the model's"
    )


def test_layer_left_out_of_the_optimizer_is_named(net, images):
    report = preflight(net, images, LOSS, SGD(net[2].parameters(), 0.1))
    (finding,) = [f for f in report.alarms if f.check == "not_in_optimizer"]
    assert (finding.path, finding.severity) == ("0.weight", "warning")


def test_frozen_layers_outside_the_optimizer_are_well(net, images):
    net[0].requires_grad_(False)
    assert preflight(net, images, LOSS, Adam(net[2].parameters(), 1e-2)).ok


def test_parameter_in_two_optimizers_is_found(net, images):
    both = [SGD(net.parameters(), 0.1), SGD(net[2].parameters(), 0.1)]
    (finding,) = [f for f in preflight(net, images, LOSS, both) if f.check == "twice_in_optimizer"]
    assert finding.path == "2.bias"


def test_zero_learning_rate_is_found(net, images):
    assert "zero_learning_rate" in checks(preflight(net, images, LOSS, SGD(net.parameters(), 0.0)), "warning")


def test_zero_learning_rate_of_a_warm_up_is_a_remark(net, images):
    optimizer = SGD(net.parameters(), 0.1)
    LambdaLR(optimizer, lambda step: step / 100)
    report = preflight(net, images, LOSS, optimizer)
    assert report.ok
    assert "zero_learning_rate" in checks(report, "info")


def test_head_that_takes_no_part_is_a_remark(net, images):
    net.add_module("unused", nn.Identity())
    net.unused.extra = nn.Linear(4, 2)
    net.unused.forward = lambda x: x
    report = preflight(net, images, LOSS, Adam(net.parameters(), 1e-2))
    assert report.ok
    assert "unused" in checks(report, "info")


def test_branches_that_begin_at_zero_are_not_dead(images):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.zeros_(self.second.weight)

        def forward(self, x):
            return x + self.second(self.first(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual(), nn.Linear(8, 4))
    assert preflight(model, images, LOSS, Adam(model.parameters(), 1e-2)).ok
    assert not model[0].second.weight.any()


def test_dead_layer_is_found_behind_a_bias_far_below_zero(net, images):
    nn.init.constant_(net[0].bias, -100.0)
    report = preflight(net, images, LOSS, SGD(net.parameters(), 0.1))
    assert {"dead", "dead_units"} <= checks(report)


@pytest.mark.parametrize("steps", [0, 5])
def test_overfit_can_be_shortened_or_left_out(steps, net, images):
    report = preflight(net, images, LOSS, SGD(net.parameters(), 0.1), overfit_steps=steps)
    assert ("loss_after_overfit" in report.measures) == bool(steps)
