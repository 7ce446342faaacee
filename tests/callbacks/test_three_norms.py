"""Three norms, measured: as backward produced it, as gradwatch's treatments left it, as the optimizer got it.

One table of programs and homes. Each program keeps the true norms by itself, in float64: when its backward is over, and
in its optimizer's own step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradwatch import Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks.fabric import GradWatch as FabricWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.records import StepRecord
from gradwatch.treatments import ClipByGlobalNorm

STEPS, SPIKE = 20, 7
MAX = 0.05
TREATED = 0.5
OPTIONS: dict[str, Any] = {"rules": "observe", "on_error": "raise"}


def norm_of(params: Any) -> float:
    grads = [p.grad.detach().double().flatten() for p in params if p.grad is not None]
    return float(torch.cat(grads).norm())


class Keeping(torch.optim.SGD):
    """Keeps the norm of what it gets."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-3)
        self.got: list[float] = []

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.got.append(norm_of(p for group in self.param_groups for p in group["params"]))
        super().step()
        return loss


class Net(nn.Module):
    """Its loss is 1e4 times as steep at one step. Keeps the true norm of each of its backwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.made: list[float] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        steep = 1e4 if len(self.made) == SPIKE else 1.0
        return {"loss": (self.net(x) - 1).square().mean() * steep}

    def over(self) -> None:
        self.made.append(norm_of(self.parameters()))


def by_norm(net: nn.Module) -> None:
    clip_grad_norm_(net.parameters(), MAX)


def by_value(net: nn.Module) -> None:
    clip_grad_value_(net.parameters(), MAX)


def spikes_only(net: nn.Module) -> None:
    if norm_of(net.parameters()) > 100:
        clip_grad_norm_(net.parameters(), MAX)


def past_the_counters(net: nn.Module) -> None:
    for p in net.parameters():
        assert p.grad is not None
        p.grad.data.clamp_(-MAX, MAX)


def replaced(net: nn.Module) -> None:
    for p in net.parameters():
        assert p.grad is not None
        p.grad = p.grad.clamp(-MAX, MAX)


def nothing(net: nn.Module) -> None:
    pass


CLIPS = [nothing, by_norm, by_value, spikes_only, past_the_counters, replaced]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(STEPS)]


Clip = Callable[[nn.Module], None]
Ran = tuple[list[StepRecord], list[float], list[float], str]


def plain(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    net = Net()
    optimizer = Keeping(net.parameters())
    with Watch(net, optimizer, treatments=treatments, **OPTIONS) as watch:
        for x in batches():
            loss = net(x)["loss"]
            loss.backward()
            net.over()
            ahead(net)
            watch.after_backward(loss)
            behind(net)
            optimizer.step()
            watch.after_step()
            optimizer.zero_grad()
    return watch.history, net.made, optimizer.got, watch.summary()


def accelerated(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    accelerator = Accelerator(cpu=True)
    net = Net()
    kept = Keeping(net.parameters())
    model, optimizer = accelerator.prepare(net, kept)
    with Watch(model, optimizer, treatments=treatments, **OPTIONS) as watch:
        for x in batches():
            loss = model(x)["loss"]
            accelerator.backward(loss)
            net.over()
            if ahead is by_norm:
                accelerator.clip_grad_norm_(model.parameters(), MAX)
            elif ahead is by_value:
                accelerator.clip_grad_value_(model.parameters(), MAX)
            else:
                ahead(net)
            watch.after_backward(loss)
            behind(net)
            optimizer.step()
            watch.after_step()
            optimizer.zero_grad()
    return watch.history, net.made, kept.got, watch.summary()


def fabric(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    watch = FabricWatch(run_dir=False, verbose=False, treatments=treatments, **OPTIONS)
    run = Fabric(accelerator="cpu", devices=1, callbacks=[watch])
    net = Net()
    kept = Keeping(net.parameters())
    model, optimizer = run.setup(net, kept)
    for x in batches():
        run.backward(model(x)["loss"])
        net.over()
        if ahead is by_norm:
            run.clip_gradients(model, optimizer, max_norm=MAX)
        elif ahead is by_value:
            run.clip_gradients(model, optimizer, clip_val=MAX)
        else:
            ahead(net)
        if behind is not nothing:
            run.call("on_before_optimizer_step", optimizer)
            behind(net)
        optimizer.step()
        optimizer.zero_grad()
    run.call("on_train_end")
    (only,) = watch.watches
    return only.history, net.made, kept.got, only.summary()


class Module(pl.LightningModule):
    def __init__(self, ahead: Clip, behind: Clip) -> None:
        super().__init__()
        self.net, self.ahead, self.behind = Net(), ahead, behind

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch)["loss"]

    def on_after_backward(self) -> None:
        self.net.over()
        self.ahead(self.net)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.behind(self.net)

    def configure_optimizers(self) -> Any:
        self.kept = Keeping(self.net.parameters())
        return self.kept


class Manual(Module):
    def __init__(self, ahead: Clip, behind: Clip) -> None:
        super().__init__(ahead, behind)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch)["loss"])
        if self.ahead is by_norm:
            self.clip_gradients(optimizer, gradient_clip_val=MAX, gradient_clip_algorithm="norm")
        elif self.ahead is by_value:
            self.clip_gradients(optimizer, gradient_clip_val=MAX, gradient_clip_algorithm="value")
        else:
            self.ahead(self.net)
        optimizer.step()

    def on_after_backward(self) -> None:
        self.net.over()


class Overridden(Module):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.behind(self.net)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


class InTheStep(Module):
    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        self.ahead(self.net)
        optimizer.step()

    def on_after_backward(self) -> None:
        self.net.over()  # type: ignore[operator]


def fit(module: Module, treatments: Any, folder: Path, **options: Any) -> Ran:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    watch = GradWatch(run_dir=False, verbose=False, treatments=treatments, **OPTIONS)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[watch], default_root_dir=folder, accelerator="cpu", enable_model_summary=False,
        **quiet, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    return watch.history, module.net.made, module.kept.got, watch.summary()


def lightning(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    return fit(Module(ahead, behind), treatments, folder)


def lightning_by_hand(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    return fit(Manual(ahead, behind), treatments, folder)


def lightning_overridden(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    return fit(Overridden(ahead, behind), treatments, folder)


def lightning_step(ahead: Clip, behind: Clip, treatments: Any, folder: Path) -> Ran:
    return fit(InTheStep(ahead, behind), treatments, folder)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": torch.cat(batches())[i], "labels": torch.zeros(1)}


class Behind(TrainerCallback):
    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.clip(model)


def hugging_face(ahead: Clip, behind: Clip, treatments: Any, folder: Path, max_norm: float = 0.0) -> Ran:
    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            model.train()
            loss = model(**inputs)["loss"]
            self.accelerator.backward(loss)
            net.over()
            ahead(net)
            return loss.detach()

    net = Net()
    kept = Keeping(net.parameters())
    watch = GradWatchCallback(run_dir=False, sinks=(), verbose=False, treatments=treatments, **OPTIONS)
    args = TrainingArguments(
        str(folder), max_steps=STEPS, report_to=[], use_cpu=True, max_grad_norm=max_norm, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=4,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.ConstantLR(kept, 1.0)
    callbacks = [watch, Behind(behind)]
    Own(net, args, train_dataset=Rows(), callbacks=callbacks, optimizers=(kept, schedule)).train()
    return watch.history, net.made, kept.got, watch.summary()


HOMES = [plain, accelerated, fabric, lightning, lightning_by_hand, hugging_face]


def check(ran: Ran, after: Callable[[float], float] | None = None) -> None:
    records, made, got, _ = ran
    assert len(records) == len(made) == len(got) == STEPS
    assert max(made) > 20, "the program has no spike"
    for record, produced, applied in zip(records, made, got, strict=True):
        assert record.global_norm == pytest.approx(produced, rel=1e-4), f"step {record.step}"
        if after is not None:
            assert record.global_norm_after == pytest.approx(after(produced), rel=1e-4), f"step {record.step}"
        assert record.global_norm_applied == pytest.approx(applied, rel=1e-4), f"step {record.step}"


@pytest.mark.parametrize("clip", CLIPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("home", [*HOMES, lightning_step], ids=lambda f: f.__name__)
def test_a_clip_ahead_of_gradwatch_hides_no_spike(home: Any, clip: Clip, tmp_path: Path) -> None:
    if home is hugging_face:
        pytest.skip("treatments come first there: gradwatch looks when backward is over")
    ran = home(clip, nothing, (), tmp_path)
    check(ran)
    assert [r.global_norm_after for r in ran[0]] == pytest.approx(ran[2], rel=1e-4)
    assert ("clipped the gradients" in ran[3]) == (clip is not nothing)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("home", [*HOMES, lightning_overridden], ids=lambda f: f.__name__)
def test_a_clip_behind_gradwatch_is_measured(home: Any, clip: Clip, tmp_path: Path) -> None:
    if home is lightning_by_hand:
        pytest.skip("nothing comes between there")
    ran = home(nothing, clip, (), tmp_path)
    check(ran, lambda produced: produced)
    assert ("changed the gradients" in ran[3]) == (clip is not nothing)
    assert "clipped the gradients" not in ran[3]


@pytest.mark.parametrize("home", HOMES, ids=lambda f: f.__name__)
def test_our_treatment_stands_between_the_two(home: Any, tmp_path: Path) -> None:
    clip = nothing if home is lightning_by_hand else by_value
    ran = home(nothing, clip, ClipByGlobalNorm(TREATED), tmp_path)
    if home is hugging_face:
        ran = (ran[0][1:], ran[1][1:], ran[2][1:], ran[3])  # the first window is treated at the last moment
        assert all(
            r.global_norm_after == pytest.approx(min(TREATED, m), rel=1e-4) for r, m in zip(*ran[:2], strict=True)
        )
        return
    check(ran, lambda produced: min(TREATED, produced))


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ({"gradient_clip_val": MAX}, f"Lightning's gradient_clip_val={MAX} (by norm) changed"),
        (
            {"gradient_clip_val": MAX, "gradient_clip_algorithm": "value"},
            f"Lightning's gradient_clip_val={MAX} (by value) changed",
        ),
    ],
    ids=["norm", "value"],
)
def test_lightnings_own_clip_is_measured_and_named(options: Any, who: str, tmp_path: Path) -> None:
    ran = fit(Module(nothing, nothing), (), tmp_path, **options)
    check(ran, lambda produced: produced)
    assert who in ran[3]


def test_an_overridden_clip_is_named(tmp_path: Path) -> None:
    assert "Overridden.configure_gradient_clipping changed" in lightning_overridden(nothing, by_norm, (), tmp_path)[3]


def test_the_hugging_face_trainers_own_clip_is_measured_and_named(tmp_path: Path) -> None:
    ran = hugging_face(nothing, nothing, (), tmp_path, max_norm=MAX)
    check(ran, lambda produced: produced)
    assert f"the Trainer's max_grad_norm={MAX} changed the gradients" in ran[3]


def test_what_changed_gradients_is_said_once_and_is_no_incident(tmp_path: Path) -> None:
    for ahead, behind in [(by_norm, nothing), (nothing, by_norm)]:
        net = Net()
        optimizer = Keeping(net.parameters())
        with Watch(net, optimizer, rules="default") as watch:
            for x in batches():
                loss = net(x)["loss"] / (1e4 if len(net.made) == SPIKE else 1.0)
                loss.backward()
                net.over()
                ahead(net)
                watch.after_backward(loss)
                behind(net)
                optimizer.step()
                watch.after_step()
                optimizer.zero_grad()
        assert watch.summary().count("ed the gradients: at step 0 the norm") == 1
        assert watch.incidents == []


@pytest.mark.parametrize(
    "finish",
    [
        pytest.param(lambda g: g.mul_(1 / 1024), id="a-loss-scale-taken-out"),
        pytest.param(lambda g: g.div_(3), id="a-mean-over-three"),
        pytest.param(lambda g: g.mul_(2.0), id="doubled"),
    ],
)
def test_what_only_finishes_a_gradient_counts_as_produced(finish: Any, tmp_path: Path) -> None:
    def ahead(net: nn.Module) -> None:
        for p in net.parameters():
            assert p.grad is not None
            finish(p.grad)
        net.made[-1] = norm_of(net.parameters())  # type: ignore[index,operator]

    ran = plain(ahead, nothing, (), tmp_path)
    check(ran, lambda produced: produced)
    assert "the gradients" not in ran[3]


def test_a_clip_that_spreads_a_nan_hides_not_where_it_was(tmp_path: Path) -> None:
    net = Net()
    optimizer = Keeping(net.parameters())
    with Watch(net, optimizer, **OPTIONS) as watch:
        for step, x in enumerate(batches()):
            net(x)["loss"].backward()
            if step == 5:
                weight = net.net[2].weight
                assert weight.grad is not None
                weight.grad[0, 0] = math.nan
                watch.session.engine.produced.void()
                net(x)["loss"].backward()
            clip_grad_norm_(net.parameters(), MAX)
            watch.step()
            optimizer.zero_grad()
    record = watch.history[5]
    bad = [p for p, v in zip(record.index.paths, record.columns["grad_norm"], strict=True) if not math.isfinite(v)]
    assert "net.2.weight" in bad
    assert "net.0.weight" not in bad


@pytest.mark.parametrize("home", [plain, lightning], ids=lambda f: f.__name__)
def test_looking_changes_no_bit(home: Any, tmp_path: Path) -> None:
    first, second = home(by_norm, by_value, (), tmp_path), home(by_norm, by_value, (), tmp_path)
    assert first[1] == second[1]
    bare = Net()
    optimizer = Keeping(bare.parameters())
    for x in batches():
        bare(x)["loss"].backward()
        bare.over()
        by_norm(bare)
        by_value(bare)
        optimizer.step()
        optimizer.zero_grad()
    assert first[1] == bare.made
    assert first[2] == optimizer.got


def test_no_hook_is_left_on_a_parameter() -> None:
    net = Net()
    with Watch(net, Keeping(net.parameters()), **OPTIONS):
        assert any(p._post_accumulate_grad_hooks for p in net.parameters())  # type: ignore[attr-defined]
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())  # type: ignore[attr-defined]
