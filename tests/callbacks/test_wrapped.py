"""Fabric and Accelerate: their wrapped models and optimizers, their loss scalers, their own ways."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gradwatch import ConfigError, Watch
from gradwatch.callbacks.fabric import GradWatch
from gradwatch.errors import TrainingStopped
from gradwatch.rules import NonFinite
from gradwatch.treatments import Checkpoint

from .loops import Batches, Job, Net, adam, fabric


def quiet(rules="default", **options) -> GradWatch:
    return GradWatch(rules, verbose=False, on_error="raise", **options)


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_a_fabric_script_is_watched_without_a_line_in_its_loop(tmp_path: Path) -> None:
    with quiet("autoclip", activations_every=1) as watch:
        runs = Fabric(accelerator="cpu", callbacks=[watch])
        inner = Net()
        model, optimizer = runs.setup(inner, adam(inner))
        for batch in Job(tmp_path, Batches(8, bad=(5,))).loader():
            runs.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        assert [r.step for r in watch.history] == list(range(8))
        assert all(r.has_loss for r in watch.history)
        assert "output_rms" not in watch.history[0].columns
        assert "output_rms" in watch.history[1].columns
        assert [r.step for r in watch.history if r.skipped] == [5]
        assert "gradwatch: 8 records" in watch.summary()


def test_fabrics_clip_hides_nothing_whether_it_comes_before_the_look_or_after(tmp_path: Path) -> None:
    for called in (False, True):
        with quiet("observe") as watch:
            runs = Fabric(accelerator="cpu", callbacks=[watch])
            inner = Net()
            model, optimizer = runs.setup(inner, adam(inner))
            for batch in Job(tmp_path, Batches(3)).loader():
                runs.backward(model(**batch)["loss"])
                if called:
                    runs.call("on_before_optimizer_step", optimizer)
                norm = runs.clip_gradients(model, optimizer, max_norm=0.1)
                optimizer.step()
                optimizer.zero_grad()
            assert watch.history[-1].global_norm == pytest.approx(float(norm), rel=1e-5)
            assert [r.global_norm_applied for r in watch.history] == pytest.approx([0.1] * 3, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("door", ["callback", "watch"])
def test_gradients_are_unscaled_under_fabrics_loss_scaler(tmp_path: Path, door: str, fused: bool) -> None:
    watch = quiet("autoclip") if door == "callback" else None
    runs = Fabric(accelerator="cpu", plugins=[scaled()], callbacks=[watch] if watch else None)
    inner = Net()
    model, optimizer = runs.setup(inner, torch.optim.AdamW(inner.parameters(), 2e-3, fused=fused))
    watch = watch or Watch(model, optimizer, rules="autoclip", on_error="raise")
    wanted = []
    for batch in Job(tmp_path, Batches(4)).loader():
        outputs = model(**batch)
        runs.backward(outputs["loss"])
        grads = [p.grad.double() / runs.strategy.precision.scaler.get_scale() for p in inner.parameters()]
        wanted.append(float(torch.stack([g.norm() for g in grads]).norm()))
        if door == "watch":
            watch.step(outputs["loss"], batch=batch)
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert [r.global_norm for r in watch.history] == pytest.approx(wanted, rel=1e-5)
    assert [r.scalars["grad_scale"] for r in watch.history] == [1024.0] * 4
    watch.close()


def test_watch_takes_what_fabric_has_set_up_and_gives_the_callbacks_records(tmp_path: Path) -> None:
    by_callback = fabric(Job(tmp_path, Batches(6), watched={})).watch.history
    runs = Fabric(accelerator="cpu")
    inner = Net()
    model, optimizer = runs.setup(inner, adam(inner))
    with Watch(model, optimizer, on_error="raise") as watch:
        for batch in Job(tmp_path, Batches(6)).loader():
            outputs = model(**batch)
            runs.backward(outputs["loss"])
            watch.step(outputs["loss"], batch=batch, outputs=outputs)
            optimizer.zero_grad()
    assert [r.index.paths for r in watch.history] == [r.index.paths for r in by_callback]
    assert [r.global_norm for r in watch.history] == pytest.approx([r.global_norm for r in by_callback], rel=1e-6)


def test_numbers_and_notes_of_ones_own_are_on_fabrics_records(tmp_path: Path) -> None:
    with quiet([NonFinite()], run_dir=tmp_path / "run") as watch:
        runs = Fabric(accelerator="cpu", callbacks=[watch])
        inner = Net()
        model, optimizer = runs.setup(inner, adam(inner))
        watch.annotate("here the data changes", silence=3)
        for number, batch in enumerate(Job(tmp_path, Batches(4, bad=(1,))).loader()):
            watch.record(number=number, loss_scale=torch.tensor(2.0))
            runs.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert [r.scalars["number"] for r in watch.history] == [0, 1, 2, 3]
    assert [r.scalars["loss_scale"] for r in watch.history] == [2.0] * 4
    assert [i.first_step for i in watch.incidents] == [3]
    assert "here the data changes" in (tmp_path / "run" / "annotations.jsonl").read_text()


def test_a_checkpoint_is_asked_for_in_a_fabric_loop(tmp_path: Path) -> None:
    asked: list[str] = []
    with quiet([NonFinite(then=Checkpoint())], on_checkpoint=asked.append) as watch:
        runs = Fabric(accelerator="cpu", callbacks=[watch])
        inner = Net()
        model, optimizer = runs.setup(inner, adam(inner))
        for batch in Job(tmp_path, Batches(3, bad=(1,))).loader():
            runs.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert asked == ["gradwatch-non_finite-1"]


def test_ten_bad_steps_stop_a_fabric_loop_with_an_error(tmp_path: Path) -> None:
    inner, watch = Net(), quiet("autoclip")

    def train() -> None:
        runs = Fabric(accelerator="cpu", callbacks=[watch])
        model, optimizer = runs.setup(inner, adam(inner))
        for batch in Job(tmp_path, Batches(20, bad=tuple(range(2, 20)))).loader():
            runs.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(TrainingStopped, match="10 optimizer steps in a row"):
        train()
    assert len(watch.history) == 12
    assert all(torch.isfinite(p).all() for p in inner.parameters())
    assert not any(m._forward_hooks for m in inner.modules())


def test_fabrics_loggers_and_validation_are_used(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="tb")
    with quiet(log_every=1) as watch:
        runs = Fabric(accelerator="cpu", callbacks=[watch], loggers=[logger])
        inner = Net()
        model, optimizer = runs.setup(inner, adam(inner))
        for batch in Job(tmp_path, Batches(3)).loader():
            runs.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            runs.call("on_validation_end", loss=0.5)
    assert [r.scalars.get("val_loss") for r in watch.history] == [None, 0.5, 0.5]
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    assert len(events.Scalars("gradwatch/global_norm")) == 3
    assert (Path(logger.log_dir) / "gradwatch" / "meta.json").exists()


def test_optimizers_named_together_share_one_watch_and_step_in_turns(tmp_path: Path) -> None:
    with quiet() as watch:
        runs = Fabric(accelerator="cpu", callbacks=[watch])
        inner = Net()
        model, first, second = runs.setup(inner, adam(inner.body), adam(inner.head))
        runs.call("watch", first, second)
        for batch in Job(tmp_path, Batches(4)).loader():
            for optimizer in (first, second):
                runs.backward(model(**batch)["loss"])
                optimizer.step()
                model.zero_grad()
        assert len(watch.watches) == 1
        assert [r.scalars["optimizer"] for r in watch.history] == [0.0, 1.0] * 4
        assert not watch.incidents


def test_an_optimizer_that_is_not_of_this_fabric_is_refused(tmp_path: Path) -> None:
    with quiet() as watch:
        Fabric(accelerator="cpu", callbacks=[watch]).setup(Net())
        with pytest.raises(ConfigError, match="hold no parameter of a module"):
            watch.watch(adam(Net()))


def test_accelerate_accumulates_and_the_watch_waits(tmp_path: Path, accelerator: Accelerator) -> None:
    inner = Net()
    model, optimizer, loader = accelerator.prepare(inner, adam(inner), Job(tmp_path, Batches(6)).loader())
    losses = []
    with Watch(model, optimizer, on_error="raise") as watch:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                losses.append(loss.item())
                accelerator.backward(loss)
                outcome = watch.step(loss, batch=batch)
                assert (outcome.record is not None) == accelerator.sync_gradients
                optimizer.zero_grad()
    assert watch.num_steps == 3
    assert [r.loss for r in watch.history] == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert [r.num_samples for r in watch.history] == [16] * 3


def test_an_optimizer_inside_the_users_own_is_measured_and_the_outer_one_steps() -> None:
    class Outer:
        def __init__(self, optimizer):
            self.optimizer, self.steps = optimizer, 0

        def step(self):
            self.steps += 1
            self.optimizer.step()

    model = nn.Linear(2, 1)
    outer = Outer(torch.optim.SGD(model.parameters(), 0.1))
    with Watch(model, outer, on_error="raise") as watch:
        model(torch.ones(3, 2)).sum().backward()
        watch.step()
    assert outer.steps == 1
    assert len(watch.history) == 1


@pytest.mark.parametrize(("given", "words"), [([], "at least one"), (3, "Got int"), (None, "Got NoneType")])
def test_what_is_no_optimizer_is_an_error(given: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Watch(nn.Linear(2, 1), given)
