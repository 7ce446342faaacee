"""Which samples carried the gradient, told with the incident, in every loop, and without a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import Watch
from gradwatch.errors import GradwatchWarning
from gradwatch.runs import read_run

from ..modes.ranks import run_group
from . import rank_cases
from .faulty import RULES, SIZE, WHEN, WHO, data, network


def told(incidents, rule: str):
    return next(i for i in incidents if i.rule == rule).details["samples"]


def fit(fault: str, *, autopsy: bool = True, scaler=None, parts: int = 1, steps: int = WHEN + 2):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"rules": RULES, "autopsy": autopsy, "on_error": "raise", "scaler": scaler}
    with Watch(model, optimizer, **options) as watch:
        for x, y in data(steps, fault):
            optimizer.zero_grad()
            chunks = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
            for number, (inputs, targets) in enumerate(chunks):
                loss = F.mse_loss(model(inputs), targets)
                scaled = loss / parts
                (scaled if scaler is None else scaler.scale(scaled)).backward()
                if number < parts - 1:
                    watch.micro_batch(loss, inputs)
            watch.step(loss, batch=(inputs, targets))
        assert watch.session.engine._replays == []
    return watch, [*model.parameters(), *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize(("fault", "rule"), [("target", "exploding"), ("target", "loss_spike"), ("nan", "non_finite")])
def test_the_sample_is_named_with_the_incident(fault: str, rule: str) -> None:
    watch, _ = fit(fault)
    first = told(watch.incidents, rule)[0]
    assert first["index"] == WHO
    assert first["is_finite"] == (fault != "nan")
    if fault == "target":
        assert first["share"] > 0.8
        assert first["loss"] > 1e5


def test_norms_are_of_parts_of_the_gradient_as_the_optimizer_gets_it() -> None:
    watch, _ = fit("target")
    record = next(r for r in watch.history if r.step == WHEN)
    first = told(watch.incidents, "exploding")[0]
    assert first["norm"] * first["cosine"] == pytest.approx(first["share"] * record.global_norm, rel=1e-3)
    scaled, _ = fit("target", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    assert told(scaled.incidents, "exploding")[0]["norm"] == pytest.approx(first["norm"], rel=1e-3)


def test_the_micro_batch_is_named() -> None:
    watch, _ = fit("target", parts=4)
    samples = told(watch.incidents, "exploding")
    assert (samples[0]["micro_batch"], samples[0]["index"]) == (WHO // 4, WHO % 4)
    incident = next(i for i in watch.incidents if i.rule == "exploding")
    assert incident.details["samples_of"] == SIZE


@pytest.mark.parametrize("fault", ["target", "nan"])
def test_taking_a_batch_apart_changes_no_bit_of_the_run(fault: str) -> None:
    _, bare = fit(fault, autopsy=False)
    watch, values = fit(fault)
    assert any(i.details.get("samples") for i in watch.incidents)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(bare, values, strict=True))


def test_what_can_not_be_told_apart_is_one_warning_and_no_harm() -> None:
    class Many(nn.Module):
        """Runs through its batch once: a second pass breaks."""

        def __init__(self):
            super().__init__()
            self.inner, self.seen = network(), set()

        def forward(self, x):
            if id(x) in self.seen:
                raise RuntimeError("seen already")
            self.seen.add(id(x))
            return self.inner(x)

    model = Many()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept = list(data(WHEN + 2, "target"))

    def run() -> Watch:
        with Watch(model, optimizer, rules=RULES, autopsy=True) as watch:
            for x, y in kept:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                watch.step(loss)
        return watch

    with pytest.warns(GradwatchWarning) as warned:
        watch = run()
    texts = [str(w.message) for w in warned if "telling samples apart" in str(w.message)]
    assert len(texts) == 1
    assert "exploding" in {i.rule for i in watch.incidents}


@pytest.mark.slow
@pytest.mark.parametrize("case", rank_cases.CASES)
def test_ranks_name_the_sample_of_one_of_them(case: str, tmp_path: Path) -> None:
    assert run_group("tests.samples.rank_cases", 2, tmp_path, [case]) == {case: ""}


def test_lightning_names_the_sample() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from gradwatch.callbacks import GradWatch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.mse_loss(self.network(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    x, y = (torch.cat(part) for part in zip(*data(WHEN + 2, "target"), strict=True))
    watch = GradWatch(rules=RULES, autopsy=True, on_error="raise", verbose=False)
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(callbacks=[watch], logger=False, enable_checkpointing=False, **options)
    trainer.fit(Module(), DataLoader(TensorDataset(x, y), batch_size=SIZE))
    first = told(watch.incidents, "exploding")[0]
    assert first["index"] == WHO
    assert first["loss"] > 1e5
    assert np.isfinite(first["norm"])


def test_hugging_face_names_the_sample(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from gradwatch.callbacks.transformers import GradWatchCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x, labels):
            outputs = self.network(x)
            return {"loss": F.mse_loss(outputs, labels), "logits": outputs}

    items = [{"x": a, "labels": b} for x, y in data(WHEN + 2, "target") for a, b in zip(x, y, strict=True)]
    options = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0}
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=SIZE // 2, gradient_accumulation_steps=2, num_train_epochs=1,
        learning_rate=0.01, optim="sgd", lr_scheduler_type="constant", **options,
    )  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    watch = GradWatchCallback(rules=RULES, autopsy=True, on_error="raise", verbose=False, run_dir=False)
    InOrder(Model(), arguments, train_dataset=items, callbacks=[watch]).train()
    first = told(watch.incidents, "exploding")[0]
    assert (first["micro_batch"], first["index"]) == (WHO // 8, WHO % 8)
    assert first["share"] > 0.8


def test_the_case_file_names_it_with_its_item_of_the_data_set(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, rules=RULES, autopsy=True, on_error="raise", run_dir=tmp_path / "run") as watch:
        for step, (x, y) in enumerate(data(WHEN + 2, "target")):
            optimizer.zero_grad()
            items = {"x": x, "y": y, "idx": torch.arange(SIZE) + SIZE * step}
            loss = F.mse_loss(model(x), y)
            loss.backward()
            watch.step(loss, batch=items)
    live = next(i.case for i in watch.incidents if i.rule == "exploding")
    for case in (live, next(c for c in read_run(tmp_path / "run").cases if c.rule == "exploding")):
        first = case.samples[0]
        assert (first.index, first.dataset_index) == (WHO, WHEN * SIZE + WHO)
        assert first.share > 0.8
        assert case.check_first()[0].startswith(f"sample {WHO} (item {WHEN * SIZE + WHO} of the data set) carries")
        assert case.sample_ids[WHO] == first.dataset_index


def test_fabric_names_the_sample() -> None:
    fabric = pytest.importorskip("lightning.fabric")
    from gradwatch.callbacks.fabric import GradWatch

    watch = GradWatch(rules=RULES, autopsy=True, on_error="raise", verbose=False, run_dir=False)
    engine = fabric.Fabric(accelerator="cpu", devices=1, callbacks=[watch])
    model = network()
    model, optimizer = engine.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for x, y in data(WHEN + 2, "target"):
        engine.backward(F.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert told(watch.incidents, "exploding")[0]["index"] == WHO


def test_accelerate_names_the_sample() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with Watch(model, optimizer, rules=RULES, autopsy=True, on_error="raise") as watch:
        for x, y in data(WHEN + 2, "target"):
            for half in (slice(0, SIZE // 2), slice(SIZE // 2, None)):
                with accelerator.accumulate(model):
                    loss = F.mse_loss(model(x[half]), y[half])
                    accelerator.backward(loss)
                    watch.step(loss)
                    optimizer.zero_grad()
    first = told(watch.incidents, "exploding")[0]
    assert (first["micro_batch"], first["index"]) == (0, WHO)
