"""Case files under trainers: which batch and samples it was, without a word of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradwatch.callbacks import GradWatch
from gradwatch.records import CaseFile

from .test_lightning import trainer
from .test_say import Named


def fit(folder: Path, loader: DataLoader[Any], *, module: Any = None, **options: Any) -> CaseFile:
    watch = GradWatch(run_dir=folder / "run", verbose=False, on_error="raise", **options.pop("watch", {}))
    trainer(folder, watch, **options).fit(module or Named(), loader)
    (case,) = [i.case for i in watch.incidents if i.rule == "non_finite" and i.case is not None]
    return case


def test_lightning_tells_batch_epoch_and_samples(tmp_path: Path) -> None:
    case = fit(tmp_path, DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4))
    assert (case.step, case.batch_idx, case.epoch) == (5, 5, 0)
    assert case.sample_ids == (20, 21, 22, 23)


def test_accumulated_micro_batches_are_all_told(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4)
    case = fit(tmp_path, loader, accumulate_grad_batches=2)
    assert (case.step, case.batch_idx) == (2, 5)
    assert case.sample_ids == tuple(range(16, 24))


def test_of_a_loader_that_shuffles_nothing_is_guessed(tmp_path: Path) -> None:
    case = fit(tmp_path, DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4, shuffle=True))
    assert case.sample_ids == ()
    assert any("which samples" in note for note in case.notes)


class Numbered(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.randn(4), "uid": f"sample-{index}"}


class OfMappings(Named):
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step([batch["x"]], batch_idx)


def test_batches_that_name_their_samples_are_believed_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    loader = DataLoader(Numbered(), batch_size=4)
    case = fit(tmp_path, loader, module=OfMappings(), watch={"save_batch": True}, accumulate_grad_batches=2)
    assert case.sample_ids == tuple(f"sample-{i}" for i in range(16, 24))
    from safetensors.torch import load_file

    assert load_file(tmp_path / "run" / case.batch_file).keys() == {"micro0.x", "micro1.x"}
