"""What each rule's finding means, in words for someone who trains a first network."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPLANATIONS", "Explanation", "explain"]


class Explanation(NamedTuple):
    """Attributes:
    title: what happened, as a short sentence.
    meaning: why that matters.
    """

    title: str
    meaning: str


EXPLANATIONS = {
    "not_updating": Explanation(
        "Some weights never move",
        "The optimizer does not hold these weights, or leaves them as they are, so this part of the network stays "
        "as it was made.",
    ),
    "grad_not_reset": Explanation(
        "Gradients pile up from step to step",
        "The gradients of earlier steps are still there when new ones are added, so each step follows a mixture "
        "of old and new directions.",
    ),
    "symmetric_units": Explanation(
        "The units of a layer are copies of each other",
        "Units that start alike receive the same gradient and stay alike: a layer of a hundred units then learns "
        "no more than one.",
    ),
    "unnormalised_input": Explanation(
        "The inputs are not normalised",
        "Large or shifted inputs make the first layers' gradients large and lopsided, which forces a small "
        "learning rate on everything else.",
    ),
    "constant_labels": Explanation(
        "All targets of a batch are the same",
        "With one target there is nothing to tell apart: the network learns to give that one answer.",
    ),
    "target_semantics": Explanation(
        "Predictions and targets do not speak of the same thing",
        "The loss compares things that do not match, for example shapes that are silently broadcast, so making it "
        "smaller does not make predictions right.",
    ),
    "output_range": Explanation(
        "The output can't reach the targets",
        "The last activation can only give some of the values that the targets have; the loss can't fall below "
        "what that leaves.",
    ),
    "bad_initial_loss": Explanation(
        "The first loss is higher than a blind guess",
        "A fresh network should be about as good as guessing. A far higher loss says that outputs or inputs start "
        "at the wrong size.",
    ),
    "mistaken_loss": Explanation(
        "The loss computes something else than it should",
        "The numbers follow the formula of a known mistake: a broadcast over the batch, or softmax taken twice or "
        "along the wrong axis. A network can make such a loss small without learning its task.",
    ),
    "blown_up": Explanation(
        "The first steps blew the network up",
        "Within the first steps the loss rose far above that of the untrained network. The careful initialisation is "
        "lost, and what is left often trains badly for ever.",
    ),
    "crawling": Explanation(
        "Training crawls",
        "The loss falls, but every step changes the weights by far less than usual: the same result could be had in "
        "a tenth of the time.",
    ),
    "act_scale": Explanation(
        "Activations start at the wrong size",
        "Outputs shrink or grow from layer to layer, and gradients do the same on the way back.",
    ),
    "non_finite": Explanation(
        "A number became NaN or infinite",
        "One NaN spreads through every sum it enters. After one optimizer step with it all weights are NaN, and "
        "the run is lost.",
    ),
    "amp_overflow": Explanation(
        "Mixed precision overflows",
        "Values leave the range of float16 (about 6e-8 to 65,504). Such steps are thrown away; when it happens "
        "all the time, nothing is learned.",
    ),
    "exploding": Explanation(
        "The gradient exploded",
        "The gradient became many times larger than it was just before. One such step throws the weights far away "
        "from where they were, and Adam remembers it for hundreds of steps.",
    ),
    "gradient_growth": Explanation(
        "The gradient keeps growing",
        "The gradient grows while the loss does not get better. That is the slow form of an explosion: it usually "
        "ends in NaN.",
    ),
    "update_too_large": Explanation(
        "Each step changes the weights too much",
        "A step usually changes weights by about a thousandth of their size. Far larger steps jump over the "
        "valley they should walk into.",
    ),
    "rank_divergence": Explanation(
        "The processes no longer hold the same weights",
        "In data-parallel training all copies must stay equal; copies that differ average gradients of different "
        "networks.",
    ),
    "recomputation_differs": Explanation(
        "The same batch gave another gradient",
        "A processor that computes alike gives the same numbers for the same batch. One that does not has made a "
        "mistake in silence.",
    ),
    "repeated_order": Explanation(
        "Batches come again in the same order",
        "A training set that is shuffled anew in each epoch teaches more than one that is always read in the same "
        "order.",
    ),
    "same_batches_on_ranks": Explanation(
        "Several processes train on the same batches",
        "In data-parallel training each process should see its own part of the data; the same batch twice teaches "
        "nothing more.",
    ),
    "saturated": Explanation(
        "Activations are saturated",
        "Far out, sigmoid and tanh are flat: their slope is nearly zero, and so is every gradient that passes "
        "through them.",
    ),
    "dead_units": Explanation(
        "Many units are dead",
        "A ReLU whose input is below zero for every sample gives zero and passes no gradient back. Such units "
        "can't recover by themselves.",
    ),
    "vanishing": Explanation(
        "The gradient vanishes",
        "The layers far from the loss receive a tiny share of the gradient, so they hardly learn while the last "
        "layers do.",
    ),
    "dead": Explanation(
        "Some weights receive no gradient at all",
        "Exactly zero is not small: nothing that the loss says reaches these weights. Something cuts the path "
        "between them and the loss.",
    ),
    "update_too_small": Explanation(
        "Each step changes the weights too little",
        "With changes of a millionth of a weight's size, training stands almost still.",
    ),
    "dead_signal": Explanation(
        "A number does not change any more",
        "A loss or gradient that is the same to the last digit, step after step, usually means that nothing is "
        "computed, or that an old value is logged.",
    ),
    "constant_output": Explanation(
        "The network gives the same answer to everything",
        "Its output no longer depends on its input, so no gradient can tell it what to change.",
    ),
    "loss_spike": Explanation(
        "The loss jumps again and again",
        "Single batches pull the weights off course, and the network needs many steps to come back.",
    ),
    "diverging": Explanation(
        "The loss goes up",
        "Training makes the network worse instead of better.",
    ),
    "not_learning": Explanation(
        "The network does not learn",
        "After all these steps the loss is about where it began.",
    ),
    "learning_rate_gone": Explanation(
        "The learning rate has all but gone",
        "The schedule has brought it to next to nothing, and the network stays as it is.",
    ),
    "weight_decay_too_large": Explanation(
        "Weight decay outweighs the gradient",
        "The weights are pulled to zero faster than the gradient moves them.",
    ),
    "epsilon_too_large": Explanation(
        "Adam's epsilon outweighs the gradients",
        "Each step is divided by epsilon instead of the gradient's own size, and becomes tiny.",
    ),
    "eval_mode": Explanation(
        "Layers are in eval mode while they are trained",
        "BatchNorm normalises by stale statistics and Dropout does nothing.",
    ),
    "batch_norm_statistics": Explanation(
        "BatchNorm's statistics do not follow the data",
        "In eval mode the network normalises by numbers that are not those of the data.",
    ),
    "weights_overwritten": Explanation(
        "Something beside the optimizer writes the weights",
        "What a step has changed is written over before the next one.",
    ),
    "targets_shifted": Explanation(
        "Targets are shifted by the wrong number of places",
        "The network is to predict another token than the next one.",
    ),
    "too_good": Explanation(
        "The loss is too good",
        "Nothing but a copy is learned as fast: what is to be predicted leaks into the inputs.",
    ),
    "whole_targets": Explanation(
        "Targets were rounded to whole numbers",
        "What lies behind the point is lost, and can't be learned.",
    ),
    "loss_terms": Explanation(
        "Another term outweighs the error of the prediction",
        "The optimizer minimises a penalty, and the prediction stays as it is.",
    ),
    "idle_experts": Explanation(
        "Most experts are not used",
        "The router sends everything to a few, and the others learn nothing.",
    ),
    "dropout_too_large": Explanation(
        "Dropout takes nearly everything",
        "Next to nothing of what a layer gives reaches the next one, and the network can't learn from it.",
    ),
    "one_sided": Explanation(
        "One side of the game has won",
        "Its loss is next to nothing, and the other network gets no gradient that it could learn from.",
    ),
    "no_contest": Explanation(
        "Generator and discriminator both win",
        "What one gains the other must lose: a sign or a label is wrong, and they work for the same end.",
    ),
    "leaked_targets": Explanation(
        "What is to be predicted stands in the inputs",
        "The network need only copy it, and will have nothing to copy when it is used.",
    ),
    "wrong_objective": Explanation(
        "The loss does not score the outputs as classes",
        "It goes down, and the outputs tell the classes no better than a guess.",
    ),
    "sees_future": Explanation(
        "The model sees what it is to predict",
        "Without a causal mask each place can copy the next token: the loss says nothing of what is learned.",
    ),
    "cut_off": Explanation(
        "Some weights never get a gradient",
        "Their module runs, and nothing of what it gives reaches the loss: it stays as it was made.",
    ),
    "repeated_batch": Explanation(
        "Every batch is the same one",
        "The network learns these samples by heart, and sees no others.",
    ),
    "repeated_targets": Explanation(
        "Most samples of a batch share one target",
        "A value that was computed once stands for many samples, which then teach nothing.",
    ),
    "target_outliers": Explanation(
        "A few targets lie far from all others",
        "The squared error is made of them, and each throws the weights far away.",
    ),
    "target_scale": Explanation(
        "Targets are far larger than outputs",
        "The network would have to grow its weights by orders of magnitude before it comes near them.",
    ),
    "restarted": Explanation(
        "The training began anew",
        "Loss and weights are back where they were at the start: what was learned is lost.",
    ),
    "train_eval_mismatch": Explanation(
        "The network behaves differently in eval mode",
        "On the same data it is much worse with model.eval(): layers such as BatchNorm and Dropout act "
        "differently there.",
    ),
    "val_not_learning": Explanation(
        "What is learned does not carry over",
        "The training loss falls, the validation loss does not: what the network learns is of no use on other data.",
    ),
    "stalled": Explanation(
        "A step took very long",
        "The training waited for something: another process, the data, or the disk.",
    ),
    "overfit": Explanation(
        "The network learns the training set by heart",
        "The validation loss rises again while the training loss falls.",
    ),
    "clip_too_often": Explanation(
        "Almost every step is clipped",
        "When every step is clipped, the clip sets the step's length and the learning rate no longer does.",
    ),
    "grad_conflict": Explanation(
        "Tasks pull against each other",
        "The gradients of two tasks point in opposite directions, so a step for one is a step back for the other.",
    ),
    "attention_logits_growing": Explanation(
        "Attention logits grow",
        "The larger they are, the nearer the softmax is to a hard choice, through which hardly any gradient comes "
        "back; the loss often spikes some hundred steps later.",
    ),
    "attention_entropy_collapse": Explanation(
        "A head looks at one place alone",
        "It no longer weighs what it sees, its gradient is nearly zero, and so it can't learn to look elsewhere.",
    ),
    "logits_drift": Explanation(
        "The scores of the output drift",
        "The loss does not notice when all scores grow together, but low precision does: they lose the digits in which "
        "they differ.",
    ),
    "dormant_units_growing": Explanation(
        "Ever more units have nothing to say",
        "A unit that its layer does without gets hardly any gradient and does not come back; a network that loses its "
        "units loses with them what it could still learn.",
    ),
    "residual_growing": Explanation(
        "What goes through the blocks grows",
        "Each block adds to it, and nothing holds its size. While the loss gets no better for it, scores, gradients "
        "and rounding errors grow with it.",
    ),
    "steps_too_long": Explanation(
        "Each step goes too far",
        "It passes the lowest point in its direction and ends on a rise, which the next steps must win back; once they "
        "no longer do, the loss goes up.",
    ),
    "updates_rounded_away": Explanation(
        "Updates are too small for the number format",
        "A weight in half precision keeps two or three digits; an update below the last of them changes nothing, "
        "however often it comes.",
    ),
    "undertrained": Explanation(
        "The loss was still falling at the end",
        "The run ended before the network had learned what it could.",
    ),
}


def explain(rule: str, name: str = "") -> Explanation:
    """Return what a rule's finding means; for rules of one's own, what can be said of any."""
    known = EXPLANATIONS.get(rule)
    if known is not None:
        return known
    shown = (name or rule).replace("_", " ").replace("-", " ")
    return Explanation(f"The rule “{shown}” fired", "This is a rule of your own: its condition held.")
