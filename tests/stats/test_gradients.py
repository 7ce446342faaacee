"""The collection of gradients that treatments work on: one measurement, kept true."""

import math

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError
from gradwatch.stats import Gradients, exponent_histograms, tensor_norms


def parameters(*values: float, size: int = 4) -> list[tuple[str, nn.Parameter]]:
    named = [(f"layer{i}.weight", nn.Parameter(torch.zeros(size))) for i in range(len(values))]
    for (_, p), value in zip(named, values, strict=True):
        p.grad = torch.full((size,), value)
    return named


def test_norms_are_those_of_the_gradients_free_of_the_loss_scale() -> None:
    grads = Gradients.collect(parameters(65536.0, 131072.0), grad_scale=65536.0)
    assert grads.norms.tolist() == [2.0, 4.0]
    assert grads.global_norm.item() == pytest.approx(math.sqrt(20))
    assert grads.grads[0][0].item() == 65536.0


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_norm_of_all_keeps_what_float64_can_hold_and_its_squares_can_not(size: float) -> None:
    named = [(str(i), nn.Parameter(torch.zeros(4, dtype=torch.float64))) for i in range(4)]
    for _, p in named:
        p.grad = torch.full((4,), size, dtype=torch.float64)
    assert Gradients.collect(named).global_norm.item() == pytest.approx(4 * size, rel=1e-12)


def test_loss_scale_may_stay_on_the_device() -> None:
    grads = Gradients.collect(parameters(8.0), grad_scale=torch.tensor(4.0))
    assert grads.norms.tolist() == [4.0]


def test_parameters_without_gradient_are_left_out_and_shared_ones_count_once() -> None:
    named = parameters(1.0, 2.0)
    without = nn.Parameter(torch.ones(3))
    grads = Gradients.collect([named[0], ("frozen", without), ("tied", named[0][1]), named[1]])
    assert grads.paths == ("layer0.weight", "layer1.weight")
    assert len(grads) == len(grads.grads) == len(grads.params) == len(grads.norms) == 2


def test_no_gradients_at_all_are_an_empty_collection() -> None:
    grads = Gradients.collect([("frozen", nn.Parameter(torch.ones(3)))])
    assert len(grads) == 0
    assert grads.norms.shape == (0,)
    assert grads.global_norm.item() == 0.0
    grads.mul_(0.5)


@pytest.mark.parametrize("coefficient", [0.25, torch.tensor(0.25), torch.tensor([0.25, 0.25, 0.25])], ids=repr)
def test_multiplying_keeps_the_norms_true(coefficient) -> None:
    grads = Gradients.collect(parameters(1.0, 2.0, math.nan), grad_scale=2.0)
    before = grads.norms.clone()
    grads.mul_(coefficient)
    torch.testing.assert_close(grads.norms, before * 0.25, equal_nan=True)
    torch.testing.assert_close(grads.norms, tensor_norms(grads.grads) / 2, equal_nan=True)


def test_norms_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import gradwatch.stats._gradients as module

    calls = []
    monkeypatch.setattr(module, "tensor_norms", lambda ts, **kw: (calls.append(len(ts)), tensor_norms(ts, **kw))[1])
    grads = Gradients.collect(parameters(1.0, 2.0))
    grads.norms, grads.global_norm, grads.select("layer1*").norms, grads.mul_(0.5).norms
    assert calls == [2]
    grads.touch()
    assert grads.norms.tolist() == [1.0, 2.0]
    assert calls == [2, 2]


def test_coefficient_of_one_leaves_memory_untouched_on_the_cpu() -> None:
    named = parameters(1.0, 2.0)
    versions = [p.grad._version for _, p in named]
    Gradients.collect(named).mul_(1.0).mul_(torch.tensor(1.0)).mul_(torch.tensor([1.0, 1.0]))
    assert [p.grad._version for _, p in named] == versions


def test_each_gradient_has_its_own_coefficient() -> None:
    named = parameters(1.0, 2.0, 4.0)
    Gradients.collect(named).mul_(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    assert [p.grad[0].item() for _, p in named] == [1.0, 1.0, 1.0]


def test_small_coefficients_do_not_round_to_zero_in_float16() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    p.grad = torch.full((2,), 30000.0, dtype=torch.float16)
    Gradients.collect([("p", p)]).mul_(torch.tensor(1e-8))
    assert p.grad[0].item() == pytest.approx(3e-4, rel=1e-2)


def test_coefficients_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`mul_` takes one coefficient, or 2: one for each gradient\. Got .* \(3,\)"):
        Gradients.collect(parameters(1.0, 2.0)).mul_(torch.ones(3))


def test_what_is_changed_through_a_selection_shows_in_the_whole() -> None:
    grads = Gradients.collect(parameters(1.0, 2.0, 3.0))
    assert grads.norms.tolist() == [2.0, 4.0, 6.0]
    part = grads.select(["layer0*", "layer2*"])
    assert part.norms.tolist() == [2.0, 6.0]
    part.mul_(torch.tensor([2.0, 0.5]))
    assert grads.norms.tolist() == [4.0, 4.0, 3.0]
    assert len(grads.select("nothing*")) == 0


def test_dropped_gradients_are_none_and_gone_from_every_view() -> None:
    named = parameters(1.0, 2.0, 3.0)
    grads = Gradients.collect(named)
    part = grads.select(["layer1*", "layer2*"])
    part.drop_([0])
    assert named[1][1].grad is None
    assert grads.paths == ("layer0.weight", "layer2.weight")
    assert part.paths == ("layer2.weight",)
    assert [id(p) for p in grads.params] == [id(named[0][1]), id(named[2][1])]
    assert [id(p) for p in part.params] == [id(named[2][1])]
    assert len(grads) == len(grads.grads) == len(grads.tensors) == 2
    assert grads.norms.tolist() == [2.0, 6.0]
    grads.touch()
    assert grads.norms.tolist() == [2.0, 6.0]
    grads.mul_(torch.tensor([1.0, 2.0]))
    assert part.norms.tolist() == [12.0]


def test_arithmetic_in_place_changes_each_element_once_and_no_other_gradient() -> None:
    named = parameters(1.0, 2.0, 3.0)
    (_, expanded), (_, first), (_, second) = named
    expanded.grad = torch.ones(()).expand(4)
    first.grad = second.grad = torch.full((4,), 2.0)
    grads = Gradients.collect(named)
    assert [t.stride() for t in grads.tensors] == [(0,), (1,), (1,)]  # only looked at, they stay as they are
    for factor, grad in zip((2.0, 3.0, 5.0), grads.grads, strict=True):
        grad.mul_(factor)
    assert [p.grad.tolist() for _, p in named] == [[2.0] * 4, [6.0] * 4, [10.0] * 4]


def test_dropping_nan_heals_the_global_norm_where_multiplying_by_zero_does_not() -> None:
    grads = Gradients.collect(parameters(1.0, math.nan))
    grads.mul_(torch.tensor([1.0, 0.0]))
    assert math.isnan(grads.global_norm)
    grads.drop_([1])
    assert grads.global_norm.item() == 2.0


def test_replaced_gradient_is_measured_anew() -> None:
    grads = Gradients.collect(parameters(1.0, 2.0))
    assert grads.norms.tolist() == [2.0, 4.0]
    grads.replace_(1, torch.full((4,), 5.0))
    assert grads.norms.tolist() == [2.0, 10.0]
    with pytest.raises(ValueError, match=r"a gradient of 'layer1.weight' has shape \(4,\). Got \(3,\)\."):
        grads.replace_(1, torch.ones(3))


def test_sparse_gradients_are_scaled_in_place() -> None:
    embedding = nn.Embedding(10, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    grads = Gradients.collect(list(embedding.named_parameters()))
    assert grads.norms.item() == pytest.approx(math.sqrt(2 * 4 + 2))
    grads.mul_(0.5)
    assert grads.norms.item() == pytest.approx(math.sqrt(10) / 2)
    assert embedding.weight.grad.to_dense()[1, 0].item() == 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_loss_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"`grad_scale` must be above 0\. Got"):
        Gradients.collect([], grad_scale=scale)


@pytest.mark.parametrize("histograms", [False, True])
def test_measuring_everything_gives_the_norms_too_in_one_go(histograms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradwatch.stats._gradients as module

    named = parameters(2.0, 0.0, -4.0)
    named.append(("half", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))))
    named[3][1].grad = torch.tensor([math.inf, 2.0], dtype=torch.bfloat16)
    grads = Gradients.collect(named, grad_scale=2.0)
    found = grads.measure(histograms=histograms)
    assert found.norms.tolist() == [2.0, 0.0, 4.0, math.inf]
    assert found.maxima.flatten().tolist() == [1.0, 0.0, 2.0, math.inf]
    assert found.sums.tolist() == [[0.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    if histograms:
        assert torch.equal(found.histograms, exponent_histograms(grads.grads))
    else:
        assert found.histograms is None
    monkeypatch.setattr(module, "tensor_norms", lambda ts: pytest.fail("measured twice"))
    assert grads.norms.tolist() == found.norms.tolist()
    assert Gradients.collect([]).measure(histograms=histograms).norms.shape == (0,)
