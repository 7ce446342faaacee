"""What each rule's finding means, in words for someone who trains a first network."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPLANATIONS", "Explanation", "explain"]


class Explanation(NamedTuple):
    """Attributes:
    title: what happened, as a short sentence.
    meaning: why that matters.
    rank: 0 for faults of data and set-up, which cause the others; larger for what usually follows.
    """

    title: str
    meaning: str
    rank: int


EXPLANATIONS = {
    "not_updating": Explanation(
        "Some weights never move",
        "The optimizer does not hold these weights, or leaves them as they are, so this part of the network stays "
        "as it was made.",
        0,
    ),
    "grad_not_reset": Explanation(
        "Gradients pile up from step to step",
        "The gradients of earlier steps are still there when new ones are added, so each step follows a mixture "
        "of old and new directions.",
        0,
    ),
    "symmetric_units": Explanation(
        "The units of a layer are copies of each other",
        "Units that start alike receive the same gradient and stay alike: a layer of a hundred units then learns "
        "no more than one.",
        0,
    ),
    "unnormalised_input": Explanation(
        "The inputs are not normalised",
        "Large or shifted inputs make the first layers' gradients large and lopsided, which forces a small "
        "learning rate on everything else.",
        0,
    ),
    "constant_labels": Explanation(
        "All targets of a batch are the same",
        "With one target there is nothing to tell apart: the network learns to give that one answer.",
        0,
    ),
    "target_semantics": Explanation(
        "Predictions and targets do not speak of the same thing",
        "The loss compares things that do not match, for example shapes that are silently broadcast, so making it "
        "smaller does not make predictions right.",
        0,
    ),
    "output_range": Explanation(
        "The output can't reach the targets",
        "The last activation can only give some of the values that the targets have; the loss can't fall below "
        "what that leaves.",
        0,
    ),
    "bad_initial_loss": Explanation(
        "The first loss is higher than a blind guess",
        "A fresh network should be about as good as guessing. A far higher loss says that outputs or inputs start "
        "at the wrong size.",
        0,
    ),
    "mistaken_loss": Explanation(
        "The loss computes something else than it should",
        "The numbers follow the formula of a known mistake: a broadcast over the batch, or softmax taken twice or "
        "along the wrong axis. A network can make such a loss small without learning its task.",
        0,
    ),
    "blown_up": Explanation(
        "The first steps blew the network up",
        "Within the first steps the loss rose far above that of the untrained network. The careful initialisation is "
        "lost, and what is left often trains badly for ever.",
        2,
    ),
    "crawling": Explanation(
        "Training crawls",
        "The loss falls, but every step changes the weights by far less than usual: the same result could be had in "
        "a tenth of the time.",
        3,
    ),
    "act_scale": Explanation(
        "Activations start at the wrong size",
        "Outputs shrink or grow from layer to layer, and gradients do the same on the way back.",
        0,
    ),
    "non_finite": Explanation(
        "A number became NaN or infinite",
        "One NaN spreads through every sum it enters. After one optimizer step with it all weights are NaN, and "
        "the run is lost.",
        1,
    ),
    "amp_overflow": Explanation(
        "Mixed precision overflows",
        "Values leave the range of float16 (about 6e-8 to 65,504). Such steps are thrown away; when it happens "
        "all the time, nothing is learned.",
        1,
    ),
    "exploding": Explanation(
        "The gradient exploded",
        "The gradient became many times larger than it was just before. One such step throws the weights far away "
        "from where they were, and Adam remembers it for hundreds of steps.",
        2,
    ),
    "gradient_growth": Explanation(
        "The gradient keeps growing",
        "The gradient grows while the loss does not get better. That is the slow form of an explosion: it usually "
        "ends in NaN.",
        2,
    ),
    "update_too_large": Explanation(
        "Each step changes the weights too much",
        "A step usually changes weights by about a thousandth of their size. Far larger steps jump over the "
        "valley they should walk into.",
        2,
    ),
    "rank_divergence": Explanation(
        "The processes no longer hold the same weights",
        "In data-parallel training all copies must stay equal; copies that differ average gradients of different "
        "networks.",
        2,
    ),
    "saturated": Explanation(
        "Activations are saturated",
        "Far out, sigmoid and tanh are flat: their slope is nearly zero, and so is every gradient that passes "
        "through them.",
        3,
    ),
    "dead_units": Explanation(
        "Many units are dead",
        "A ReLU whose input is below zero for every sample gives zero and passes no gradient back. Such units "
        "can't recover by themselves.",
        3,
    ),
    "vanishing": Explanation(
        "The gradient vanishes",
        "The layers far from the loss receive a tiny share of the gradient, so they hardly learn while the last "
        "layers do.",
        3,
    ),
    "dead": Explanation(
        "Some weights receive no gradient at all",
        "Exactly zero is not small: nothing that the loss says reaches these weights. Something cuts the path "
        "between them and the loss.",
        3,
    ),
    "update_too_small": Explanation(
        "Each step changes the weights too little",
        "With changes of a millionth of a weight's size, training stands almost still.",
        3,
    ),
    "dead_signal": Explanation(
        "A number does not change any more",
        "A loss or gradient that is the same to the last digit, step after step, usually means that nothing is "
        "computed, or that an old value is logged.",
        3,
    ),
    "constant_output": Explanation(
        "The network gives the same answer to everything",
        "Its output no longer depends on its input, so no gradient can tell it what to change.",
        4,
    ),
    "loss_spike": Explanation(
        "The loss jumps again and again",
        "Single batches pull the weights off course, and the network needs many steps to come back.",
        4,
    ),
    "diverging": Explanation(
        "The loss goes up",
        "Training makes the network worse instead of better.",
        4,
    ),
    "not_learning": Explanation(
        "The network does not learn",
        "After all these steps the loss is about where it began.",
        4,
    ),
    "train_eval_mismatch": Explanation(
        "The network behaves differently in eval mode",
        "On the same data it is much worse with model.eval(): layers such as BatchNorm and Dropout act "
        "differently there.",
        4,
    ),
    "val_not_learning": Explanation(
        "What is learned does not carry over",
        "The training loss falls, the validation loss does not: what the network learns is of no use on other data.",
        4,
    ),
    "stalled": Explanation(
        "A step took very long",
        "The training waited for something: another process, the data, or the disk.",
        4,
    ),
    "overfit": Explanation(
        "The network learns the training set by heart",
        "The validation loss rises again while the training loss falls.",
        5,
    ),
    "clip_too_often": Explanation(
        "Almost every step is clipped",
        "When every step is clipped, the clip sets the step's length and the learning rate no longer does.",
        5,
    ),
    "grad_conflict": Explanation(
        "Tasks pull against each other",
        "The gradients of two tasks point in opposite directions, so a step for one is a step back for the other.",
        5,
    ),
    "undertrained": Explanation(
        "The loss was still falling at the end",
        "The run ended before the network had learned what it could.",
        5,
    ),
}


def explain(rule: str, name: str = "") -> Explanation:
    """Return what a rule's finding means; for rules of one's own, what can be said of any."""
    known = EXPLANATIONS.get(rule)
    if known is not None:
        return known
    shown = (name or rule).replace("_", " ").replace("-", " ")
    return Explanation(f"The rule “{shown}” fired", "This is a rule of your own: its condition held.", 3)
