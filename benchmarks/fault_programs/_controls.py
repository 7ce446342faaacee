"""Healthy programs that look odd to a careless rule: sparse, frozen, tiny, noisy or long finished."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.random import RandomState
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ._data import blobs, glyphs, one_hot, rings, split, table, whole
from ._losses import accuracy, cross_entropy, explained, mean_square
from ._nets import mlp
from ._odd_nets import AddToken, First, LoRALinear, MixtureOfExperts, Residual, images, normal_nll
from ._program import Problem, adam, control, rmsprop, sgd

__all__ = ["CONTROLS"]


def _glyph_problem(
    model: nn.Module, optimizer: object, *, batch: int = 64, steps: int = 300, **more: object
) -> Problem:
    x, y = glyphs()
    data = split(x, one_hot(y, 10))
    return Problem.of(model, data, cross_entropy, optimizer, batch, steps, accuracy, goal=0.9, **more)


def sparse_embedding() -> Problem:
    """A thousand words, most of which a batch never holds; sparse gradients."""
    random = RandomState(0)
    y = random.randint(0, 4, 2000)
    common = np.minimum(random.zipf(1.5, (2000, 12)), 600) + 399
    own = y[:, None] * 90 + random.randint(0, 90, (2000, 4))
    words = np.concatenate([common, own], 1)
    model = nn.Sequential(nn.EmbeddingBag(1000, 16, mode="mean", sparse=True), nn.Linear(16, 4))
    return Problem.of(model, split(words, one_hot(y, 4)), cross_entropy, sgd(1.0), 32, 800, accuracy, goal=0.9)


def conv_norm_bias() -> Problem:
    """Biases before BatchNorm, whose gradients are zero."""
    model = nn.Sequential(
        *images(),
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(784, 10),
    )
    return _glyph_problem(model, sgd(0.05, momentum=0.9), batch=50, steps=120)


def frozen_backbone(*, in_optimizer: bool) -> Problem:
    model = mlp([784, 128, 64, 10], ["relu", "relu", "linear"], "he_normal")
    model[:4].requires_grad_(False)
    optimizer = adam(1e-2) if in_optimizer else (lambda net: Adam(net[4].parameters(), lr=1e-2))
    return _glyph_problem(model, optimizer)


def warm_up() -> Problem:
    """A learning rate that begins at exactly 0."""
    model = mlp([784, 128, 10], ["relu", "linear"], "he_normal")
    return _glyph_problem(model, adam(2e-3), schedule=lambda o: LambdaLR(o, lambda step: min(1.0, step / 100)))


def cosine_to_zero() -> Problem:
    model = mlp([784, 128, 10], ["relu", "linear"], "he_normal")
    return _glyph_problem(model, sgd(0.1, momentum=0.9), schedule=lambda o: CosineAnnealingLR(o, 300))


def batch_of_one() -> Problem:
    x, y = blobs()
    model = mlp([2, 32, 3], ["relu", "linear"], "he_uniform")
    return Problem.of(model, split(x, one_hot(y, 3)), cross_entropy, sgd(0.01), 1, 1500, accuracy, goal=0.7)


def long_converged() -> Problem:
    """Reaches the noise floor in the first tenth and stays there: gradients and updates fade away."""
    random = RandomState(0)
    x = random.randn(256, 4).astype(np.float32)
    y = (x @ np.array([[1.0], [-2.0], [0.5], [3.0]]) + 0.1 * random.randn(256, 1)).astype(np.float32)
    model = mlp([4, 1], ["linear"], "glorot")
    return Problem.of(model, split(x, y), mean_square, sgd(0.1), 179, 1500, explained, goal=0.99)


def loss_to_zero() -> Problem:
    """Two clouds far apart: the loss and all gradients fall by many orders of magnitude."""
    random = RandomState(0)
    y = np.arange(400) % 2
    x = (random.randn(400, 2) * 0.3 + 3.0 * (2 * y - 1)[:, None]).astype(np.float32)
    model = mlp([2, 16, 2], ["relu", "linear"], "he_uniform")
    return Problem.of(model, split(x, one_hot(y, 2)), cross_entropy, adam(0.03), 40, 1200, accuracy, goal=0.99)


def dropout() -> Problem:
    model = mlp([784, 256, 128, 10], ["relu", "relu", "linear"], "he_normal", dropout=0.7)
    return _glyph_problem(model, adam(1e-3), steps=500)


def label_outliers() -> Problem:
    """One target in fifty lies far away: batch losses with a heavy tail."""
    x, y = table()
    random = RandomState(5)
    taught = y + (random.rand(*y.shape) < 0.02) * random.choice([-4.0, 4.0], y.shape).astype(np.float32)
    x_train, y_train, x_val, _ = split(x, taught)
    data = (x_train, y_train.astype(np.float32), x_val, y[len(x_train) :])
    loss = nn.SmoothL1Loss(beta=0.1)
    model = mlp([9, 64, 64, 1], ["relu", "relu", "linear"], "he_normal")
    return Problem.of(model, data, loss, adam(1e-3), 16, 1000, explained, goal=0.8)


def label_noise() -> Problem:
    """A third of the labels are drawn anew: the loss can't fall far below its start."""
    x, y = glyphs()
    random = RandomState(7)
    noisy = np.where(random.rand(len(y)) < 0.33, random.randint(0, 10, len(y)), y)
    x_train, y_train, x_val, _ = split(x, one_hot(noisy, 10))
    data = (x_train, y_train, x_val, one_hot(y, 10)[len(x_train) :])
    model = mlp([784, 32, 10], ["relu", "linear"], "he_normal")
    return Problem.of(model, data, cross_entropy, sgd(0.02), 64, 300, accuracy, goal=0.9)


def imbalance() -> Problem:
    """Nineteen of twenty examples are of one class: the loss begins near that of the best constant."""
    random = RandomState(1)
    y = (random.rand(3000) < 0.05).astype(np.int64)
    x = (random.randn(3000, 8) + 1.2 * y[:, None]).astype(np.float32)
    model = mlp([8, 32, 2], ["relu", "linear"], "he_normal")
    return Problem.of(model, split(x, one_hot(y, 2)), cross_entropy, adam(3e-3), 64, 500, accuracy, goal=0.95)


def lora() -> Problem:
    """Low-rank updates of frozen layers: B starts at 0, so A has no gradient at the first step."""
    base = mlp([784, 64, 10], ["relu", "linear"], "he_normal")
    model = nn.Sequential(LoRALinear(base[0], 8), base[1], LoRALinear(base[2], 8))
    return _glyph_problem(model, lambda net: AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3))


def zero_init_residual() -> Problem:
    model = nn.Sequential(nn.Linear(784, 64), *(Residual(64) for _ in range(4)), nn.Linear(64, 10))
    return _glyph_problem(model, adam(1e-3))


def mixture() -> Problem:
    """Top-1 experts, one of which the router never takes."""
    return _glyph_problem(nn.Sequential(nn.Linear(784, 32), MixtureOfExperts(32, 4), nn.Linear(32, 10)), adam(2e-3))


def negative_loss() -> Problem:
    """Likelihood of a narrow density: the loss crosses zero on its way down."""
    x, y = table()
    model = mlp([9, 64, 2], ["tanh", "linear"], "glorot")
    metric = lambda p, t: explained(p[:, :1], t)  # noqa: E731 - a formula
    return Problem.of(model, split(x, y), normal_nll, adam(3e-3), 32, 1000, metric, goal=0.7)


def accumulation() -> Problem:
    model = mlp([784, 64, 10], ["relu", "linear"], "he_normal")
    return _glyph_problem(model, adam(2e-3), batch=16, steps=200, accumulate=4)


def short() -> Problem:
    """Stopped by its owner while it still improves."""
    return _glyph_problem(mlp([784, 128, 10], ["relu", "linear"], "he_normal"), adam(1e-3), steps=60)


def curriculum() -> Problem:
    """Two easy classes first, then all: the loss jumps, and the owner says so."""
    x, y = glyphs()
    x, y = x[:2100], y[:2100]
    easy = np.flatnonzero(y < 2)

    def batches(step: int, random: RandomState) -> np.ndarray:
        return random.choice(easy if step < 150 else len(x), 64)

    def announce(step: int, watch: object) -> None:
        if step == 0:
            watch.annotate("validated on all classes, taught two", rules="*val*", silence=350)
        if step == 150:
            watch.annotate("all classes from here on", silence=200)

    model = mlp([784, 128, 10], ["relu", "linear"], "he_normal")
    return _glyph_problem(model, sgd(0.1), steps=450, batches=batches, before_step=announce)


def transformer() -> Problem:
    random = RandomState(0)
    tokens = random.randint(2, 12, (2000, 12))
    y = random.randint(0, 2, 2000)
    tokens[np.arange(2000), random.randint(0, 12, 2000)] = y
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Embedding(12, 32),
        AddToken(32),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        First(),
        nn.Linear(32, 2),
    )
    return Problem.of(model, split(tokens, one_hot(y, 2)), cross_entropy, adam(1e-3), 32, 250, accuracy, goal=0.9)


def narrow_relu() -> Problem:
    """Rings in the plane with few ReLU units, some of which never fire; accuracy is bounded by the noise."""
    x, y = rings()
    model = mlp([2, 8, 8, 1], ["relu", "relu", "linear"], "he_uniform")
    loss = nn.BCEWithLogitsLoss()
    metric = lambda p, t: ((p > 0).float() == t).float().mean().item()  # noqa: E731 - a formula
    return Problem.of(model, split(x, y), loss, adam(1e-2), 64, 800, metric, goal=0.7)


def sine_full_batch() -> Problem:
    """One smooth curve, the whole data set at every step, as in a textbook."""
    x = np.linspace(-3, 3, 200, dtype=np.float32)[:, None]
    model = mlp([1, 32, 32, 1], ["tanh", "tanh", "linear"], "glorot")
    return Problem.of(model, whole(x, np.sin(2 * x)), mean_square, adam(5e-3), 200, 800, explained, goal=0.95)


def rmsprop_tanh() -> Problem:
    model = mlp([784, 64, 32, 10], ["tanh", "tanh", "linear"], "glorot")
    return _glyph_problem(model, rmsprop(1e-3))


def large_targets() -> Problem:
    """Regression whose owner scales nothing and picks a step size to match."""
    random = RandomState(4)
    x = random.randn(400, 5).astype(np.float32)
    y = (x @ random.randn(5, 1) * 3 + 10).astype(np.float32)
    return Problem.of(
        nn.Sequential(nn.Linear(5, 1)),
        split(x, y),
        mean_square,
        lambda m: SGD(m.parameters(), 0.02),
        32,
        500,
        explained,
        goal=0.99,
    )


CONTROLS = (
    control("ctl_sparse_embedding", "embedding rows without gradient", sparse_embedding),
    control("ctl_conv_norm_bias", "biases before BatchNorm", conv_norm_bias),
    control("ctl_frozen_backbone", "frozen layers, in the optimizer", partial(frozen_backbone, in_optimizer=True)),
    control("ctl_head_only", "frozen layers, not in the optimizer", partial(frozen_backbone, in_optimizer=False)),
    control("ctl_warm_up", "learning rate from 0", warm_up),
    control("ctl_cosine_to_zero", "learning rate to 0", cosine_to_zero),
    control("ctl_batch_of_one", "batch of one", batch_of_one),
    control("ctl_long_converged", "long converged", long_converged),
    control("ctl_loss_to_zero", "loss to 0", loss_to_zero),
    control("ctl_dropout", "dropout .7", dropout),
    control("ctl_label_outliers", "targets with outliers", label_outliers),
    control("ctl_label_noise", "a third of the labels random", label_noise),
    control("ctl_imbalance", "one class in twenty", imbalance),
    control("ctl_lora", "LoRA with B = 0", lora),
    control("ctl_zero_init_residual", "zero-init residual branches", zero_init_residual),
    control("ctl_mixture", "top-1 experts, one unused", mixture),
    control("ctl_negative_loss", "negative losses", negative_loss),
    control("ctl_accumulation", "four micro-batches a step", accumulation),
    control("ctl_short", "60 steps", short),
    control("ctl_curriculum", "an announced jump", curriculum),
    control("ctl_transformer", "attention", transformer),
    control("ctl_narrow_relu", "narrow ReLU layers", narrow_relu),
    control("ctl_sine", "full batch regression", sine_full_batch),
    control("ctl_rmsprop", "tanh and RMSprop", rmsprop_tanh),
    control("ctl_large_targets", "targets far from 0", large_targets),
)
