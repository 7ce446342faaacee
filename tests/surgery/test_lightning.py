"""Surgery inside Lightning's automatic (and manual) optimization, by a callback alone."""

from __future__ import annotations

import copy

import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")

from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

from gradwatch.treatments.surgery import Surgery, SurgeryController, TrainingStepTap  # noqa: E402

from .conftest import batches  # noqa: E402
from .lightning_case import ByHand, TwoHeadsModule, fit, watch  # noqa: E402

PCGRAD = {"method": "pcgrad", "keep_length": False}


def float16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


def different(module, other) -> dict[str, float]:
    pairs = zip(module.named_parameters(), other.parameters(), strict=True)
    return {name: float((p - q).abs().max()) for (name, p), q in pairs if not torch.equal(p, q)}


@pytest.mark.parametrize("keep_length", [True, False])
@pytest.mark.parametrize("mode", ["dict", "split"])
def test_weights_of_one_are_bitwise_the_plain_run(mode, keep_length) -> None:
    module, plain = TwoHeadsModule(mode), TwoHeadsModule(mode)
    fit(module, (watch(Surgery("sum", keep_length=keep_length)),))
    fit(plain)
    assert different(module, plain) == {}


@pytest.mark.parametrize("mode", ["dict", "split"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 2}, id="accumulated"),
        pytest.param({"gradient_clip_val": 0.1}, id="clipped"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16"),
    ],
)
def test_pcgrad_is_bitwise_the_module_that_does_it_by_hand(options, mode) -> None:
    module, by_hand = TwoHeadsModule(mode), ByHand(mode=mode)
    callback = watch(Surgery(**PCGRAD))
    fit(module, (callback,), **options)
    fit(by_hand, **options)
    assert different(module, by_hand) == {}
    assert any(r.scalars["surgery_applied"] > 0 for r in callback.history)


@pytest.mark.parametrize("method", ["pcgrad", "nash_mtl"])
def test_surgery_under_a_grad_scaler_is_bitwise_the_module_that_does_it_by_hand(method) -> None:
    """The reference scales its probes alike: float16 gradients depend on it."""
    module, by_hand = TwoHeadsModule(), ByHand(method, scale=1024.0)
    callback = watch(Surgery(method, keep_length=False))
    fit(module, (callback,), plugins=[float16()])
    fit(by_hand, plugins=[float16()])
    assert different(module, by_hand) == {}
    assert any(r.scalars["surgery_applied"] > 0 for r in callback.history)


def test_manual_optimization_has_surgery_too() -> None:
    module, by_hand = TwoHeadsModule("manual"), ByHand()
    fit(module, (watch(Surgery(**PCGRAD)),))
    fit(by_hand)
    assert different(module, by_hand) == {}


def test_direct_combination_equals_the_weighted_backward() -> None:
    module, by_hand = TwoHeadsModule(), ByHand()
    fit(module, (watch(Surgery(**PCGRAD, combine="direct")),), accumulate_grad_batches=2)
    fit(by_hand, accumulate_grad_batches=2)
    for p, q in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_direct_combination_of_a_loss_with_other_terms_is_named() -> None:
    from gradwatch.errors import ConfigError

    with pytest.raises(ConfigError, match='needs "loss" to be the sum of "losses"'):
        fit(TwoHeadsModule(b_factor=0.5), (watch(Surgery("pcgrad", combine="direct")),))


def test_resumed_run_is_bitwise_the_whole_one(tmp_path) -> None:
    def gradvac() -> Surgery:
        return Surgery("gradvac", beta=0.3, keep_length=False)

    whole, first, second = TwoHeadsModule(), TwoHeadsModule(), TwoHeadsModule()
    fit(whole, (watch(gradvac()),), steps=-1, max_epochs=2)
    trainer = fit(first, (watch(gradvac()),), steps=-1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, (watch(gradvac()),), steps=-1, max_epochs=2, checkpoint=tmp_path / "half.ckpt")
    assert different(second, whole) == {}


def test_diagnosis_without_surgery_is_bitwise_the_plain_run_and_on_record() -> None:
    module, plain = TwoHeadsModule(), TwoHeadsModule("plain")
    callback = watch(None, conflicts_every=5)
    fit(module, (callback,))
    fit(plain)
    assert different(module, plain) == {}
    measured = [r for r in callback.history if "conflict_rate" in r.scalars]
    assert [r.step % 5 for r in measured] == [0] * 4
    assert -1 <= measured[0].scalars["task_cos/a/b"] <= 1


def test_tap_puts_training_step_back() -> None:
    module = TwoHeadsModule()
    controller = SurgeryController(Surgery("pcgrad"), module.named_parameters())
    tap = TrainingStepTap(module, controller)
    assert "training_step" in vars(module)
    tap.close()
    tap.close()
    assert "training_step" not in vars(module)

    def own(batch, batch_idx):
        return None

    module.training_step = own
    tap = TrainingStepTap(module, controller)
    tap.close()
    assert module.training_step is own


def test_fit_leaves_training_step_as_it_was_also_after_an_error() -> None:
    class Failing(TwoHeadsModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("from the user")
            return super().training_step(batch, batch_idx)

    for module in (TwoHeadsModule(), Failing()):
        try:
            fit(module, (watch(Surgery("pcgrad")),), steps=4)
        except RuntimeError as error:
            assert str(error) == "from the user"  # noqa: PT017
        assert "training_step" not in vars(module)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_of_a_tapped_module_trains_without_surgery(duplicate, tmp_path) -> None:
    module = TwoHeadsModule()
    controller = SurgeryController(Surgery("pcgrad"), module.named_parameters())
    tap = TrainingStepTap(module, controller)
    if duplicate == "deepcopy":
        other = copy.deepcopy(module)
    else:
        torch.save(module, tmp_path / "module.pt")
        other = torch.load(tmp_path / "module.pt", weights_only=False)
    output = other.training_step(batches()[0], 0)
    assert set(output["losses"]) == {"a", "b"}
    assert controller._pending == {}
    assert other.training_step.__self__ is other
    tap.close()
