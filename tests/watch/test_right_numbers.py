"""Norms as the optimizer will use them: against float64 references."""

import math

import pytest
import torch
from torch import Tensor, nn

from gradwatch import Watch


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def reference(params: list[tuple[str, Tensor]], scale: float = 1.0) -> dict[str, float]:
    return {n: float(torch.linalg.vector_norm(p.grad.double())) / scale for n, p in params if p.grad is not None}


def assert_norms(watch_record, expected: dict[str, float], rtol: float = 1e-5) -> None:
    for path, norm in expected.items():
        assert watch_record["grad_norm", path] == pytest.approx(norm, rel=rtol)
    total = math.sqrt(sum(v * v for v in expected.values()))
    assert watch_record.global_norm == pytest.approx(total, rel=rtol)


def test_norms_equal_a_float64_reference_under_accumulation() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with Watch(model, optimizer, on_error="raise") as watch:
        for _ in range(3):
            for _ in range(4):
                (model(torch.randn(8, 6)).square().mean() / 4).backward()
            expected = reference(list(model.named_parameters()))
            record = watch.step().record
            optimizer.zero_grad()
            assert_norms(record, expected)


def test_norms_are_unscaled_under_a_loss_scaler() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with Watch(model, optimizer, scaler=scaler, on_error="raise") as watch:
        for _ in range(2):
            loss = model(torch.randn(8, 6)).square().mean()
            scaler.scale(loss).backward()
            expected = reference(list(model.named_parameters()), scale=65536.0)
            record = watch.step(loss=loss).record
            optimizer.zero_grad()
            assert_norms(record, expected)
            assert record.scalars["grad_scale"] == 65536.0
            assert record.scalars["amp_overflow"] == 0.0


def test_an_overflow_under_a_loss_scaler_is_no_fault() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Watch(model, optimizer, scaler=scaler, rules="autoclip", on_error="raise") as watch:
        for i in range(6):
            loss = model(torch.randn(8, 6)).square().mean()
            scaler.scale(loss * (math.inf if i == 2 else 1.0)).backward()
            before = [p.detach().clone() for p in model.parameters()]
            record = watch.step(loss=loss).record
            optimizer.zero_grad()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (i != 2)
            assert record.skipped == (i == 2)
    assert scaler.get_scale() == 512.0
    assert [i.rule for i in watch.incidents] == []
    assert watch.history[-1].scalars["num_overflows"] == 1.0


def test_tied_weights_count_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["tokens"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, on_error="raise") as watch:
        model["head"](model["tokens"](torch.arange(10))).square().sum().backward()
        expected = reference(list(model.named_parameters()))
        assert_norms(watch.step().record, expected)
    assert len(expected) == 1


def test_half_precision_gradients_whose_own_norm_overflows_are_measured() -> None:
    model = nn.Linear(1000, 1000, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, on_error="raise") as watch:
        model.weight.grad = torch.full_like(model.weight, 100.0)
        record = watch.step().record
    assert record["grad_norm", "weight"] == pytest.approx(1e5, rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e25, 1e30])
def test_gradients_far_from_one_are_measured(size: float) -> None:
    model = nn.Linear(50, 40, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, on_error="raise") as watch:
        model.weight.grad = torch.randn(40, 50).mul_(size)
        expected = float(torch.linalg.vector_norm(model.weight.grad.double()))
        record = watch.step().record
    assert record["grad_norm", "weight"] == pytest.approx(expected, rel=1e-5)
    assert record.global_norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_tensor_of_1e8_elements_is_measured_to_1e_5() -> None:
    model = nn.ParameterDict({"big": torch.zeros(100_000_000)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Watch(model, optimizer, on_error="raise", updates_every=None, histograms_every=None) as watch:
        model["big"].grad = torch.full((100_000_000,), 0.1)
        record = watch.step().record
    assert record.global_norm == pytest.approx(float(torch.tensor(0.1)) * 1e4, rel=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_update_ratio_is_that_of_the_step_itself_for_any_optimizer(make) -> None:
    model = small_model()
    optimizer = make(model.parameters(), lr=0.01)
    with Watch(model, optimizer, updates_every=1, on_error="raise") as watch:
        for step in range(3):
            before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
            optimizer.zero_grad()
            record = watch.history[step]
            assert record.step == step
            for n, p in model.named_parameters():
                expected = float((p.detach().double() - before[n]).norm() / before[n].norm())
                assert record["update_ratio", n] == pytest.approx(expected, rel=1e-4)


def test_frozen_and_gradless_parameters_are_masked_not_zero() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Watch(model, optimizer, on_error="raise") as watch:
        model(torch.randn(8, 6)).square().mean().backward()
        model[4].bias.grad = None
        record = watch.step().record
    with pytest.raises(KeyError, match="not measured"):
        record["grad_norm", "0.weight"]
    with pytest.raises(KeyError, match="not measured"):
        record["grad_norm", "4.bias"]
    assert record["grad_norm", "4.weight"] > 0


def test_activation_and_grad_output_columns_equal_references() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(32, 6)
    with Watch(model, optimizer, activations_every=1, on_error="raise") as watch:
        hidden = model[0](x)
        hidden.retain_grad()
        out = model[4](model[3](model[2](model[1](hidden.clone()))))
        out.square().mean().backward()
        record = watch.step().record
    assert record["output_rms", "0"] == pytest.approx(float(hidden.detach().double().square().mean().sqrt()), rel=1e-5)
    assert record["grad_output_norm", "0"] == pytest.approx(float(hidden.grad.double().norm()), rel=1e-5)
    assert record["output_zero_fraction", "1"] == pytest.approx(float((hidden <= 0).double().mean()), rel=1e-6)


def test_unfreezing_adding_and_replacing_parameters_in_mid_run_is_followed() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Watch(model, optimizer, on_error="raise") as watch:

        def step():
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            expected = reference([(n, p) for n, p in model.named_parameters() if p.requires_grad])
            assert_norms(watch.step().record, expected)

        step()
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
        step()
        old = model[4].weight
        model[4].weight = nn.Parameter(torch.randn(3, 16))
        for group in optimizer.param_groups:
            group["params"] = [model[4].weight if p is old else p for p in group["params"]]
        step()
        assert watch.history[-1]["grad_norm", "0.weight"] > 0


def test_update_ratios_of_optimizers_that_step_together_are_all_measured() -> None:
    model = small_model()
    optimizers = [torch.optim.Adam(model[i].parameters(), lr=0.01) for i in (0, 2, 4)]
    with Watch(model, optimizers, updates_every=1, on_error="raise") as watch:
        for _ in range(3):
            model(torch.randn(8, 6)).square().mean().backward()
            watch.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        for record in watch.history:
            assert all(record["update_norm", path] > 0 for path, _ in model.named_parameters())


def test_grad_output_of_a_linear_on_sequences_survives_an_in_place_activation() -> None:
    # The output is a view there: a later in-place operation drops plain tensor hooks on it.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))
    twin = nn.Sequential(model[0], nn.ReLU(), model[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(4, 5, 6)
    norms = []
    for net in (model, twin):
        with Watch(net, optimizer, activations_every=1, on_error="raise") as watch:
            net(x).square().mean().backward()
            norms.append(watch.step().record["grad_output_norm", "0"])
        optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0
