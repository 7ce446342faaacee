"""What the histograms on record say of a format is what a cast would lose."""

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.precision import FORMATS, cast_loss, loss_table, precision_report


def watched(scale, steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    spread = torch.exp2(-torch.arange(20.0))
    grads = []
    with Watch(model, optimizer, rules="observe", histograms_every=1) as watch:
        for _ in range(steps):
            loss = model(torch.randn(8, 20) * spread).square().sum() * scale
            loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
            watch.step(loss=loss)
            optimizer.zero_grad()
    return watch, grads


def by_cast(grads, name, factor=1.0):
    losses = [cast_loss(g * factor, name) for step in grads for g in step.values()]
    return sum(int(x.num_underflows) for x in losses) / sum(int(x.num_nonzero) for x in losses)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
def test_shares_read_from_histograms_are_those_of_casts(scale):
    watch, grads = watched(scale)
    report = precision_report(watch.history)
    assert report.num_steps == 3
    by_name = {loss.name: loss for loss in report.losses}
    for name in ("bfloat16", "float16", "float8_e4m3", "float8_e5m2"):
        assert by_name[name].share == pytest.approx(by_cast(grads, name), abs=1e-9)
    assert report.loss_scales is not None
    for exponent in report.loss_scales:
        assert by_cast(grads, "float16", 2.0**exponent) < 0.001
        assert not any(cast_loss(g * 2.0**exponent, "float16").num_overflows for step in grads for g in step.values())
    assert by_cast(grads, "float16", 2.0 ** (report.loss_scales[0] - 1)) >= 0.001 or report.loss_scales[0] == 0


def test_without_a_loss_scale_small_gradients_are_lost_and_the_worst_is_named():
    watch, grads = watched(1e-6)
    worst = max(grads[0], key=lambda path: sum(cast_loss(step[path], "float16").underflow_share for step in grads))
    report = precision_report(watch.history)
    float16 = next(loss for loss in report.losses if loss.name == "float16")
    assert float16.share > 0.01
    assert float16.worst_path == worst
    assert worst in str(report)
    assert "start at 2^" in report.advice


def test_a_run_without_histograms_gives_no_advice_but_what_to_do():
    assert "histograms_every" in precision_report([]).advice


def test_gradients_too_far_apart_for_one_scale_are_told():
    from gradwatch.records import Histogram, StepRecord
    from tests.sinks.made import mixed_index

    counts = np.zeros(512, np.int64)
    counts[127 - 60] = counts[127 + 3] = 1000
    index = mixed_index(3, 0)
    record = StepRecord(step=0, index=index, histograms={index.paths[0]: Histogram(counts)})
    report = precision_report([record])
    assert report.loss_scales is None
    assert "no single loss scale" in report.advice


def test_a_table_of_tensors_at_hand_holds_every_format():
    grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    losses = {loss.name: loss for loss in loss_table({"a": grad, "b": torch.zeros(3)})}
    assert list(losses) == list(FORMATS)
    assert losses["float16"].share == 0
    assert losses["nvfp4"].error == pytest.approx(cast_loss(grad, "nvfp4").relative_error)
    assert losses["bfloat16"].error < losses["mxfp8_e4m3"].error < losses["nvfp4"].error < losses["mxfp4"].error
