"""Surgery between task losses, in every home: one line in the training step, and the same weights."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from gradwatch import ConfigError, Watch, split
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.rules import Rule
from gradwatch.treatments import MicroBatchSurgery, Surgery

STEPS = 5
DATA = [
    {"x": row, "a": row.sum(), "b": -2 * row.sum()}
    for row in torch.randn(STEPS * 4, 6, generator=torch.Generator().manual_seed(3))
]
PLAIN = {"activations_every": None, "updates_every": None, "histograms_every": None, "on_error": "raise", "rules": []}


class TwoHeads(nn.Module):
    """Two tasks that pull a trunk apart."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    def losses(self, x, a, b):
        hidden = torch.tanh(self.trunk(x))
        return {"a": (self.a(hidden)[:, 0] - a).square().mean(), "b": (self.b(hidden)[:, 0] - b).square().mean()}

    def forward(self, x, a, b):
        return {"loss": split(**self.losses(x, a, b))}


def net():
    torch.manual_seed(0)
    return TwoHeads()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def loader():
    return DataLoader(DATA, batch_size=4)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def reference(surgery):
    model = net()
    optimizer = sgd(model)
    with Watch(model, optimizer, surgery=surgery, **PLAIN) as watch:
        for batch in loader():
            watch.backward(model.losses(**batch))
            watch.step()
            optimizer.zero_grad()
    return weights(model), watch.history


def by_plain(tmp_path, **options):
    model = net()
    optimizer = sgd(model)
    with Watch(model, optimizer, **{**PLAIN, **options}) as watch:
        for batch in loader():
            model(**batch)["loss"].backward()
            watch.step()
            optimizer.zero_grad()
    return model, watch.history


def by_lightning(tmp_path, **options):
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, i):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return sgd(self.net)

    lit, watch = Lit(), GradWatch(verbose=False, **{**PLAIN, **options})
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[watch], default_root_dir=tmp_path, **quiet).fit(
        lit, loader()
    )
    return lit.net, watch.history


def by_fabric(tmp_path, **options):
    with FabricGradWatch(verbose=False, **{**PLAIN, **options}) as watch:
        fabric = Fabric(accelerator="cpu", callbacks=[watch])
        inner = net()
        model, optimizer = fabric.setup(inner, sgd(inner))
        for batch in loader():
            fabric.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        history = watch.history
    return inner, history


def by_accelerate(tmp_path, **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    inner = net()
    model, optimizer = accelerator.prepare(inner, sgd(inner))
    with Watch(model, optimizer, **{**PLAIN, **options}) as watch:
        for batch in loader():
            accelerator.backward(model(**batch)["loss"])
            watch.step()
            optimizer.zero_grad()
    return inner, watch.history


class InOrder(Trainer):
    def get_train_dataloader(self):
        return loader()


def by_transformers(tmp_path, parts=1, **options):
    model, watch = net(), GradWatchCallback(verbose=False, **{**PLAIN, **options}, sinks=[])
    settings = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=parts,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    InOrder(model, settings, train_dataset=DATA, callbacks=[watch], optimizers=(sgd(model), None)).train()
    return model, watch.history


HOMES = {
    "plain": by_plain,
    "lightning": by_lightning,
    "fabric": by_fabric,
    "accelerate": by_accelerate,
    "transformers": by_transformers,
}


@pytest.mark.parametrize("surgery", [Surgery("pcgrad"), Surgery("upgrad", combine="direct")], ids=["pcgrad", "direct"])
@pytest.mark.parametrize("home", HOMES)
def test_surgery_is_the_same_in_every_home(home: str, surgery: Surgery, tmp_path: Path) -> None:
    model, history = HOMES[home](tmp_path, surgery=surgery)
    wanted, by_hand = reference(surgery)
    torch.testing.assert_close(weights(model), wanted, rtol=1e-5, atol=1e-6)
    assert [r.scalars["task_cos/a/b"] for r in history] == pytest.approx(
        [r.scalars["task_cos/a/b"] for r in by_hand], rel=1e-4
    )
    assert [r.global_norm for r in history] == pytest.approx([r.global_norm for r in by_hand], rel=1e-4)
    bare, _ = HOMES[home](tmp_path)
    assert not torch.allclose(weights(bare), wanted, rtol=1e-3)


class Early(Rule):
    """Fires at the second step."""

    severity: str = "info"
    needs = frozenset({"grad_norm"})

    def judge(self, record, state):
        return self.whole(record, record.step == 1, 1.0, 0.0), state


@pytest.mark.parametrize("home", HOMES)
def test_a_rule_switches_surgery_on_in_every_home(home: str, tmp_path: Path) -> None:
    _, history = HOMES[home](tmp_path, rules=[Early(then=Surgery("pcgrad"))])
    known = [("task_cos/a/b" in r.scalars) for r in history]
    assert known[:2] == [False, False]
    assert all(known[3:])


def test_surgery_between_micro_batches_is_refused_by_fabric_with_the_places_where_it_works() -> None:
    with pytest.raises(ConfigError, match="It works in Watch and in the callbacks of Lightning and Hugging Face"):
        FabricGradWatch(surgery=MicroBatchSurgery())


@pytest.mark.parametrize("settings", [("pcgrad",), ()], ids=["pcgrad", "only-measured"])
def test_surgery_between_micro_batches_is_the_same_under_hugging_face(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    model, history = by_transformers(tmp_path, parts=2, surgery=MicroBatchSurgery(*settings))
    plain = net()
    optimizer = sgd(plain)
    with Watch(plain, optimizer, **PLAIN, surgery=MicroBatchSurgery(*settings)) as watch:
        for i, batch in enumerate(loader()):
            # The fifth is a step of its own.
            last = i % 2 == 1 or i == STEPS - 1
            watch.backward(plain(**batch)["loss"], parts=2 if i < STEPS - 1 else 1, last=last, batch_size=4)
            if last:
                watch.step()
                optimizer.zero_grad()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    found, expected = ([r.scalars.get("micro_cos") for r in records] for records in (history, watch.history))
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    assert found[2:] == expected[2:] == [None]


def test_split_is_a_plain_sum_once_training_is_over(tmp_path: Path) -> None:
    for home in HOMES.values():
        home(tmp_path, surgery="pcgrad")
        model = net()
        loss = model(**next(iter(loader())))["loss"]
        assert loss._backward_hooks is None
