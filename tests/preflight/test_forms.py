"""Batches, losses and models of every usual form; what can't be used is an error that says so."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import Adam

from gradwatch._preflight import CHECKS, check_lightning, preflight
from gradwatch.errors import ConfigError, UnknownNameError


class Named(nn.Module):
    """A model in the manner of Hugging Face: named inputs, an object with a loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids).mean(1))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    return {"input_ids": torch.randint(0, 6, (24, 5), generator=generator) + 6 * labels[:, None], "labels": labels}


def test_dict_batch_and_model_with_its_own_loss(tokens):
    torch.manual_seed(0)
    model = Named()
    report = preflight(model, tokens, optimizer=Adam(model.parameters(), 1e-2))
    assert report.ok
    assert report.measures["loss_after_overfit"] < report.measures["loss"]


def test_loss_of_model_and_batch(net, images):
    def loss(model, batch):
        x, y = batch
        return functional.cross_entropy(model(x), y)

    assert preflight(net, images, loss, Adam(net.parameters(), 1e-2)).ok


def test_lone_tensor_is_its_own_target(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
    assert preflight(model, images[0], nn.MSELoss(), Adam(model.parameters(), 1e-2)).ok


def test_several_inputs_are_unpacked(images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    x, y = images
    torch.manual_seed(0)
    model = Two()
    assert preflight(model, ((x, x.flip(1)), y), nn.CrossEntropyLoss(), Adam(model.parameters(), 1e-2)).ok
    report = preflight(model, ({"left": x, "right": x}, y), nn.CrossEntropyLoss())
    assert report.ok


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)),
            id="conv-norm",
        ),
        pytest.param(lambda: nn.Sequential(nn.Flatten(0, 0), nn.Flatten(1), nn.Linear(8, 4)), id="views"),
        pytest.param(
            lambda: nn.Sequential(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(8, 4)
            ),
            id="attention",
        ),
    ],
)
def test_usual_architectures_give_no_alarm(model, images):
    torch.manual_seed(0)
    built = model()
    report = preflight(built, (images[0][:, None], images[1]), nn.CrossEntropyLoss(), Adam(built.parameters(), 1e-2))
    assert report.ok, str(report)


def test_sequence_model_that_takes_the_batch_for_time_leaks():
    class Last(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 8, batch_first=batch_first), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    x, y = torch.randn(16, 6, 3), torch.arange(16) % 2
    assert preflight(Last(batch_first=True), (x, y), nn.CrossEntropyLoss()).ok
    assert "leak" in {f.check for f in preflight(Last(batch_first=False), (x, y), nn.CrossEntropyLoss()).alarms}


def test_batch_of_one_is_judged_as_far_as_it_goes(net, images):
    assert preflight(net, (images[0][:1], images[1][:1]), nn.CrossEntropyLoss(), Adam(net.parameters(), 1e-3)).ok


def test_lightning_module_is_checked_with_its_own_loss_and_optimizer(images):
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.net, self.lr = nn.Linear(8, 4), lr

        def training_step(self, batch, batch_idx):
            loss = functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, prog_bar=True)
            return {"loss": loss}

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]

    torch.manual_seed(0)
    assert check_lightning(Module(0.1), images).ok
    module = Module(0.1)
    module.net.bias.requires_grad_(False)
    module.net.weight.requires_grad_(False)
    assert not check_lightning(module, images).ok
    assert "log" not in module.__dict__


def test_lightning_module_that_optimizes_by_hand_is_an_error(images):
    module = SimpleNamespace(automatic_optimization=False)
    with pytest.raises(ConfigError) as raised:
        check_lightning(module, images)
    assert str(raised.value) == (
        "SimpleNamespace optimizes by hand, so its training_step can't be tried without moving it: "
        "call `gradwatch.preflight` on its network with a loss instead."
    )


def test_loss_that_is_no_number_is_an_error(net, images):
    with pytest.raises(ConfigError) as raised:
        preflight(net, images, nn.CrossEntropyLoss(reduction="none"))
    assert str(raised.value) == ("the loss must be one number. Got shape (32,): return a scalar tensor from `loss_fn`.")


def test_batch_without_tensors_is_an_error(net):
    with pytest.raises(ConfigError, match=r"`batch` holds no tensor\. Got list\."):
        preflight(net, ["a", "b"], nn.CrossEntropyLoss())


def test_lazy_parameters_are_an_error(images):
    with pytest.raises(ConfigError, match="lazy parameters"):
        preflight(nn.LazyLinear(4), images, nn.CrossEntropyLoss())


def test_unknown_check_is_an_error_with_suggestions(net, images):
    with pytest.raises(UnknownNameError) as raised:
        preflight(net, images, nn.CrossEntropyLoss(), skip=["overfitting"])
    assert str(raised.value) == "preflight: there is no check 'overfitting'. Did you mean 'overfit'?"


def test_report_reads_as_a_table(regressor, numbers):
    report = preflight(regressor, (numbers[0] * 25, numbers[1]), nn.MSELoss(), skip=["overfit", "leaks"])
    lines = str(report).splitlines()
    assert lines[0].startswith(f"Pre-flight: 1 to see to, 0 to know ({len(CHECKS) - 4} checks in ")
    assert lines[1].startswith("[warning] unnormalised_input at 0: inputs have mean ")
    assert lines[2] == "    cause: raw features or pixels; or normalised twice"
    unasked = [f"not checked: {name} (no optimizer was given)" for name in ("held_by_optimizer", "learning_rate")]
    assert lines[-4:] == ["not checked: overfit (left out)", "not checked: leaks (left out)", *unasked]
    assert not report
    (incident,) = report.incidents()
    assert (incident.rule, incident.first_path) == ("preflight_unnormalised_input", "0")
