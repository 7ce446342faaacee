"""ZClip, QuantileClip and EmaClip: clips that learn from past norms."""

import math

import numpy as np
import pytest
import torch

from gradwatch.errors import ConfigError
from gradwatch.treatments import EmaClip, QuantileClip, ZClip, ema_clip, quantile_limit, zclip, zclip_memory

from ._steps import Step, gradients


def published_zclip(norms: list[float], z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> list[float]:
    """Clipped norms, by the paper's formulae in plain Python."""
    first = norms[:warmup]
    mean, variance = float(np.mean(first)), float(np.var(first))
    kept = list(first)
    for norm in norms[warmup:]:
        deviation = math.sqrt(variance)
        score = (norm - mean) / (deviation + 1e-6 * mean)
        clipped = mean + z * deviation / (score / z) if score > z else norm
        mean = alpha * mean + (1 - alpha) * clipped
        variance = alpha * variance + (1 - alpha) * (clipped - mean) ** 2
        kept.append(clipped)
    return kept


def clipped_by_zclip(norms: list[float], **settings) -> list[float]:
    treatment, kept = ZClip(**settings), []
    for norm in norms:
        grads = gradients(torch.tensor([norm], dtype=torch.float64))
        treatment.apply_(grads, Step())
        kept.append(float(grads.grads[0]))
    return kept


def test_zclip_agrees_with_the_published_formula() -> None:
    rng = np.random.default_rng(0)
    norms = rng.lognormal(0, 0.4, 300)
    norms[[60, 150, 151]] *= 1000
    np.testing.assert_allclose(clipped_by_zclip(norms.tolist()), published_zclip(norms.tolist()), rtol=1e-9)


def test_zclip_by_hand() -> None:
    # Mean 2 and deviation 1 of the past; 12 is a score of 10, cut to 2 + 2.5**2 / 10.
    memory = torch.tensor([25.0, 2.0, 1.0], dtype=torch.float64)
    coefficient, limit, after = zclip(torch.tensor(12.0), memory)
    assert float(limit) == pytest.approx(2.625, rel=1e-5)
    assert float(coefficient) == pytest.approx(2.625 / 12, rel=1e-5)
    mean = 0.97 * 2 + 0.03 * 2.625
    assert after.tolist() == pytest.approx([26.0, mean, 0.97 + 0.03 * (2.625 - mean) ** 2], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_zclip_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    norms = np.random.default_rng(1).lognormal(0, 0.4, 80)
    norms[70] *= 100
    np.testing.assert_allclose(
        clipped_by_zclip((norms * scale).tolist()), np.array(clipped_by_zclip(norms.tolist())) * scale, rtol=1e-6
    )


def test_zclip_leaves_the_warm_up_alone_unless_asked() -> None:
    assert clipped_by_zclip([5.0] * 24 + [500.0]) == [5.0] * 24 + [500.0]
    kept = clipped_by_zclip([5.0] * 24 + [500.0], warmup_max_norm=1.0)
    assert kept == pytest.approx([1.0] * 25)


def test_zclip_never_sets_gradients_to_zero() -> None:
    assert clipped_by_zclip([0.0] * 30 + [1.0]) == [0.0] * 30 + [1.0]


def test_zclip_goes_on_after_a_spike_it_has_clipped() -> None:
    kept = clipped_by_zclip([1.0, 1.1, 0.9] * 20 + [1000.0] + [1.0, 1.1, 0.9] * 5)
    assert kept[60] < 1.2
    assert kept[61:] == [1.0, 1.1, 0.9] * 5


def test_zclip_memory_begins_empty() -> None:
    assert zclip_memory().tolist() == [0, 0, 0]


def test_quantile_is_of_the_window_and_the_present() -> None:
    history, count = torch.full((4,), math.nan, dtype=torch.float64), torch.tensor(0)
    seen = []
    for norm in [4.0, 1.0, math.nan, 3.0, 2.0, 10.0, 20.0]:
        limit, history, count = quantile_limit(torch.tensor(norm), history, count, 0.5)
        seen.append(float(limit))
    # The NaN never entered: medians of [4], [4 1], [4 1], [4 1 3], [4 1 3 2], [10 1 3 2], [10 20 3 2].
    assert seen == [4.0, 2.5, 2.5, 3.0, 2.5, 2.5, 6.5]
    assert int(count) == 6


def test_quantile_clip_agrees_with_numpy() -> None:
    norms = np.random.default_rng(2).lognormal(0, 1, 60)
    treatment = QuantileClip(0.25, window=16)
    for i, norm in enumerate(norms):
        grads = gradients(torch.tensor([norm]))
        report = treatment.apply_(grads, Step())
        limit = np.quantile(norms[max(0, i - 15) : i + 1], 0.25)
        assert float(report["limit"]) == pytest.approx(limit)
        assert float(grads.grads[0]) == pytest.approx(min(norm, limit))


@pytest.mark.parametrize("window", [3, 10])
def test_quantile_clip_loads_the_memory_of_another_window(window: int) -> None:
    first = QuantileClip(0.5, window=5)
    for norm in [9.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0]:
        first.apply_(gradients([norm]), Step())
    second = QuantileClip(0.0, window=window)
    second.load_state_dict(first.state_dict())
    report = second.apply_(gradients([6.0]), Step())
    # The newest norms of the old window are 1 2 3 4 5; three of them stay, of which the present replaces one.
    assert float(report["limit"]) == (1.0 if window == 10 else 4.0)


def test_ema_clip_by_hand() -> None:
    memory = torch.tensor([[2.0, 100.0], [1.0, 100.0]], dtype=torch.float64)
    coefficients, after = ema_clip(torch.tensor([4.2, 0.5]), memory)
    assert coefficients.tolist() == pytest.approx([0.5, 1.0])
    assert after[:, 0].tolist() == pytest.approx([0.98 * 2 + 0.02 * 2.1, 0.98 + 0.02 * 0.5])


def test_ema_clip_clips_the_whole_gradient_while_warming_up_and_keeps_the_smallest_norm() -> None:
    memory = torch.zeros(2, 2, dtype=torch.float64)
    coefficients, memory = ema_clip(torch.tensor([3.0, 4.0]), memory)
    assert coefficients.tolist() == pytest.approx([0.2, 0.2])
    assert memory.tolist() == [pytest.approx([0.6, 1.0]), pytest.approx([0.8, 1.0])]
    _, memory = ema_clip(torch.tensor([0.1, 0.9]), memory)
    assert memory[:, 0].tolist() == pytest.approx([0.1, 0.8])


def test_ema_clip_lets_a_tensor_train_whose_gradient_begins_at_zero() -> None:
    treatment = EmaClip(warmup=2, warmup_max_norm=None)
    for _ in range(5):
        treatment.apply_(gradients([1.0], [0.0]), Step())
    grads = gradients([1.0], [3.0])
    treatment.apply_(grads, Step())
    assert grads.grads[1] == 3.0


def test_ema_clip_remembers_by_path_when_gradients_come_and_go() -> None:
    treatment = EmaClip(1.0, warmup=1, warmup_max_norm=None)
    treatment.apply_(gradients([1.0], [5.0], paths=["a", "b"]), Step())
    grads = gradients([50.0], [7.0], paths=["b", "c"])
    treatment.apply_(grads, Step())
    assert [float(g) for g in grads.grads] == pytest.approx([5.0, 7.0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ZClip(-1), "ZClip: `z` must be a number above 0. Got -1."),
        (lambda: ZClip(alpha=1.0), "ZClip: `alpha` must be a number above 0 and below 1. Got 1.0."),
        (lambda: ZClip(warmup=0), "ZClip: `warmup` must be a whole number of at least 2. Got 0."),
        (lambda: QuantileClip(10), "QuantileClip: `q` must be a number at least 0 and at most 1. Got 10."),
        (lambda: QuantileClip(0.1, 0), "QuantileClip: `window` must be a whole number of at least 1. Got 0."),
        (lambda: EmaClip(math.nan), "EmaClip: `ratio` must be a number above 0. Got nan."),
        (
            lambda: EmaClip(warmup_max_norm=0),
            "EmaClip: `warmup_max_norm` must be a number above 0, or None. Got 0.",
        ),
    ],
)
def test_settings_that_cannot_be(build, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value) == message
