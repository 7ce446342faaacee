"""The callback of the Hugging Face Trainer, with a tiny BERT and the real `Trainer.train()`."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.errors import TrainingStopped
from gradwatch.rules import NonFinite
from gradwatch.runs import read_run
from gradwatch.treatments import Checkpoint, ClipByGlobalNorm, Stop

from .hf import Sentences, bert, trainer

DENSE = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "log_every": 1}


def quiet(rules="default", **options) -> GradWatchCallback:
    return GradWatchCallback(rules, **{"verbose": False, "on_error": "raise", "run_dir": False, **options})


class AfterClip(TrainerCallback):
    """What the optimizer gets, read where the Trainer itself would let a callback read."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"gradient_accumulation_steps": 3, "max_steps": 4}, id="accumulation"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True}, id="gradient-checkpointing", marks=pytest.mark.slow),
    ],
)
def test_observing_a_bert_changes_no_bit(tmp_path: Path, options: dict) -> None:
    def train(*callbacks: TrainerCallback) -> list[torch.Tensor]:
        run = trainer(tmp_path, *callbacks, **options)
        run.train()
        states = [v for s in run.optimizer.state_dict()["state"].values() for v in s.values()]
        return [*run.model.parameters(), *states, torch.get_rng_state()]

    watch = quiet(**DENSE)
    bare, watched = train(), train(watch)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    assert [r.step for r in watch.history] == list(range(options.get("max_steps", 12)))


def test_norms_are_those_before_the_trainers_clip_and_both_are_on_record(tmp_path: Path) -> None:
    watch, after = quiet(), AfterClip()
    run = trainer(tmp_path, watch, after, max_grad_norm=0.1, logging_steps=1)
    run.train()
    logged = [x["grad_norm"] for x in run.state.log_history if "grad_norm" in x]
    assert [r.global_norm for r in watch.history] == pytest.approx(logged, rel=1e-5)
    assert min(logged) > 0.1
    for record, norm in zip(watch.history, after.norms, strict=True):
        assert record.scalars["trainer_clip"] == 0.1
        assert record.scalars["global_norm_applied"] == pytest.approx(norm, rel=1e-4)


def test_our_treatments_come_before_the_trainers_clip(tmp_path: Path) -> None:
    watch, after = quiet(treatments=ClipByGlobalNorm(0.05)), AfterClip()
    trainer(tmp_path, watch, after, max_grad_norm=0.1).train()
    assert all(r.global_norm > 0.05 for r in watch.history)
    assert after.norms == pytest.approx([0.05] * 12, rel=1e-4)


def test_the_loss_on_record_is_the_one_that_the_gradients_belong_to(tmp_path: Path) -> None:
    watch = quiet()
    run = trainer(tmp_path, watch, gradient_accumulation_steps=3, max_steps=4, logging_steps=1)
    run.train()
    logged = [x["loss"] for x in run.state.log_history if "loss" in x]
    assert [r.loss for r in watch.history] == pytest.approx(logged, rel=1e-4)
    assert [r.num_samples for r in watch.history] == [12] * 4


def spoiled(batch: int) -> torch.nn.Module:
    model = bert()
    calls = []

    def spoil(module, args, output):
        if module.training:
            calls.append(1)
            if len(calls) == batch + 1:
                output.loss = output.loss * math.nan
        return output

    model.register_forward_hook(spoil)
    return model


def test_a_nan_batch_is_skipped_though_the_trainers_clip_spreads_it(tmp_path: Path) -> None:
    watch = quiet("autoclip")
    run = trainer(tmp_path, watch, model=spoiled(5), max_steps=12)
    run.train()
    assert run.state.global_step == 12
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert [r.step for r in watch.history if r.skipped] == [5]
    assert [(i.rule, i.treatments) for i in watch.incidents] == [("non_finite", ("skip_step",))]


def test_stop_ends_the_training_and_checkpoint_saves(tmp_path: Path) -> None:
    watch = quiet([NonFinite(then=[Checkpoint(), Stop()])])
    run = trainer(tmp_path, watch, model=spoiled(5), max_steps=12)
    run.train()
    assert run.state.global_step == 6
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert "gradwatch:gradwatch" in saved["stateful_callbacks"]


def test_ten_bad_steps_stop_the_training_with_an_error_and_leave_no_hook(tmp_path: Path) -> None:
    model = bert()
    model.register_forward_hook(lambda m, a, out: setattr(out, "loss", out.loss * math.nan) or out)
    watch = quiet("autoclip")
    with pytest.raises(TrainingStopped, match="10 optimizer steps in a row"):
        trainer(tmp_path, watch, model=model, max_steps=20).train()
    assert len(model._forward_hooks) == 1


def test_a_with_takes_the_hooks_off_after_an_exception(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("mine")

    model = bert()
    with pytest.raises(RuntimeError, match="mine"), quiet(**DENSE) as watch:
        trainer(tmp_path, watch, Fails(), model=model).train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluation_metrics_stand_on_the_next_record(tmp_path: Path) -> None:
    watch = quiet()
    run = trainer(tmp_path, watch, evaluated=Sentences(8, seed=2), eval_strategy="steps", eval_steps=4)
    run.train()
    found = {r.step: {k for k in r.scalars if k.startswith("val_")} for r in watch.history}
    assert found[4] == {"val_loss"}
    assert found[5] == set()


def test_tensorboard_and_a_run_folder_are_written(tmp_path: Path) -> None:
    watch = GradWatchCallback(verbose=False, on_error="raise")
    trainer(tmp_path, watch, report_to="tensorboard", max_steps=12).train()
    events = EventAccumulator(str(tmp_path / "runs" / "gradwatch"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert "gradwatch/global_norm" in events.Tags()["scalars"]
    assert "gradwatch/grad_norm" in events.Tags()["tensors"]
    saved = read_run(tmp_path / "gradwatch")
    assert [r.global_norm for r in saved.records()] == [r.global_norm for r in watch.history]


@pytest.mark.slow
def test_weights_and_biases_offline_gets_our_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    watch = quiet()
    trainer(tmp_path / "out", watch, report_to="wandb", max_steps=6).train()
    try:
        assert "gradwatch/global_norm" in dict(wandb.run.summary)
        assert not watch._session.sinks.failed
    finally:
        wandb.finish()


def test_a_loss_outside_of_the_model_is_unknown_but_gradients_are_not(tmp_path: Path) -> None:
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    watch = quiet()
    run = trainer(tmp_path, watch, logging_steps=1, max_steps=4)
    run.compute_loss_func = loss
    run.train()
    logged = [x["grad_norm"] for x in run.state.log_history if "grad_norm" in x]
    assert [r.global_norm for r in watch.history] == pytest.approx(logged, rel=1e-5)
    assert not any(r.has_loss for r in watch.history)


def test_the_callback_survives_pickle_and_copies_of_the_model_carry_no_hook(tmp_path: Path) -> None:
    copies = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    watch = quiet()
    trainer(tmp_path, watch, Copies(), max_steps=2).train()
    pickle.loads(pickle.dumps(watch))
    seen = len(watch.history)
    copies[0].train()(
        input_ids=torch.zeros(2, 6, dtype=torch.long), labels=torch.zeros(2, dtype=torch.long)
    ).loss.backward()
    assert len(watch.history) == seen
