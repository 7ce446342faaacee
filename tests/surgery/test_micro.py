"""Between the micro-batches of gradient accumulation."""

from __future__ import annotations

import pytest
import torch

from gradwatch.errors import ConfigError, UnknownNameError
from gradwatch.treatments.surgery import (
    MicroBatchController,
    MicroBatchSurgery,
    agreement_filter,
    micro_agreement,
    noise_moments,
    weights,
)

from .conftest import TwoHeads, batches, gradients


def accumulate(settings: MicroBatchSurgery | None, *, parts: int = 4) -> tuple[TwoHeads, dict[str, float]]:
    model = TwoHeads()
    controller = None if settings is None else MicroBatchController(settings, model.named_parameters())
    for i in range(parts):
        (sum(model.losses(*batches()[i])) / parts).backward()
        if controller is not None:
            controller.after_backward(last=i == parts - 1, grad_scale=1 / parts, batch_size=32)
    return model, {} if controller is None else controller.report()


def rows_of_micro_batches(parts: int = 4) -> torch.Tensor:
    rows = []
    for i in range(parts):
        model = TwoHeads()
        (sum(model.losses(*batches()[i])) / parts).backward()
        rows.append(gradients(model))
    return torch.stack(rows)


def test_diagnosis_leaves_accumulation_bitwise_alone() -> None:
    model, report = accumulate(MicroBatchSurgery())
    plain, _ = accumulate(None)
    assert torch.equal(gradients(model), gradients(plain))
    rows = rows_of_micro_batches().double() * 4
    mean, least = micro_agreement(rows @ rows.T)
    assert report["micro_cos"] == pytest.approx(mean, abs=1e-5)
    assert report["micro_cos_min"] == pytest.approx(least, abs=1e-5)
    trace, squared_norm = noise_moments(rows @ rows.T, batch_size=32)
    assert report["noise_trace"] == pytest.approx(trace, rel=1e-4)
    assert report["noise_squared_norm"] == pytest.approx(squared_norm, rel=1e-4)


def test_unit_weights_are_plain_accumulation() -> None:
    model, _ = accumulate(MicroBatchSurgery(lambda G: torch.ones(len(G))))
    plain, _ = accumulate(None)
    torch.testing.assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("method", ["pcgrad", "upgrad", "cagrad"])
def test_methods_combine_micro_batch_gradients(method) -> None:
    model, report = accumulate(MicroBatchSurgery(method))
    rows = rows_of_micro_batches()
    expected = weights(method, rows.double() @ rows.double().T).float() @ rows
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
    assert report["surgery_fallback"] == 0


def test_sign_agreement_keeps_only_elements_all_agree_on() -> None:
    model, report = accumulate(MicroBatchSurgery(agreement="signs"))
    rows = rows_of_micro_batches()
    agree = rows.sign().sum(0).abs() == 4
    torch.testing.assert_close(gradients(model), torch.where(agree, rows.sum(0), torch.zeros(())))
    assert 0 < report["micro_signs_kept"] < 1


def test_filter_averages_what_agrees() -> None:
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0], [2.0, 0.3]], dtype=torch.float64)
    assert agreement_filter(rows @ rows.T, distance=0.5).tolist() == pytest.approx([4 / 3, 4 / 3, 0, 4 / 3])
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert agreement_filter(opposite @ opposite.T).tolist() == [0.0, 0.0]


def test_filter_runs_between_micro_batches() -> None:
    model, report = accumulate(MicroBatchSurgery(agreement="cosine", threshold=1.9))
    plain, _ = accumulate(None)
    assert report["micro_taken"] == 4
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_noise_moments_are_unbiased() -> None:
    """Gradients drawn around (3, 4) with variance 2 a coordinate and sample, 5 samples a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(1500):
        samples = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64) * 2**0.5
        rows = torch.tensor([3.0, 4.0]) + samples.mean(1)
        found.append(noise_moments(rows @ rows.T, batch_size=5))
    trace, squared_norm = torch.tensor(found).mean(0).tolist()
    assert trace == pytest.approx(4, rel=0.05)
    assert squared_norm == pytest.approx(25, rel=0.02)


def test_bad_micro_batch_shows_in_the_gradient_and_in_the_report() -> None:
    model = TwoHeads()
    controller = MicroBatchController(MicroBatchSurgery("pcgrad"), model.named_parameters())
    for i in range(2):
        (sum(model.losses(*batches()[i])) * (float("nan") if i else 1.0)).backward()
        controller.after_backward(last=i == 1)
    assert controller.report()["surgery_fallback"] == 1
    assert gradients(model).isnan().any()
    assert controller.state_dict()["moments"] is None


def test_sign_agreement_does_not_hide_nan() -> None:
    model = TwoHeads()
    controller = MicroBatchController(MicroBatchSurgery(agreement="signs"), model.named_parameters())
    for i in range(2):
        (sum(model.losses(*batches()[i])) * (float("nan") if i else 1.0)).backward()
        controller.after_backward(last=i == 1)
    assert gradients(model).isnan().all()


def test_noise_scale_resumes() -> None:
    model = TwoHeads()
    first, second = (MicroBatchController(MicroBatchSurgery(), model.named_parameters()) for _ in range(2))
    for i in range(2):
        sum(model.losses(*batches()[i])).backward()
        first.after_backward(last=i == 1)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert first.state_dict()["moments"] is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agreement": "sign"}, "`agreement` must be 'signs', 'cosine' or None. Got 'sign'."),
        ({"agreement": "signs", "threshold": 1.5}, "`threshold` of agreement='signs' must be in (0, 1]. Got 1.5."),
        (
            {"method": "pcgrad", "agreement": "cosine"},
            "agreement='cosine' decides the weights itself: leave `method` out. Got 'pcgrad'.",
        ),
    ],
)
def test_settings_are_checked(settings, message) -> None:
    with pytest.raises(ConfigError) as caught:
        MicroBatchSurgery(**settings)
    assert str(caught.value) == message


def test_unknown_method_is_named() -> None:
    with pytest.raises(UnknownNameError):
        MicroBatchSurgery("pcgradd")
