"""Programs after AutoTrainer: small networks on blobs and rings, and a deep network whose ReLUs die.

Zhang et al., "AutoTrainer: An Automatic DNN Training Problem Detection and Repair System", ICSE 2021.
"""

from __future__ import annotations

from functools import partial

from torch.optim import Adagrad

from ._data import blobs, glyphs, one_hot, rings, split
from ._losses import accuracy, accuracy_above_half, keras_binary_crossentropy, keras_crossentropy
from ._nets import mlp
from ._program import MakeOptimizer, Problem, Program, adam, sgd

__all__ = ["AUTOTRAINER"]


def blob_net(
    activation: str,
    init: str,
    depth: int,
    *,
    optimizer: MakeOptimizer | None = None,
    batch: int = 128,
    steps: int = 1200,
) -> Problem:
    """Three classes in the plane, hidden layers of five units."""
    x, y = blobs()
    model = mlp([2] + [5] * depth + [3], [activation] * depth + ["softmax"], init)
    optimizer = optimizer or adam(1e-3)
    return Problem.of(model, split(x, one_hot(y, 3)), keras_crossentropy, optimizer, batch, steps, accuracy)


def ring_net(activation: str, init: str, depth: int) -> Problem:
    """Two classes in the plane, hidden layers of five units."""
    model = mlp([2] + [5] * depth + [1], [activation] * depth + ["sigmoid"], init)
    data = split(*rings())
    return Problem.of(model, data, keras_binary_crossentropy, adam(1e-3), 128, 1500, accuracy_above_half)


def wide_blob_net(output: str) -> Problem:
    x, y = blobs()
    model = mlp([2, 50, 50, 50, 50, 3], ["relu"] * 4 + [output], "he_uniform")
    return Problem.of(model, split(x, one_hot(y, 3)), keras_crossentropy, adam(1e-4), 256, 900, accuracy)


def shallow_blob_net(momentum: float, batch: int) -> Problem:
    x, y = blobs()
    model = mlp([2, 50, 3], ["relu", "softmax"], "he_uniform")
    optimizer = sgd(0.01, momentum=momentum)
    return Problem.of(model, split(x, one_hot(y, 3)), keras_crossentropy, optimizer, batch, 1400, accuracy)


def adagrad_blob_net(lr: float) -> Problem:
    return blob_net(
        "tanh", "he_uniform", 5, optimizer=lambda model: Adagrad(model.parameters(), lr=lr), batch=256, steps=900
    )


def deep_glyph_net(depth: int) -> Problem:
    x, y = glyphs(2000)
    model = mlp([784] + [128] * depth + [10], ["relu"] * depth + ["softmax"], "glorot")
    return Problem.of(model, split(x, one_hot(y, 10)), keras_crossentropy, adam(1e-3), 32, 400, accuracy)


AUTOTRAINER = (
    Program(
        "at_circle_vanish_sigmoid8",
        "AutoTrainer demo Gradient_Vanish",
        ("vanishing",),
        fixed=partial(ring_net, "tanh", "he_uniform", 8),
        faulty=partial(ring_net, "sigmoid", "he_uniform", 8),
    ),
    Program(
        "at_blob_explode_exp10",
        "AutoTrainer Blob model_0b6f114d",
        ("exploding",),
        fixed=partial(blob_net, "tanh", "he_uniform", 5),
        faulty=partial(blob_net, "exp", "he_uniform", 9),
    ),
    Program(
        "at_circle_explode_exp9",
        "AutoTrainer Circle model_0ae2cd88",
        ("exploding",),
        fixed=partial(ring_net, "tanh", "he_uniform", 5),
        faulty=partial(ring_net, "exp", "he_uniform", 9),
    ),
    Program(
        "at_blob_vanish_smallinit_relu8",
        "AutoTrainer Blob model_384108d9",
        ("vanishing", "initialisation"),
        fixed=partial(blob_net, "relu", "he_uniform", 3),
        faulty=partial(blob_net, "relu", "uniform", 8),
    ),
    Program(
        "at_circle_vanish_smallinit_relu8",
        "AutoTrainer Circle model_8de47bdc",
        ("vanishing", "initialisation"),
        fixed=partial(ring_net, "relu", "he_uniform", 3),
        faulty=partial(ring_net, "relu", "uniform", 8),
    ),
    Program(
        "at_blob_vanish_sigmoid9",
        "AutoTrainer Blob model_2569b90f",
        ("vanishing",),
        fixed=partial(blob_net, "tanh", "he_uniform", 5),
        faulty=partial(blob_net, "sigmoid", "he_uniform", 9),
    ),
    Program(
        "at_improper_output_relu",
        "AutoTrainer demo Improper_Activation",
        ("output_activation",),
        fixed=partial(wide_blob_net, "softmax"),
        faulty=partial(wide_blob_net, "relu"),
    ),
    Program(
        "at_oscillate_bs1",
        "AutoTrainer demo Oscillating_Loss",
        ("oscillation", "learning_rate_high"),
        fixed=partial(shallow_blob_net, 0.0, 32),
        faulty=partial(shallow_blob_net, 0.9, 1),
    ),
    Program(
        "at_blob_lr1_adagradlike",
        "AutoTrainer Blob configuration Adagrad lr=1",
        ("learning_rate_high",),
        fixed=partial(adagrad_blob_net, 0.03),
        faulty=partial(adagrad_blob_net, 1.0),
    ),
    Program(
        "at_dyingrelu_34x128",
        "AutoTrainer Motivation DyingReLU",
        ("dead", "vanishing"),
        fixed=partial(deep_glyph_net, 3),
        faulty=partial(deep_glyph_net, 34),
    ),
)
