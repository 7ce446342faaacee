"""What an output may depend on, whether samples differ, what is frozen; and what can't be checked is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from gradwatch import check_lightning
from gradwatch._preflight import preflight

VOCABULARY, LENGTH = 20, 9


class Reader(nn.Module):
    """One attention, or a recurrent layer, over tokens."""

    def __init__(self, *, causal: bool = True, both_ways: bool | None = None) -> None:
        super().__init__()
        self.embed, self.qkv, self.causal = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 48), causal
        self.recurrent = None if both_ways is None else nn.GRU(16, 8, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(8 if both_ways is False else 16, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.recurrent is not None:
            return self.head(self.recurrent(h)[0])
        q, k, v = self.qkv(h)[:, None].chunk(3, -1)
        return self.head(functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, 0])


class WithItsLoss(Reader):
    """In the manner of Hugging Face: labels are the tokens, and are shifted inside."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:  # type: ignore[override]
        logits = super().forward(input_ids)
        return SimpleNamespace(loss=compared(logits[:, :-1], labels[:, 1:]), logits=logits)


def compared(scores: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(scores.reshape(-1, VOCABULARY), tokens.reshape(-1))


def of_model(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return compared(model(batch[0]), batch[1])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(0))


def found(report) -> set[str]:
    return {f.check for f in report.findings}


@pytest.mark.parametrize("loss", [pytest.param(compared, id="outputs-and-targets"), pytest.param(of_model, id="model")])
@pytest.mark.parametrize(
    ("given", "leaks"),
    [
        pytest.param({"causal": True}, False, id="causal"),
        pytest.param({"causal": False}, True, id="no-mask"),
        pytest.param({"both_ways": False}, False, id="recurrent"),
        pytest.param({"both_ways": True}, True, id="recurrent-both-ways"),
    ],
)
def test_outputs_that_depend_on_later_inputs_are_found_in_both_forms_of_the_call(tokens, loss, given, leaks) -> None:
    torch.manual_seed(0)
    report = preflight(Reader(**given), (tokens[:, :-1], tokens[:, 1:]), loss, overfit_steps=0)
    assert ("sees_future" in found(report)) is leaks
    assert "sees_future" in report.checks


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_that_shifts_labels_itself_is_looked_at_too(tokens, causal) -> None:
    torch.manual_seed(0)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    assert ("sees_future" in found(preflight(WithItsLoss(causal=causal), batch, overfit_steps=0))) is not causal


def test_classes_of_tokens_may_depend_on_all_of_them(tokens) -> None:
    torch.manual_seed(0)
    assert "sees_future" not in found(preflight(Reader(causal=False), (tokens, tokens * 7 % 5), compared))


def test_copies_among_the_samples_are_told(images, net) -> None:
    x, y = images
    x = x.clone()
    x[8:] = x[0]
    report = preflight(net, (x, y), nn.CrossEntropyLoss(), overfit_steps=0)
    assert "repeated_rows" in found(report)
    assert report.measures["repeated_rows"] == 24 / 32
    assert "repeated_rows" not in found(preflight(net, images, nn.CrossEntropyLoss(), overfit_steps=0))


def test_states_of_a_small_world_are_no_copies() -> None:
    states = functional.one_hot(torch.arange(32) % 7, 8).float()
    model = nn.Linear(8, 3)
    assert "repeated_rows" not in found(preflight(model, (states, torch.arange(32) % 3), nn.CrossEntropyLoss()))


def test_what_is_frozen_is_told_with_its_share_and_whether_it_was_ever_trained(images, net) -> None:
    net[0].requires_grad_(False)
    report = preflight(net, images, nn.CrossEntropyLoss(), overfit_steps=0)
    (finding,) = [f for f in report.findings if f.check == "frozen"]
    assert (finding.severity, finding.path) == ("info", "0.weight")
    assert finding.value == report.measures["frozen_share"] == 144 / 212
    assert "as they were initialised" in finding.message
    with torch.no_grad():
        net[0].weight.mul_(3)
    trained = preflight(net, images, nn.CrossEntropyLoss(), overfit_steps=0)
    assert "as they were initialised" not in str(trained)


@pytest.mark.parametrize("loss", [pytest.param(compared, id="outputs-and-targets"), pytest.param(of_model, id="model")])
def test_a_first_loss_above_three_times_chance_is_told_in_both_forms_of_the_call(tokens, loss) -> None:
    torch.manual_seed(0)
    model = Reader()
    batch = (tokens[:, :-1], tokens[:, 1:])
    assert "bad_initial_loss" not in found(preflight(model, batch, loss, overfit_steps=0))
    with torch.no_grad():
        model.head.weight.mul_(100)
    assert "bad_initial_loss" in found(preflight(model, batch, loss, overfit_steps=0))


@pytest.mark.parametrize(
    ("given", "check", "why"),
    [
        pytest.param({}, "held_by_optimizer", "no optimizer was given", id="no-optimizer"),
        pytest.param({"overfit_steps": 0}, "overfit", "overfit_steps is 0", id="no-steps"),
        pytest.param(
            {"loss_fn": lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1])},
            "reachable_loss",
            "the loss can't be tried on chosen outputs: it is given as loss_fn(model, batch)",
            id="loss-of-the-model",
        ),
    ],
)
def test_what_can_not_be_checked_is_skipped_and_says_why(net, images, given, check, why) -> None:
    report = preflight(net, images, **{"loss_fn": nn.CrossEntropyLoss(), **given})
    assert report.skipped[check] == why
    assert check not in report.checks


@pytest.mark.parametrize("causal", [True, False])
def test_the_network_within_a_lightning_module_is_looked_at(tokens, causal) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.criterion = Reader(causal=causal), nn.CrossEntropyLoss()

        def training_step(self, batch, i):
            return self.criterion(self.reader(batch[0]).movedim(-1, 1), batch[1])

        def configure_optimizers(self):
            return Adam(self.parameters(), 1e-2)

    report = check_lightning(Module(), (tokens[:, :-1], tokens[:, 1:]), overfit_steps=0)
    assert ("sees_future" in found(report)) is not causal
