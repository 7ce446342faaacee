"""Ways in which the Hugging Face Trainer is used: callbacks handed on, trainings repeated, resumed and searched."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from gradwatch import GradwatchWarning
from gradwatch.callbacks.transformers import GradWatchCallback

from .hf import Sentences, arguments, bert, trainer

KEY = "gradwatch:gradwatch"
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def quiet(**options: Any) -> GradWatchCallback:
    return GradWatchCallback(**{"verbose": False, "on_error": "raise", **options})


def steps(watch: GradWatchCallback) -> list[int]:
    return [r.step for r in watch.history]


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]


def test_one_that_is_listed_twice_measures_each_step_once_and_writes_one_folder(tmp_path: Path) -> None:
    watch = quiet()
    trainer(tmp_path, watch, watch, max_steps=3).train()
    assert steps(watch) == [0, 1, 2]
    assert [p.name for p in tmp_path.glob("gradwatch*")] == ["gradwatch"]


def test_two_of_one_name_save_and_write_under_names_of_their_own_and_go_on_from_them(tmp_path: Path) -> None:
    first = trainer(tmp_path, quiet(), **SAVES)
    handed_on = [c for c in first.callback_handler.callbacks if isinstance(c, GradWatchCallback)]
    both = [*handed_on, quiet()]
    trainer(tmp_path, *both, **SAVES).train()
    assert [w.run_dir for w in both] == [tmp_path / "gradwatch", tmp_path / "gradwatch-2"]
    assert {key for key in saved(tmp_path / "checkpoint-2") if key.startswith("gradwatch")} == {KEY, f"{KEY}-2"}
    again = [quiet(), quiet()]
    trainer(tmp_path, *again, **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [steps(w) for w in again] == [[2, 3], [2, 3]]
    assert [w.run_dir for w in again] == [w.run_dir for w in both]
    # Alone in a training it has the name that it was given.
    (tmp_path / "alone").mkdir()
    trainer(tmp_path / "alone", both[1], **SAVES).train()
    assert KEY in saved(tmp_path / "alone" / "checkpoint-4")


def test_trainings_one_after_another_evaluations_and_searches_are_watched_as_bare(tmp_path: Path) -> None:
    ended = []
    for name in ("bare", "watched"):
        callbacks = [] if name == "bare" else [quiet(activations_every=1, updates_every=1)]
        settings = arguments(tmp_path / name, max_steps=2)
        run = Trainer(
            args=settings,
            model_init=lambda: bert(),
            train_dataset=Sentences(),
            eval_dataset=Sentences(8),
            callbacks=callbacks,
        )
        run.evaluate()
        weights = []
        for rate in (1e-3, 1e-2):
            # As a search for hyperparameters does: other settings, a new model from `model_init`, the same callbacks.
            run.args.learning_rate = rate
            run.train()
            run.evaluate()
            weights += [p.detach().clone() for p in run.model.parameters()]
        ended.append([*weights, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))
    (watch,) = callbacks
    assert steps(watch) == [0, 1]
    assert not any("val_loss" in r.scalars for r in watch.history)
    assert not any(m._forward_hooks for m in run.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("state", ["words", [1, 2], {"attributes": {"state": "AAAA"}}, {"args": {}}, None])
def test_a_training_goes_on_from_a_checkpoint_whose_state_of_ours_can_not_be_read(state: Any, tmp_path: Path) -> None:
    trainer(tmp_path, **SAVES).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    content = json.loads(file.read_text())
    if state is not None:
        content["stateful_callbacks"][KEY] = state
    file.write_text(json.dumps(content))
    watch = quiet(on_error="warn", run_dir=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=GradwatchWarning)
        trainer(tmp_path, watch, **SAVES).train(resume_from_checkpoint=str(file.parent))
    assert steps(watch) == [2, 3]


def test_a_checkpoint_of_a_watched_training_is_taken_up_unwatched_and_the_other_callbacks_states_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stopping() -> TrainerCallback:
        return EarlyStoppingCallback(early_stopping_patience=3)

    options = {**SAVES, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    options |= {"evaluated": Sentences(8), "load_best_model_at_end": True}
    trainer(tmp_path, quiet(), stopping(), **options).train()
    assert {KEY, "EarlyStoppingCallback", "TrainerControl"} <= set(saved(tmp_path / "checkpoint-2"))
    caplog.set_level(logging.WARNING)
    run = trainer(tmp_path, stopping(), **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4
    assert "gradwatch" not in caplog.text


def test_hooks_called_after_the_training_measure_nothing_and_raise_nothing(tmp_path: Path) -> None:
    watch = quiet()
    run = trainer(tmp_path, watch, max_steps=2)
    run.train()
    given = run.args, run.state, run.control
    watch.on_step_begin(*given)
    watch.on_pre_optimizer_step(*given)
    watch.on_step_end(*given)
    watch.on_evaluate(*given, metrics={"eval_loss": 1.0})
    watch.on_train_end(*given)
    assert steps(watch) == [0, 1]
    assert not any(m._forward_hooks for m in run.model.modules())
