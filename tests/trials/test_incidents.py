"""`what_if=True`: at the first critical incident the training is tried again; the run itself goes on as without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import Watch
from gradwatch.errors import ConfigError
from gradwatch.records import CaseFile
from gradwatch.rules import NonFinite
from gradwatch.runs import read_run

STEPS, BAD = 30, 22


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))


def data(steps=STEPS):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(steps, 16, 8, generator=generator)
    y = x[..., :2].sum(-1, keepdim=True)
    x[BAD, 3, 1] = torch.nan
    return x, y


def fit(what_if, *, own_targets=False, **options):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rules = [NonFinite(severity="critical")]
    with Watch(model, optimizer, rules=rules, on_error="raise", what_if=what_if, **options) as watch:
        for x, y in zip(*data(), strict=True):
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.mse_loss(outputs, y)
            loss.backward()
            if own_targets:
                watch.step(loss, batch=x, outputs=outputs, targets=y)
            else:
                watch.step(loss, batch=(x, y), outputs=outputs)
    return watch, [*model.parameters(), *model.buffers(), torch.get_rng_state()]


def same(a, b):
    return all(torch.equal(s.nan_to_num(7), t.nan_to_num(7)) for s, t in zip(a, b, strict=True))


def test_the_cure_leads_the_advice_and_stands_in_the_case_and_the_run_folder(tmp_path, capsys) -> None:
    _, bare = fit(False)
    watch, values = fit(F.mse_loss, run_dir=tmp_path / "run")
    assert same(bare, values)
    incident = watch.incidents[0]
    assert (incident.rule, incident.first_step) == ("non_finite", BAD)
    found = incident.case.what_if
    assert found.winner.name == "finite inputs", str(found)
    assert not found.control.is_finite
    assert incident.advice.startswith("Tried over ")
    assert "inputs or targets hold values that are not finite" in incident.advice
    assert "“finite inputs” cures it" in str(incident.case)
    (read,) = [i for i in read_run(tmp_path / "run").incidents if i.rule == "non_finite"]
    assert read.case.what_if.to_dict() == found.to_dict()
    assert read.advice == incident.advice
    again = CaseFile.from_json(incident.case.to_json())
    assert again.what_if.winner.name == "finite inputs"
    assert "finite inputs" in watch.summary()


def test_a_trouble_that_does_not_come_again_has_no_cure() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(STEPS, 16, 8)
    rules = [NonFinite(severity="critical")]
    with Watch(model, optimizer, rules=rules, on_error="raise", what_if=F.mse_loss) as watch:
        for i in range(STEPS):
            loss = F.mse_loss(model(x[i]), x[i, :, :1]) * (torch.nan if i == BAD else 1)
            loss.backward()
            watch.step(loss, batch=(x[i], x[i, :, :1]))
            optimizer.zero_grad()
    found = watch.incidents[0].case.what_if
    assert found.winner is None
    assert "stayed finite" in found.why_not


def test_a_loss_function_of_torch_is_found_by_what_it_gives() -> None:
    watch, _ = fit(True)
    assert watch.incidents[0].case.what_if.winner.name == "finite inputs"


def test_nothing_is_held_once_it_was_tried_or_the_run_is_over() -> None:
    watch, _ = fit(F.mse_loss)
    what_ifs = watch.session.what_ifs
    assert not what_ifs._snapshots
    assert not what_ifs._steps
    assert what_ifs.loss_fn is None


def test_off_nothing_is_made() -> None:
    watch, _ = fit(False)
    assert watch.session.what_ifs is None
    assert watch.incidents[0].case.what_if is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"memory_limit_mb": 0.001}, "snapshots and copies of the training take"),
        ({"own_targets": True, "what_if": lambda model, batch: F.mse_loss(model(batch[0]), batch[1])}, "fails"),
    ],
    ids=["memory", "batch"],
)
def test_what_is_not_seen_is_said(options, why) -> None:
    watch, values = fit(options.pop("what_if", True), **options)
    found = watch.incidents[0].case.what_if
    assert found.winner is None
    assert why in found.why_not
    assert "what would cure it is not seen" in str(watch.incidents[0].case)
    assert same(values, fit(False)[1])


def test_a_setting_that_cannot_be_is_an_error() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"`what_if` must be True, False or the loss function\. Got 3\."):
        Watch(model, torch.optim.SGD(model.parameters(), 0.1), what_if=3)


def lightning_fit(what_if):
    import lightning.pytorch as pl

    from gradwatch.callbacks import GradWatch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, i):
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    x, y = data()
    loader = DataLoader(TensorDataset(x.flatten(0, 1), y.flatten(0, 1)), batch_size=16)
    callback = GradWatch(rules=[NonFinite(severity="critical")], what_if=what_if, verbose=False, on_error="raise")
    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet).fit(
        module, loader
    )
    return callback, [*module.parameters(), *module.buffers(), torch.get_rng_state()]


@pytest.mark.slow
def test_in_lightning_the_training_step_is_run_again() -> None:
    callback, values = lightning_fit(True)
    found = callback.incidents[0].case.what_if
    assert found.winner is not None, str(found)
    assert found.winner.name == "finite inputs"
    assert same(values, lightning_fit(False)[1])


@pytest.mark.slow
def test_in_the_hugging_face_trainer_the_model_makes_its_loss_again(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    from gradwatch.callbacks.transformers import GradWatchCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            outputs = self.net(x)
            return {"loss": F.mse_loss(outputs, labels), "logits": outputs}

    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
    callback = GradWatchCallback(rules=[NonFinite(severity="critical")], what_if=True, on_error="raise")
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=16,
        max_steps=STEPS,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    torch.manual_seed(0)
    Trainer(Model(), arguments, train_dataset=rows, callbacks=[callback]).train()
    found = callback.incidents[0].case.what_if
    assert found.why_not == ""
    assert found.winner is not None, str(found)
    assert found.winner.name == "finite inputs"
