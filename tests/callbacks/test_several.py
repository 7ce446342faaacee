"""Several GradWatch in one Trainer: the user's, another Trainer's, the environment's; and what they save."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.callbacks import GradWatch
from gradwatch.callbacks._own_names import own_names

PACKAGES = [pytest.param(p, id=p.__name__) for p in (lightning.pytorch, pytorch_lightning)]
PLAIN, ENVIRONMENT = "gradwatch:gradwatch", "gradwatch:gradwatch:environment"


def model(package: Any):
    class Line(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Line()


def trainer(package: Any, folder: Path, callbacks: Any, **options: Any):
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "default_root_dir": folder}
    return package.Trainer(callbacks=callbacks, **{**settings, **options})


def fit(run: Any, package: Any, **options: Any) -> Any:
    run.fit(model(package), DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4), **options)
    return run


def quiet(**options: Any) -> GradWatch:
    return GradWatch(**{"verbose": False, "on_error": "raise", **options})


def ours(run: Any) -> list[GradWatch]:
    return [c for c in run.callbacks if isinstance(c, GradWatch)]


def saved(run: Any, path: Path) -> list[str]:
    run.save_checkpoint(path)
    return [key for key in torch.load(path, weights_only=True)["callbacks"] if key.startswith("gradwatch:")]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_trainer_made_with_anothers_callbacks_saves_and_takes_up_each_ones_state(
    package: Any, tmp_path: Path
) -> None:
    first = fit(trainer(package, tmp_path / "first", [quiet()]), package)
    second = trainer(package, tmp_path / "second", [*ours(first), quiet(), quiet(name="mine")])
    fit(second, package)
    path = tmp_path / "second.ckpt"
    assert saved(second, path) == [PLAIN, f"{PLAIN}-2", "gradwatch:mine"]
    assert [len(w.history) for w in ours(second)] == [3, 3, 3]
    again = trainer(package, tmp_path / "second", [quiet(), quiet(), quiet(name="mine")], max_epochs=2)
    fit(again, package, ckpt_path=path)
    assert [[r.step for r in w.history] for w in ours(again)] == [[3, 4, 5]] * 3
    # Alone again, it has its own key.
    assert saved(fit(first, package), tmp_path / "first.ckpt") == [PLAIN]


def test_two_of_one_name_write_into_folders_of_their_own(tmp_path: Path) -> None:
    package = pytorch_lightning
    logger = package.loggers.CSVLogger(tmp_path)
    run = fit(trainer(package, tmp_path, [quiet(), quiet()], logger=logger), package)
    folders = [w.run_dir for w in ours(run)]
    assert folders == [Path(logger.log_dir, "gradwatch"), Path(logger.log_dir, "gradwatch-2")]
    assert all((folder / "meta.json").exists() for folder in folders if folder)


@pytest.mark.parametrize("package", PACKAGES)
def test_one_that_is_listed_twice_measures_each_step_once(package: Any, tmp_path: Path) -> None:
    watch = quiet()
    run = fit(trainer(package, tmp_path, [watch, watch]), package)
    assert [r.step for r in watch.history] == [0, 1, 2]
    assert saved(run, tmp_path / "x.ckpt") == [PLAIN]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        pytest.param(["a", "b"], ["a", "b"], id="nothing-to-do"),
        pytest.param(["a", "a", "a"], ["a", "a-2", "a-3"], id="counted"),
        pytest.param(["a", "a", "a-2"], ["a", "a-3", "a-2"], id="a-given-name-stays"),
        pytest.param(["a-2", "a", "a", "a-2"], ["a-2", "a", "a-3", "a-2-2"], id="both-ways"),
    ],
)
def test_the_first_keeps_its_name_and_the_others_get_one_that_nobody_has(given: list[str], named: list[str]) -> None:
    assert list(own_names(enumerate(given)).values()) == named


HAND_OVERS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "the-list": lambda callbacks: callbacks,
    "a-new-list": list,
    "copies": copy.deepcopy,
    "itself-and-copies": lambda given: [*given, *(copy.deepcopy(c) for c in given if isinstance(c, GradWatch))],
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("hand_over", HAND_OVERS.values(), ids=HAND_OVERS)
def test_however_callbacks_are_handed_on_the_environments_saves_under_one_key(
    hand_over: Any, package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADWATCH", "1")
    run = fit(trainer(package, tmp_path, None, enable_checkpointing=False), package)
    for number in range(2):
        kept = hand_over(run.callbacks)
        run = trainer(package, tmp_path, kept, enable_checkpointing=False)
        assert len({w.state_key for w in ours(run)}) == len(ours(run))
        fit(run, package)
        assert saved(run, tmp_path / f"{number}.ckpt") == [ENVIRONMENT]
        assert [len(w.history) for w in ours(run) if w.history] == [3]


def test_the_environments_key_stays_when_other_trainers_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytorch_lightning
    monkeypatch.setenv("GRADWATCH", "1")
    early = fit(trainer(package, tmp_path, None), package)
    late = fit(trainer(package, tmp_path, None), package)
    assert saved(early, tmp_path / "early.ckpt") == saved(late, tmp_path / "late.ckpt") == [ENVIRONMENT]
    with monkeypatch.context() as context:
        context.setattr("gradwatch.watch._session.Session.load_state_dict", lambda self, state: taken.append(state))
        taken: list[Any] = []
        early.fit_loop.max_epochs = 2
        fit(early, package, ckpt_path=tmp_path / "early.ckpt")
    assert len(taken) == 1


@pytest.mark.parametrize("mine_first", [True, False])
def test_the_environments_steps_back_from_the_scripts_own_which_keeps_its_key(
    mine_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, mine = pytorch_lightning, quiet()
    monkeypatch.setenv("GRADWATCH", "1")
    guests = ours(trainer(package, tmp_path, None))
    run = fit(trainer(package, tmp_path, [mine, *guests] if mine_first else [*guests, mine]), package)
    assert saved(run, tmp_path / "x.ckpt") == [PLAIN]
    assert [len(w.history) for w in ours(run) if w is not mine] == [0, 0]
