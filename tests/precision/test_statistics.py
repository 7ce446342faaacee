"""Shares on record are those that a cast would lose."""

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.precision import ActivationFormats, GradientFormats, cast_loss
from gradwatch.testing import check_statistic


@pytest.mark.parametrize("statistic", [ActivationFormats(), GradientFormats()])
def test_the_laws_of_statistics_hold(statistic):
    check_statistic(statistic)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(40, 24)

    def forward(self, x):
        return self.layer(x)


def trained(statistic, scale):
    torch.manual_seed(0)
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    outputs, grads = [], []
    model.layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    spread = torch.exp2(-torch.arange(40) * 0.7)
    with Watch(model, optimizer, rules="observe", statistics=[statistic]) as watch:
        for _ in range(2):
            loss = (model(torch.randn(16, 40) * spread) * scale).square().mean()
            loss.backward()
            grads.append(model.layer.weight.grad.clone())
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch, outputs, grads


def test_lost_activations_are_those_of_a_cast():
    watch, outputs, _ = trained(ActivationFormats(), 1.0)
    for step, output in enumerate(outputs):
        for name in ("float16", "float8_e4m3", "float8_e5m2"):
            found = watch.history[step][f"activation_lost_{name}", "layer"]
            assert found == pytest.approx(cast_loss(output, name).underflow_share, abs=1e-9)


def test_lost_gradients_and_their_error_are_those_of_a_cast():
    watch, _, grads = trained(GradientFormats(), 1e-3)
    for step, grad in enumerate(grads):
        for name in ("mxfp8_e4m3", "mxfp4"):
            loss, record = cast_loss(grad, name), watch.history[step]
            assert record[f"grad_lost_{name}", "layer.weight"] == pytest.approx(loss.underflow_share)
            assert record[f"grad_error_{name}", "layer.weight"] == pytest.approx(loss.relative_error)
        assert cast_loss(grad, "mxfp4").underflow_share > cast_loss(grad, "mxfp8_e4m3").underflow_share > 0
