"""What the graph behind a loss and outputs tells, and that asking costs the training nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import Watch
from gradwatch.torchside import LossForm, loss_form, loss_pair, unmasked_attention

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(8) % 5


OF_SOFTMAX = LossForm(of_softmax=True)
OF_SHARES = LossForm(of_shares=True)
of_logits = F.binary_cross_entropy_with_logits


def chosen(x: Tensor) -> Tensor:
    return x.gather(1, CLASSES[:, None]).squeeze(1)


def beside(error: Tensor, x: Tensor) -> Tensor:
    return 0.1 * error + x.norm()


def real_and_fake(x: Tensor) -> Tensor:
    """As a discriminator's loss is made."""
    return of_logits(x[:4], torch.ones(4, 5)) + of_logits(x[4:], torch.zeros(4, 5))


def scores() -> Tensor:
    return X.clone().requires_grad_()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        pytest.param(lambda x: F.cross_entropy(x, CLASSES), LossForm(), id="cross-entropy"),
        pytest.param(lambda x: F.nll_loss(x.log_softmax(1), CLASSES), LossForm(), id="log-softmax-and-nll"),
        pytest.param(lambda x: F.cross_entropy(x.log_softmax(1), CLASSES), LossForm(), id="log-softmax-again"),
        pytest.param(lambda x: F.cross_entropy(x.softmax(1), CLASSES), OF_SOFTMAX, id="softmax"),
        pytest.param(lambda x: beside(F.cross_entropy(x.softmax(1), CLASSES), x), OF_SOFTMAX, id="beside-a-penalty"),
        pytest.param(lambda x: of_logits(x, X.sigmoid()), OF_SHARES, id="logits"),
        pytest.param(lambda x: of_logits(x.sigmoid(), X.sigmoid()), OF_SHARES._replace(of_sigmoid=True), id="sigmoid"),
        pytest.param(lambda x: F.smooth_l1_loss(chosen(x), X[:, 0]), LossForm(of_chosen=True), id="values-of-actions"),
        pytest.param(lambda x: F.mse_loss(x, X), LossForm(), id="squared-error"),
        pytest.param(lambda x: F.mse_loss(x, X) + F.cross_entropy(x, CLASSES), None, id="two-errors"),
        pytest.param(real_and_fake, None, id="real-and-fake"),
        pytest.param(lambda x: real_and_fake(x.sigmoid()), LossForm(of_sigmoid=True), id="a-sigmoid-in-both"),
        pytest.param(
            lambda x: F.mse_loss(x, X) + F.cross_entropy(x.softmax(1), CLASSES), OF_SOFTMAX, id="in-one-of-two"
        ),
        pytest.param(lambda x: F.mse_loss(chosen(x), X[:, 0]) + F.mse_loss(x, X), None, id="chosen-in-one-of-two"),
        pytest.param(lambda x: x.square().sum(), None, id="no-common-error"),
    ],
)
@pytest.mark.parametrize("is_over", [False, True])
def test_how_a_loss_was_made_is_told_before_backward_and_after(
    loss: Callable[[Tensor], Tensor], expected: LossForm | None, is_over: bool
) -> None:
    value = loss(scores())
    if is_over:
        value.backward()
    assert loss_form(value) == expected


def test_what_a_loss_compares_is_found_before_backward_and_not_after() -> None:
    x = scores()
    value = F.mse_loss(x, X.flip(0))
    found = loss_pair(value)
    assert found is not None
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], X.flip(0))
    value.backward()
    assert loss_pair(value) is None


def test_nothing_is_unpacked_that_somebody_has_packed() -> None:
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: (unpacked.append(1), t)[1]):
        value = F.cross_entropy(scores(), CLASSES)
    assert loss_pair(value) is None
    assert loss_form(value) == LossForm()
    assert unpacked == []


@pytest.mark.parametrize(
    ("given", "share"),
    [
        pytest.param({"is_causal": True}, 0.0, id="causal"),
        pytest.param({"attn_mask": torch.zeros(6, 6)}, 0.0, id="mask"),
        pytest.param({}, 1.0, id="neither"),
    ],
)
@pytest.mark.parametrize("is_over", [False, True])
def test_attention_without_a_mask_is_told(given: dict, share: float, is_over: bool) -> None:
    q = torch.randn(2, 1, 6, 4, requires_grad=True)
    out = F.scaled_dot_product_attention(q, q, q, **given)
    if is_over:
        out.sum().backward()
    assert unmasked_attention(out) == share


class Sequences(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.tokens, self.head, self.causal = nn.Embedding(11, 8), nn.Linear(8, 11), causal

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)[:, None]
        return self.head(F.scaled_dot_product_attention(h, h, h, is_causal=self.causal)[:, 0])


@pytest.mark.parametrize("causal", [False, True])
def test_a_language_model_without_a_causal_mask_is_told_so_in_its_first_steps(causal: bool) -> None:
    torch.manual_seed(0)
    model = Sequences(causal)
    optimizer = torch.optim.Adam(model.parameters())
    with Watch(model, optimizer) as watch:
        for _ in range(6):
            tokens = torch.randint(0, 11, (4, 13))
            out = model(tokens[:, :-1])
            loss = F.cross_entropy(out.reshape(-1, 11), tokens[:, 1:].reshape(-1))
            loss.backward()
            watch.step(loss=loss, batch=tokens[:, :-1], outputs=out, targets=tokens[:, 1:])
            optimizer.zero_grad()
    assert ("sees_future" in {i.rule for i in watch.incidents}) is not causal


@pytest.mark.parametrize(
    ("make", "kind", "expected"),
    [
        pytest.param(lambda: nn.Linear(5, 3), "auto", (), id="supervised"),
        pytest.param(lambda: nn.Linear(5, 3), "rl", ("kind/rl",), id="said"),
        pytest.param(lambda: frozen(), "auto", ("kind/fine_tuning",), id="fine-tuning"),
        pytest.param(lambda: Twins(), "auto", ("kind/bootstrapped",), id="target-network"),
        pytest.param(lambda: half_frozen(), "auto", (), id="layers-of-one-series"),
    ],
)
def test_the_kind_of_a_training_is_inferred_or_said_and_stands_on_every_record(
    make: Callable[[], nn.Module], kind: str, expected: tuple[str, ...]
) -> None:
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    with Watch(model, optimizer, kind=kind) as watch:
        for _ in range(4):
            loss = model(X).square().mean()
            loss.backward()
            watch.step(loss=loss)
    for record in watch.history:
        assert tuple(n for n in record.scalars if n.startswith("kind/")) == expected
    assert ("kind of training" in watch.summary()) is bool(expected)


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 60).requires_grad_(False), nn.Linear(60, 1))


def half_frozen() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)) for _ in range(4)]
    blocks[0].requires_grad_(False)
    return nn.Sequential(*blocks)


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2))
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.online(x) - self.target(x)


def test_values_of_chosen_actions_are_reinforcement_learning() -> None:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Watch(model, optimizer) as watch:
        for _ in range(3):
            loss = F.smooth_l1_loss(model(X).gather(1, (CLASSES % 3)[:, None]).squeeze(1), X[:, 0])
            loss.backward()
            watch.step(loss=loss)
    assert "kind/rl" in watch.history[-1].scalars
    assert "rl (" in watch.summary()
