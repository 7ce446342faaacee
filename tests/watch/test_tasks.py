"""Task losses in plain loops: `backward({...})`, `split`, rules that switch surgery on, micro-batches."""

import copy

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Surgery, Watch
from gradwatch.rules import Expression
from gradwatch.treatments import MicroBatchSurgery


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.a, self.b = nn.Linear(16, 1), nn.Linear(16, 1)

    def losses(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, target = self.trunk(x), torch.sin(x.sum(1, keepdim=True))
        return {"a": (self.a(hidden) - target).square().mean(), "b": 3 * (self.b(hidden) + target).square().mean()}


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(32, 6, generator=generator) for _ in range(steps)]


def train(how: str, surgery: object = None, **options: object) -> tuple[Two, Watch]:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Watch(
        model, optimizer, rules=options.pop("rules", "observe"), surgery=surgery, on_error="raise", **options
    ) as w:
        for x in batches(12):
            optimizer.zero_grad()
            losses = model.losses(x)
            if how == "backward":
                w.backward(losses)
                w.step()
            elif how == "split":
                w.backward(gradwatch.split(**losses))
                w.step()
            else:
                loss = losses["a"] + losses["b"]
                loss.backward()
                w.step(loss=loss)
    return model, w


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_backward_of_losses_without_surgery_is_the_plain_backward() -> None:
    assert same(train("backward")[0], train("plain")[0])


def test_surgery_with_weights_of_one_is_the_plain_run_and_pcgrad_is_not() -> None:
    plain, _ = train("plain")
    ones, watch = train(
        "backward", Surgery(lambda gramian: torch.ones(len(gramian), dtype=gramian.dtype), keep_length=False)
    )
    assert same(ones, plain)
    assert "task_cos/a/b" in watch.history[0].scalars
    pcgrad, watch = train("backward", "pcgrad")
    assert not same(pcgrad, plain)
    assert watch.history[0].has_loss
    assert same(train("split", "pcgrad")[0], pcgrad)


def test_conflicts_are_measured_at_their_cadence_and_change_nothing() -> None:
    model, watch = train("backward", conflicts_every=4)
    assert same(model, train("plain")[0])
    assert ["task_cos/a/b" in r.scalars for r in watch.history] == [i % 4 == 0 for i in range(12)]


def test_a_rule_switches_surgery_on_in_mid_run() -> None:
    rule = Expression("step >= 5", name="from-five-on", then=[Surgery("pcgrad")])
    _, watch = train("backward", rules=[rule])
    assert ["surgery_weight/a" in r.scalars or "surgery_applied" in r.scalars for r in watch.history][:6] == [False] * 6
    assert any(k.startswith("surgery") for k in watch.history[7].scalars)


def test_micro_batch_surgery_works_in_a_plain_loop_and_nonsense_is_refused() -> None:
    with pytest.raises(gradwatch.ConfigError, match="surgery"):
        Watch(Two(), torch.optim.SGD(Two().parameters(), lr=0.1), surgery=3)
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Watch(model, optimizer, surgery=MicroBatchSurgery("pcgrad"), rules="observe", on_error="raise") as watch:
        optimizer.zero_grad()
        for i, x in enumerate(batches(2)):
            watch.backward(model.losses(x), parts=2, last=i == 1, batch_size=32)
        record = watch.step().record
    assert -1 <= record.scalars["micro_cos"] <= 1


def test_the_noise_of_micro_batches_is_counted_in_samples() -> None:
    found = {}
    for size in (1, 32):
        model = Two()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Watch(model, optimizer, surgery=MicroBatchSurgery("pcgrad"), rules="observe", on_error="raise") as watch:
            for i, x in enumerate(batches(4)):
                watch.backward(model.losses(x), parts=4, last=i == 3, batch_size=size)
            found[size] = watch.step().record.scalars
    assert found[32]["noise_trace"] == pytest.approx(32 * found[1]["noise_trace"])
    assert found[32]["noise_squared_norm"] == pytest.approx(found[1]["noise_squared_norm"])


def test_a_resumed_run_goes_on_with_what_surgery_remembers() -> None:
    def begun() -> tuple[Two, torch.optim.SGD, Watch]:
        model = Two()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        surgery = Surgery("gradvac", beta=0.3, keep_length=False)
        return model, optimizer, Watch(model, optimizer, rules="observe", surgery=surgery, on_error="raise")

    def go_on(model: Two, optimizer: torch.optim.SGD, watch: Watch, steps: list[torch.Tensor]) -> None:
        for x in steps:
            optimizer.zero_grad()
            watch.backward(model.losses(x))
            watch.step()

    xs = batches(12)
    whole = begun()
    go_on(*whole, xs[:6])
    saved = copy.deepcopy([part.state_dict() for part in whole])
    go_on(*whole, xs[6:])
    resumed = begun()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    go_on(*resumed, xs[6:])
    forgetful = begun()
    for part, state in zip(forgetful[:2], saved[:2], strict=True):
        part.load_state_dict(state)
    go_on(*forgetful, xs[6:])
    for *_, watch in (whole, resumed, forgetful):
        watch.close()
    assert same(resumed[0], whole[0])
    assert not same(forgetful[0], whole[0])  # there was something to remember
