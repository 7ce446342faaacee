"""Which metrics are validation metrics, and what they are called on record: one answer for every trainer."""

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch import Watch
from gradwatch.watch import validation_name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        pytest.param(key, name, id=key)
        for key, name in {
            "val_loss": "val_loss",
            "Val/Loss": "val_loss",
            "loss/val": "val_loss",
            "dev_loss": "val_loss",
            "valid_acc": "val_acc",
            "validation/loss": "val_loss",
            "eval_loss": "val_loss",
            "test_loss": "val_loss",
            "valLoss": "val_loss",
            "metrics/val/f1_score": "val_metrics_f1_score",
            "val": "val_value",
            "val_loss/dataloader_idx_0": "val_loss",
            "val_loss/dataloader_idx_1": "val_loss_dataloader_idx_1",
            "train_eval_loss": "train_eval_loss",
            "value_loss": None,
            "interval": None,
            "developer": None,
            "evaluated": None,
            "train/val_split": None,
            "loss": None,
        }.items()
    ],
)
def test_a_validation_metric_is_told_by_a_word_of_its_own(key, name):
    assert validation_name(key) == name


@pytest.mark.parametrize(
    ("key", "name"), [("loss", "val_loss"), ("value_loss", "val_value_loss"), ("val/f1", "val_f1")]
)
def test_a_metric_known_to_be_of_validation_needs_no_such_word(key, name):
    assert validation_name(key, known=True) == name


class Computes:
    def compute(self):
        raise AssertionError("gradwatch computes no metric: that may wait for other ranks")


class Raises:
    def __float__(self):
        raise RuntimeError("not now\n" * 500)


def test_metrics_of_any_kind_cost_only_themselves():
    model = nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), rules=[]) as watch:
        with pytest.warns(UserWarning, match="gradwatch: the validation metric") as said:
            watch.validation(
                torch.tensor(0.5),
                acc=np.float32(0.25),
                f1=torch.ones(1, requires_grad=True),
                array=np.ones((1, 1)),
                nothing=None,
                report={"recall": 1, "note": None},
                text="0.5",
                per_class=torch.ones(3),
                metric=Computes(),
                raises=Raises(),
                weird=1j,
            )
        model(torch.ones(4, 2)).mean().backward()
        record = watch.step().record
    kept = {k: v for k, v in record.scalars.items() if k.startswith("val_")}
    assert kept == {"val_loss": 0.5, "val_acc": 0.25, "val_f1": 1, "val_array": 1, "val_report_recall": 1}
    assert len(said) == 5
    assert all(len(str(w.message)) < 300 and "\n" not in str(w.message) for w in said)
    assert sum("could not be read" in note for note in watch.session.notes) == 5


def test_inputs_of_a_validation_batch_stand_beside_those_of_training():
    model = nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1), rules=[]) as watch:
        watch.validation(loss=0.5, batch=(torch.tensor([[1.0, 3.0], [5.0, -7.0]]), torch.zeros(2)))
        model(torch.ones(4, 2)).mean().backward()
        record = watch.step().record
    assert record.scalars["val_input_mean"] == 0.5
    assert record.scalars["val_input_absmax"] == 7
    assert record.scalars["val_input_std"] == pytest.approx(np.std([1, 3, 5, -7]))
