"""The largest curvature is that of the Hessian written out, and measuring it leaves no trace."""

import math

import pytest
import torch
from torch import nn

from gradwatch import ConfigError, Watch
from gradwatch.ahead import sharpness


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 2))

    def forward(self, x):
        return self.body(x)


def loss_of(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


@pytest.fixture
def batch():
    made = torch.Generator().manual_seed(0)
    return torch.randn(30, 5, generator=made), torch.randint(0, 2, (30,), generator=made)


def hessian(model, batch):
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat):
        parts = {n: v.view_as(p) for (n, p), v in zip(named.items(), flat.split(sizes), strict=True)}
        x, y = batch
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return torch.autograd.functional.hessian(loss, flat)


def test_it_is_the_eigenvalue_of_largest_magnitude(batch):
    torch.manual_seed(1)
    model = Net().eval().double()
    batch = (batch[0].double(), batch[1])
    values = torch.linalg.eigvalsh(hessian(model, batch))
    found = sharpness(model, loss_of, batch, iterations=500, tolerance=1e-9)
    assert found.value == pytest.approx(float(values[values.abs().argmax()]), rel=1e-4)
    assert math.isnan(found.limit)


def test_under_adam_it_is_that_of_the_preconditioned_hessian(batch):
    torch.manual_seed(1)
    model = Net().eval().double()
    batch = (batch[0].double(), batch[1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
    root = ((moments / (1 - 0.99**3)).sqrt() + 1e-8).rsqrt()
    values = torch.linalg.eigvalsh(root[:, None] * hessian(model, batch) * root)
    found = sharpness(model, loss_of, batch, optimizer=optimizer, iterations=2000, tolerance=1e-10)
    assert found.value == pytest.approx(float(values[values.abs().argmax()]), rel=1e-3)
    assert found.limit == pytest.approx(38 / 1e-3)
    assert found.share == found.value / found.limit


def test_the_model_its_gradients_and_the_random_state_stay_as_they_were(batch):
    torch.manual_seed(1)
    model = Net()
    loss_of(model, batch).backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    sharpness(model, loss_of, batch, iterations=3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_descent_diverges_above_the_limit_and_not_below():
    curvature = 4.0
    for momentum in (0.0, 0.9):
        for share in (0.9, 1.1):
            model = nn.Linear(1, 1, bias=False)
            nn.init.constant_(model.weight, 1.0)
            rate = share * 2 * (1 + momentum) / curvature
            optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum)

            def loss_fn(model, batch):
                return curvature / 2 * model.weight.square().sum()

            assert sharpness(model, loss_fn, None, optimizer=optimizer).share == pytest.approx(share)
            for _ in range(300):
                optimizer.zero_grad()
                loss_fn(model, None).backward()
                optimizer.step()
            assert (not model.weight.abs().item() <= 1) == (share > 1)


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    found = sharpness(layer, lambda model, x: model(x).square().mean() + model(x).sum() * 0.1, x, iterations=3)
    assert math.isfinite(found.value)


def test_it_goes_on_record_and_into_rules(batch):
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e6)
    rule = {"expression": "sharpness > sharpness_limit", "name": "edge_of_stability"}
    with Watch(model, optimizer, rules=[rule]) as watch:
        watch.record(**sharpness(model, loss_of, batch, optimizer=optimizer).scalars)
        loss = loss_of(model, batch)
        loss.backward()
        watch.step(loss=loss)
    assert [i.name for i in watch.incidents] == ["edge_of_stability"]


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        pytest.param(lambda model, batch: model(batch[0]), r"Tensor of shape \(30, 2\)", id="no number"),
        pytest.param(lambda model, batch: 1.0, "float", id="no tensor"),
    ],
)
def test_a_loss_that_is_none_is_told(loss_fn, said, batch):
    with pytest.raises(ConfigError, match=said):
        sharpness(Net(), loss_fn, batch)


def test_a_model_that_is_frozen_is_told(batch):
    model = Net().requires_grad_(False)
    with pytest.raises(ConfigError, match="requires a gradient"):
        sharpness(model, loss_of, batch)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_under_rmsprop_the_hessian_is_measured_between_roots_of_its_average(momentum):
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-2, momentum=momentum, eps=1e-3)
    x = torch.randn(8, 3)
    model(x).square().mean().backward()
    optimizer.step()
    found = sharpness(model, lambda m, b: m(b).square().mean(), x, optimizer=optimizer, iterations=200, tolerance=1e-6)
    hessian = 2 * (x.T @ x).double() / 8
    root = (optimizer.state[model.weight]["square_avg"].double().sqrt() + 1e-3).rsqrt().reshape(-1)
    expected = torch.linalg.eigvalsh(root[:, None] * hessian * root).max().item()
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert found.limit == pytest.approx(2 * (1 + momentum) / 1e-2)


def test_the_limit_of_nesterovs_momentum_is_lower():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    found = sharpness(model, lambda m, b: m(b).square().mean(), torch.randn(4, 3), optimizer=optimizer)
    assert found.limit == pytest.approx(3.8 / 2.8 / 0.1)
