"""Each fault is found, by its name, where it is; and the same model without it gives no alarm."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam

from gradwatch._preflight import preflight


def alarms(report):
    return {f.check for f in report.alarms}


def layers(*modules):
    torch.manual_seed(0)
    return nn.Sequential(*modules)


def deep(activation, depth=10, width=16):
    torch.manual_seed(0)
    hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(nn.Linear(8, width), activation(), *hidden, nn.Linear(width, 4))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.trunk(x).relu().detach())


class BatchSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x):
        return self.inner(x) * x.sum(1, keepdim=True).softmax(0)


def test_sound_classifier_gives_no_alarm(net, images):
    report = preflight(net, images, nn.CrossEntropyLoss(), Adam(net.parameters(), 1e-2))
    assert report.ok
    assert not report.skipped
    assert report.measures["loss_after_overfit"] < report.measures["loss"]


def test_sound_regressor_gives_no_alarm(regressor, numbers):
    assert preflight(regressor, numbers, nn.MSELoss(), SGD(regressor.parameters(), 0.05)).ok


@pytest.mark.parametrize(
    ("model", "check", "path"),
    [
        pytest.param(lambda: deep(nn.Sigmoid), "signal_vanishes", "11", id="sigmoid-chain"),
        pytest.param(lambda: deep(nn.Sigmoid), "gradient_vanishes", "0", id="sigmoid-chain-backward"),
        pytest.param(Detached, "no_gradient", "trunk.weight", id="detached-trunk"),
        pytest.param(BatchSoftmax, "leak", "", id="softmax-over-the-batch"),
        pytest.param(lambda: layers(nn.Linear(8, 4), nn.ReLU()), "output_activation", "1", id="relu-on-logits"),
    ],
)
def test_fault_of_the_model_is_found(model, check, path, images):
    report = preflight(model(), images, nn.CrossEntropyLoss())
    found = {f.check: f for f in report.alarms}
    assert check in found
    assert found[check].path == path
    assert found[check].cause
    assert found[check].advice


def test_deep_relu_net_with_he_initialisation_gives_no_alarm(images):
    model = deep(nn.ReLU)
    for m in model[:-1]:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
    assert preflight(model, images, nn.CrossEntropyLoss(), Adam(model.parameters(), 1e-3)).ok


def test_softmax_before_a_loss_on_logits_leaves_a_floor(images):
    model = layers(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Softmax(-1))
    assert "loss_floor" in alarms(preflight(model, images, nn.CrossEntropyLoss()))


def test_label_smoothing_is_no_floor(net, images):
    assert preflight(net, images, nn.CrossEntropyLoss(label_smoothing=0.1)).ok


def test_softmax_over_one_unit_is_found(numbers):
    model = layers(nn.Linear(8, 1), nn.Softmax(-1))
    found = alarms(preflight(model, (numbers[0], (numbers[1] > 0).float()), nn.BCELoss()))
    assert {"constant_output", "dead"} <= found


@pytest.mark.parametrize(
    ("last", "change"),
    [(nn.Sigmoid, 1.0), (nn.ReLU, 1.0), (nn.Tanh, 5.0)],
    ids=["sigmoid", "relu", "tanh"],
)
def test_targets_beyond_the_last_activation_are_found(last, change, numbers):
    model = layers(nn.Linear(8, 1), last())
    assert "output_range" in alarms(preflight(model, (numbers[0], change * numbers[1]), nn.MSELoss()))


def test_softmax_against_several_labels_is_found(images):
    y = functional.one_hot(images[1], 4).float()
    y[:, 0] = 1
    model = layers(nn.Linear(8, 4), nn.Softmax(-1))
    assert "target_semantics" in alarms(preflight(model, (images[0], y), nn.MSELoss()))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_shapes_that_broadcast_are_found(regressor, numbers):
    report = preflight(regressor, (numbers[0], numbers[1][:, 0]), nn.MSELoss())
    (finding,) = [f for f in report.alarms if f.check == "shape_mismatch"]
    assert finding.message == "outputs (32, 1) and targets (32,) broadcast to (32, 32)"


def test_broadcast_inside_the_loss_is_found(regressor, numbers):
    report = preflight(regressor, numbers, lambda p, y: ((p - y[:, 0]) ** 2).mean())
    assert "loss_pairing" in alarms(report)


@pytest.mark.parametrize(
    "loss", [nn.L1Loss(), nn.SmoothL1Loss(beta=0.01), nn.HuberLoss()], ids=["l1", "smooth", "huber"]
)
def test_losses_with_flat_flanks_count_as_paired(loss, regressor, numbers):
    targets = numbers[1] + 50 * (torch.arange(32)[:, None] == 3)
    assert not {"loss_pairing", "loss_sign"} & alarms(preflight(regressor, (numbers[0], targets), loss))


def test_flipped_sign_is_found(net, images):
    report = preflight(net, images, lambda p, y: -functional.cross_entropy(p, y))
    assert "loss_sign" in alarms(report)


def test_cross_entropy_of_numbers_is_found(numbers):
    model = layers(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    y = torch.sigmoid(numbers[1])
    report = preflight(model, (numbers[0], y), lambda p, t: -(t * p.clamp(1e-10, 1).log()).sum())
    assert "wrong_loss" in alarms(report)


def test_softmax_over_the_batch_in_the_loss_is_found(net, images):
    y = functional.one_hot(images[1], 4).float()
    report = preflight(net, (images[0], y), lambda p, t: -(t * p.softmax(0).clamp_min(1e-9).log()).sum(1).mean())
    assert "loss_coupling" in alarms(report)


def test_logits_given_to_a_loss_of_probabilities_are_found(net, images):
    y = functional.one_hot(images[1], 4).float()
    report = preflight(net, (images[0], y), lambda p, t: -(t * p.clamp(1e-9, 1).log()).sum(1).mean())
    assert "loss_gradient" in alarms(report)


def test_penalty_that_outweighs_the_loss_is_found(regressor, numbers):
    report = preflight(
        regressor, numbers, lambda p, y: functional.mse_loss(p, y) + 100 * regressor[0].weight.square().sum()
    )
    assert "loss_floor" in alarms(report)


def test_frozen_model_is_found(net, images):
    net.requires_grad_(False)
    assert alarms(preflight(net, images, nn.CrossEntropyLoss())) == {"nothing_trainable"}


def test_equal_rows_are_found(net, images):
    nn.init.constant_(net[0].weight, 0.1)
    assert "symmetric_units" in alarms(preflight(net, images, nn.CrossEntropyLoss()))


@pytest.mark.parametrize(("scale", "is_found"), [(1.0, False), (255.0, True), (1e-3, True)])
def test_inputs_far_from_one_are_found(scale, is_found, net, images):
    report = preflight(net, (images[0] * scale, images[1]), nn.CrossEntropyLoss())
    assert ("unnormalised_input" in alarms(report)) == is_found


def test_inputs_before_a_normalisation_may_be_of_any_size(images):
    model = layers(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert preflight(model, (images[0] * 1000, images[1]), nn.CrossEntropyLoss()).ok


def test_constant_labels_are_found(net, images):
    report = preflight(net, (images[0], torch.zeros_like(images[1])), nn.CrossEntropyLoss())
    assert "constant_labels" in alarms(report)


def test_first_module_that_overflows_is_named(images):
    model = layers(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    report = preflight(model, images, nn.CrossEntropyLoss())
    (finding,) = [f for f in report.alarms if f.check == "non_finite"]
    assert finding.path == "2"


def test_learning_rate_that_diverges_is_found(regressor, numbers):
    report = preflight(regressor, numbers, nn.MSELoss(), SGD(regressor.parameters(), 50.0))
    assert "diverges" in alarms(report)


def test_model_that_cannot_learn_the_batch_is_found(numbers):
    model = layers(nn.Linear(8, 1), nn.Sigmoid())
    nn.init.constant_(model[0].bias, 200.0)
    report = preflight(model, (numbers[0], torch.rand(32, 1)), nn.MSELoss())
    assert "cannot_overfit" in alarms(report)
