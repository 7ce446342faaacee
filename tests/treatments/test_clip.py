import math
import warnings

import pytest
import torch
from torch import nn

from gradwatch.errors import ConfigError, UnknownPathError
from gradwatch.treatments import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    ClipToLimit,
    clip_by_global_norm_,
    clip_by_norm_,
    clip_by_value_,
)

from ._steps import Step, gradients


def test_global_clip_by_hand() -> None:
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norm = clip_by_global_norm_(grads, 1.0)
    assert norm == 5.0
    torch.testing.assert_close(grads[0], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(grads[1], torch.tensor([[0.8]]))


def test_norm_clip_by_hand() -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.5])]
    torch.testing.assert_close(clip_by_norm_(grads, 1.0), torch.tensor([5.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(grads[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(grads[1], torch.tensor([0.5]))


def test_value_clip_by_hand() -> None:
    grads = [torch.tensor([3.0, -0.5, -4.0])]
    assert clip_by_value_(grads, 1.0) == 2
    torch.testing.assert_close(grads[0], torch.tensor([1.0, -0.5, -1.0]))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_global_clip_agrees_with_torch(max_norm: float) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(s)) for s in [(7, 5), (5,), (300,)]]
    for p in params:
        p.grad = torch.randn_like(p)
    mine = [p.grad.clone() for p in params]
    theirs = nn.utils.clip_grad_norm_(params, max_norm)
    torch.testing.assert_close(clip_by_global_norm_(mine, max_norm).float(), theirs)
    for a, p in zip(mine, params, strict=True):
        torch.testing.assert_close(a, p.grad, rtol=2e-6, atol=1e-7)


def test_value_clip_agrees_with_torch() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(50))
    param.grad = torch.randn(50)
    mine = param.grad.clone()
    nn.utils.clip_grad_value_([param], 0.3)
    clip_by_value_([mine], 0.3)
    assert torch.equal(mine, param.grad)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *[(dtype, scale) for dtype in (torch.bfloat16, torch.float32, torch.float64) for scale in (1e-30, 1.0, 1e30)],
        *[(torch.float16, scale) for scale in (1e-2, 1.0, 1e4)],
    ],
    ids=str,
)
def test_clipped_norm_is_the_limit_at_every_scale(dtype: torch.dtype, scale: float) -> None:
    grads = [(torch.linspace(-1, 1, 64, dtype=torch.float64) * scale).to(dtype) for _ in range(3)]
    before = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    clip_by_global_norm_(grads, before / 10)
    after = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert after == pytest.approx(before / 10, rel=0.01 if dtype in (torch.float16, torch.bfloat16) else 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "treatment",
    [ClipByGlobalNorm(0.1), ClipByNorm(0.1), ClipByValue(0.1), ClipToLimit()],
    ids=lambda t: t.name,
)
def test_what_is_not_finite_leaves_every_gradient_as_it_is(treatment, bad: float) -> None:
    grads = gradients([3.0, bad], [4.0])
    treatment.apply_(grads, Step(limit=0.1))
    torch.testing.assert_close(grads.grads[0], torch.tensor([3.0, bad]), equal_nan=True)
    assert grads.grads[1] == 4.0


def test_gradients_below_the_limit_keep_every_bit() -> None:
    grads = gradients([0.1, 0.2])
    before = grads.grads[0].clone()
    report = ClipByGlobalNorm(1.0).apply_(grads, Step())
    assert torch.equal(grads.grads[0], before)
    assert not report["applied"]


def test_zero_gradients_stay_zero() -> None:
    grads = gradients([0.0, 0.0])
    ClipByGlobalNorm(1.0).apply_(grads, Step())
    ClipByNorm(1.0).apply_(grads, Step())
    assert torch.equal(grads.grads[0], torch.zeros(2))


def test_norms_follow_a_clip() -> None:
    grads = gradients([3.0], [4.0])
    report = ClipByGlobalNorm(1.0).apply_(grads, Step())
    assert float(grads.global_norm) == pytest.approx(1.0)
    assert float(report["coefficient"]) == pytest.approx(0.2)


def test_limits_hold_for_unscaled_gradients() -> None:
    grads = gradients([4.0, 0.5], grad_scale=2.0)
    report = ClipByValue(1.0).apply_(grads, Step())
    torch.testing.assert_close(grads.grads[0], torch.tensor([2.0, 0.5]))
    assert float(report["clipped_share"]) == 0.5
    grads = gradients([6.0], [8.0], grad_scale=2.0)
    ClipByGlobalNorm(1.0).apply_(grads, Step())
    torch.testing.assert_close(torch.cat(grads.grads), torch.tensor([1.2, 1.6]))


def test_paths_choose_what_counts_and_what_is_scaled() -> None:
    grads = gradients([3.0, 4.0], [30.0], paths=["encoder.w", "decoder.w"])
    ClipByGlobalNorm(1.0, paths="encoder.*").apply_(grads, Step())
    torch.testing.assert_close(grads.grads[0], torch.tensor([0.6, 0.8]))
    assert grads.grads[1] == 30.0
    assert float(grads.global_norm) == pytest.approx(math.hypot(1, 30))


def test_paths_without_a_gradient_at_this_step_are_no_error() -> None:
    assert ClipByGlobalNorm(1.0, paths="decoder.*").apply_(gradients([3.0], paths=["encoder.w"]), Step()) is None


def test_clip_to_limit_takes_the_rules_limit_and_does_nothing_without_one() -> None:
    grads = gradients([10.0])
    assert ClipToLimit().apply_(grads, Step(limit=None)) is None
    assert ClipToLimit().apply_(grads, Step(limit=math.nan)) is None
    assert ClipToLimit().apply_(grads, Step(limit=math.inf)) is None
    ClipToLimit().apply_(grads, Step(limit=torch.tensor(math.nan)))
    assert grads.grads[0] == 10.0
    report = ClipToLimit().apply_(grads, Step(limit=2.0))
    torch.testing.assert_close(grads.grads[0], torch.tensor([2.0]))
    assert report["limit"] == 2.0


def test_clips_work_on_sparse_and_mixed_gradients() -> None:
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], torch.tensor([[2.0], [1.0], [4.0]]), (4, 1), check_invariants=True)
    grads = [sparse, torch.tensor([12.0], dtype=torch.float64)]
    assert float(clip_by_global_norm_(grads, 1.3)) == pytest.approx(13.0)
    torch.testing.assert_close(grads[0].to_dense(), torch.tensor([[0.3], [0.0], [0.4], [0.0]]))
    assert clip_by_value_(grads, 0.35) == 2
    torch.testing.assert_close(grads[0].to_dense(), torch.tensor([[0.3], [0.0], [0.35], [0.0]]))


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1", None, True])
def test_a_limit_must_be_above_zero(value) -> None:
    with pytest.raises(ConfigError) as error:
        ClipByGlobalNorm(value)
    assert str(error.value) == f"ClipByGlobalNorm: `max_norm` must be a number above 0. Got {value!r}."


def test_unknown_place_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ConfigError) as error:
        ClipByNorm(1.0, at="grad_outputs")
    assert str(error.value) == "ClipByNorm: `at` can't be 'grad_outputs'. Did you mean 'grad_output'?"


def test_bind_refuses_patterns_that_match_nothing() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(2, 2))
    ClipByGlobalNorm(1.0, paths="encoder.*").bind(model)
    with pytest.raises(UnknownPathError) as error:
        ClipByGlobalNorm(1.0, paths="encodr.weight").bind(model)
    assert "encoder.weight" in str(error.value)


def test_nothing_warns() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ClipByGlobalNorm(1.0).apply_(gradients([3.0]), Step())
    assert not [str(w.message) for w in caught]
