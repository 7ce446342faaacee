"""Case files under trainers: which batch and samples it was, without a word of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.records import CaseFile
from gradwatch.rules import Expression

from .hf import arguments
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


class Indexed(Dataset[dict[str, Any]]):
    """Whose samples hold their own place."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index), 1.0]), "labels": torch.zeros(1)}


class Seeing(nn.Module):
    """Remembers which samples it was given, one list a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.seen: list[list[int]] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(x[:, 0].int().tolist())
        return {"loss": (self.layer(x / 40) - labels).square().mean()}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def hf_fit(folder: Path, *, resume: str = "", **options: Any) -> tuple[GradWatchCallback, Seeing]:
    watch = GradWatchCallback([Expression("step == 7", name="seventh")], verbose=False, on_error="raise")
    model = Seeing()
    given = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, **options}
    settings = arguments(folder, **given)
    running = InOrder(model, settings, train_dataset=Indexed(), callbacks=[watch])
    running.train(resume_from_checkpoint=str(folder / resume) if resume else None)
    return watch, model


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("resume", ["", "checkpoint-6", "data-again"])
def test_hugging_face_batches_have_their_numbers_in_every_epoch(tmp_path: Path, parts: int, resume: str) -> None:
    given = {"gradient_accumulation_steps": parts}
    watch, model = hf_fit(tmp_path, **given)
    if resume:
        # With `ignore_data_skip` the data begin anew.
        again = {"ignore_data_skip": True} if resume == "data-again" else {}
        watch, model = hf_fit(tmp_path, resume="checkpoint-6", **given, **again)
    seen = iter(model.seen)
    samples = {}
    for record in watch.history:
        micro = [next(seen) for _ in range(record.num_samples // 4)]
        assert record.batch_idx == micro[-1][0] // 4
        samples[record.step] = tuple(index for batch in micro for index in batch)
    assert next(seen, None) is None
    assert min(samples) == (6 if resume else 0)
    assert watch.history[-1].epoch == 1
    case = watch.incidents[0].case
    assert case is not None
    assert (case.step, case.sample_ids) == (7, samples[7])
    assert case.samples_from == "indices in the data set, read in order"


def fabric_fit(folder: Path, loop: str, *, epochs: int = 2) -> tuple[FabricGradWatch, Seeing]:
    rules = [Expression("step >= 0", name="each")]
    watch = FabricGradWatch(rules, run_dir=folder / "run", verbose=False, on_error="raise")
    fabric = Fabric(accelerator="cpu", callbacks=[watch])
    net = Seeing()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(Indexed(), batch_size=4))
    for _ in range(epochs):
        if loop == "template":
            fabric.call("on_train_epoch_start")
        for batch_idx, batch in enumerate(watch.batches(loader) if loop == "batches" else loader):
            if loop == "template":
                fabric.call("on_train_batch_start", batch, batch_idx)
            fabric.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    fabric.call("on_train_end")
    return watch, net


@pytest.mark.parametrize("loop", ["batches", "template", "untold"])
def test_fabric_batches_have_their_numbers_where_the_loop_tells_them(tmp_path: Path, loop: str) -> None:
    watch, net = fabric_fit(tmp_path, loop)
    told = [(-1, -1)] * 20 if loop == "untold" else [(epoch, batch) for epoch in range(2) for batch in range(10)]
    assert [(record.epoch, record.batch_idx) for record in watch.history] == told
    case = watch.incidents[0].case
    assert case is not None
    assert case.sample_ids == (tuple(net.seen[0]) if loop == "batches" else ())


def test_fabric_case_names_the_samples_of_its_first_batch_too(tmp_path: Path) -> None:
    """Its Watch is made when the optimizer steps, after the batch was shown."""
    watch = FabricGradWatch([Expression("step == 0", name="one")], verbose=False, on_error="raise", run_dir=False)
    fabric = Fabric(accelerator="cpu", callbacks=[watch])
    net = nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for batch in watch.batches(DataLoader(Numbered(), batch_size=4, shuffle=True)):
        first = batch["uid"]
        fabric.backward(model(batch["x"]).square().mean())
        optimizer.step()
        break
    watch.close()
    (incident,) = watch.incidents
    assert incident.case is not None
    assert incident.case.sample_ids == tuple(first)


def test_an_epoch_without_a_batch_number_is_said_as_it_is() -> None:
    assert CaseFile(rule="r", step=3, epoch=2).batch == "a batch of epoch 2"
    assert CaseFile(rule="r", step=3, epoch=2, batch_idx=7).batch == "batch 7 of epoch 2"
