"""Changing error signals inside backward."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from gradwatch.errors import UnknownPathError
from gradwatch.stats import Gradients
from gradwatch.treatments import ClipByNorm, Scale, at_grad_output

from ._steps import Step


def chain(depth: int = 3) -> nn.Sequential:
    """1x1 linear maps of weight 2: the error signal of output k is 2**(depth - 1 - k)."""
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(depth)])
    for layer in model:
        nn.init.constant_(layer.weight, 2.0)
    return model


def backward(model: nn.Module, scale: float = 1.0) -> list[float]:
    model.zero_grad()
    (model(torch.ones(1, 1)).sum() * scale).backward()
    return [float(p.grad) for p in model.parameters()]


def test_scale_reaches_the_modules_own_weights_and_all_upstream_of_it() -> None:
    model = chain()
    plain = backward(model)
    handle = Scale(0.5, "1", at="grad_output").install(model)
    # The signal is scaled at the output of layer 1.
    assert backward(model) == [plain[0] / 2, plain[1] / 2, plain[2]]
    handle.remove()
    assert backward(model) == plain


def test_clip_cuts_the_error_signal_to_the_norm() -> None:
    model = chain()
    treatment = ClipByNorm(3.0, at="grad_output", paths=["0"])
    treatment.install(model)
    # The signal at the output of layer 0 is 4; its weight's gradient is signal x input.
    assert backward(model)[0] == 3.0
    report = treatment.apply_(Gradients.collect([]), Step())
    assert float(report["coefficient"]) == 0.75
    assert float(report["clipped_share"]) == 1.0
    assert treatment.apply_(Gradients.collect([]), Step()) == {"applied": 0.0, "signals": 0.0}


def test_a_signal_within_its_limit_is_told_as_not_changed() -> None:
    model = chain()
    treatment = ClipByNorm(3.0, at="grad_output", paths=["0", "2"])
    treatment.install(model)
    # The signals are 4 and 1: one of them is cut.
    assert backward(model)[0] == 3.0
    report = treatment.apply_(Gradients.collect([]), Step())
    assert (bool(report["applied"]), float(report["clipped_share"]), report["signals"]) == (True, 0.5, 2.0)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    backward(model)  # 2 and 1: none
    report = treatment.apply_(Gradients.collect([]), Step())
    assert (bool(report["applied"]), float(report["clipped_share"]), report["signals"]) == (False, 0.0, 2.0)


def test_limits_hold_for_the_unscaled_signal() -> None:
    model = chain()
    handle = ClipByNorm(3.0, at="grad_output", paths="0").install(model)
    handle.grad_scale = 1024.0
    assert backward(model, scale=1024.0)[0] == 3.0 * 1024.0


def test_a_signal_that_is_not_finite_stays_as_it_is() -> None:
    model = chain()
    ClipByNorm(3.0, at="grad_output", paths="0").install(model)
    assert backward(model, scale=float("inf"))[0] == float("inf")


def test_idle_hooks_change_no_bit() -> None:
    model = chain()
    plain = backward(model)
    handle = Scale(0.5, "*", at="grad_output").install(model)
    handle.enabled = False
    assert backward(model) == plain


def test_a_handle_removed_between_forward_and_backward_is_idle() -> None:
    model = chain()
    plain = backward(model)
    model.zero_grad()
    handle = Scale(0.5, "*", at="grad_output").install(model)
    loss = model(torch.ones(1, 1)).sum()
    handle.remove()
    handle.remove()
    loss.backward()
    assert [float(p.grad) for p in model.parameters()] == plain


def test_in_place_operations_after_the_module_still_run() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 1))
    x = torch.randn(4, 2)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    handle = Scale(2.0, ["0", "1", "2"], at="grad_output").install(model)
    model(x).sum().backward()
    # Every signal passes the last module, so the factors multiply upstream.
    factors = [8, 8, 2, 2]
    for p, before, factor in zip(model.parameters(), plain, factors, strict=True):
        torch.testing.assert_close(p.grad, before * factor)
    handle.remove()


def test_a_container_that_returns_its_last_childs_output_counts_once() -> None:
    model = nn.Sequential()
    model.block = nn.Sequential(nn.Linear(1, 1, bias=False))
    (plain,) = backward(model)
    Scale(0.5, "block*", at="grad_output").install(model)
    assert backward(model) == [plain / 2]


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> dict:
        return {"a": (x * 1, [x * 2]), "b": None, "c": 3}


def test_tensors_in_nested_outputs_are_found() -> None:
    model = nn.Module()
    model.inner = Nested()
    Scale(0.5, "inner", at="grad_output").install(model)
    x = torch.ones(1, requires_grad=True)
    out = model.inner(x)
    (out["a"][0] + out["a"][1][0]).backward()
    assert float(x.grad) == 1.5


def test_copies_and_pickles_of_the_model_are_free_of_it() -> None:
    model = chain()
    plain = backward(model)
    Scale(0.5, "*", at="grad_output").install(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert backward(twin) == plain


def test_graphs_are_freed() -> None:
    model = chain()
    handle = Scale(0.5, "*", at="grad_output").install(model)
    out = model(torch.ones(1, 1))
    reference = weakref.ref(out)
    out.sum().backward()
    del out
    gc.collect()
    assert reference() is None
    assert len(handle._seen) == 0


def test_the_root_is_meant_only_where_it_is_named() -> None:
    model = chain()
    kernel = lambda grad, scale: (grad, 1.0)  # noqa: E731
    assert at_grad_output(model, "*", kernel).paths == ("0", "1", "2")
    assert at_grad_output(model, "", kernel).paths == ("",)


def test_modules_that_are_not_there_are_an_error() -> None:
    with pytest.raises(UnknownPathError, match=r"Sequential has no module that matches 'block\.7'"):
        Scale(0.5, "block.7", at="grad_output").install(chain())
    with pytest.raises(UnknownPathError):
        Scale(0.5, "block.7", at="grad_output").bind(chain())
