"""`run_dir` means the same at every door: a folder, True (keep files), False (keep none), None (as this door does)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.errors import ConfigError
from gradwatch.watch import run_dir_of

from .test_lightning import trainer
from .test_say import Named


def loop(run_dir: Any) -> Path | None:
    model = nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), run_dir=run_dir) as watch:
        return watch.session.run_dir


def test_a_plain_loop_keeps_files_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loop(None) is loop(False) is None
    assert list(tmp_path.iterdir()) == []
    assert [loop(True), loop(True), loop("mine")] == [Path("gradwatch"), Path("gradwatch-1"), Path("mine")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gradwatch", "gradwatch-1", "mine"]


@pytest.mark.parametrize(
    ("given", "kept", "found"),
    [
        (None, None, None),
        (False, "logs", None),
        (None, "logs", "logs/name"),
        (True, "logs", "logs/name"),
        (True, None, "name"),
        ("here", "logs", "here"),
    ],
)
def test_each_value_means_one_thing(given: Any, kept: str | None, found: str | None) -> None:
    assert run_dir_of(given, "name", None if kept is None else Path(kept)) == (None if found is None else Path(found))


def test_true_keeps_files_of_a_trainer_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = GradWatch(run_dir=True, verbose=False)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)
    trainer(tmp_path, callback, default_root_dir=None, logger=False, enable_checkpointing=False).fit(Named(), data)
    assert (tmp_path / "gradwatch" / "meta.json").is_file()


@pytest.mark.parametrize("door", [GradWatch, GradWatchCallback, FabricGradWatch, loop])
def test_what_is_no_folder_is_an_error_at_the_door(door: Any) -> None:
    with pytest.raises(ConfigError, match=r"`run_dir` takes a folder, True, False or None\. Got 3"):
        door(run_dir=3)
