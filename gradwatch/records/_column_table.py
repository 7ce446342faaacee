"""The table of all built-in columns and scalars: plain values, told once and read by all who name, draw or explain.

In the order in which pictures offer them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["BUILT_IN", "FAMILIES", "FIELDS"]

_HISTOGRAMS = {"kind": "parameter", "when": "histograms_every", "absent": "the parameter has no gradient"}
_UPDATES = {
    "kind": "parameter",
    "when": "updates_every",
    "absent": "the step was skipped, or copies take too much memory",
}
_OUTPUT = {"kind": "module", "when": "activations_every", "absent": "the module did not run, or gave no float tensor"}
_GRAD_OUTPUT = {"kind": "module", "when": "activations_every", "absent": "no gradient came back to the module's output"}
_SHARE = {"scale": "share", "unit": "share"}
_ATTENTION = {
    "kind": "module",
    "when": "with the statistic `attention`, one step in 50",
    "absent": "it does not attend, or in a way that is not known",
}
_LATER = "one step in 100"
_COUNT = {"scale": "count", "unit": "entries"}

_COLUMNS: tuple[dict[str, Any], ...] = (
    {
        "name": "grad_norm",
        "kind": "parameter",
        "label": "gradient norm",
        "combine": "norm",
        "meaning": "L2 norm of each parameter’s gradient, as the optimizer gets it before treatment.",
        "absent": "the parameter has no gradient",
    },
    {
        **_UPDATES,
        "name": "update_ratio",
        "label": "update / weight ratio",
        "short": "update/weight",
        "guide": 1e-3,
        "meaning": "Size of the update over size of the weight. "
        "Around 1e-3 (log10 −3) is usual; 1e-1 is wild, 1e-6 hardly moves.",
    },
    {
        **_GRAD_OUTPUT,
        "name": "grad_output_norm",
        "label": "grad_output norm",
        "combine": "norm",
        "meaning": "Gradient of the loss with respect to each module’s output: "
        "where the signal grows or fades on its way back.",
    },
    {
        **_OUTPUT,
        "name": "output_rms",
        "label": "activation rms",
        "meaning": "Root mean square of each module’s output.",
    },
    {
        **_HISTOGRAMS,
        **_SHARE,
        "name": "zero_fraction",
        "label": "zero share of gradient",
        "meaning": "Share of the gradient’s entries that are exactly zero.",
    },
    {
        **_UPDATES,
        "name": "param_norm",
        "label": "weight norm",
        "combine": "norm",
        "meaning": "L2 norm of each parameter, before the update.",
    },
    {
        **_HISTOGRAMS,
        "name": "grad_absmax",
        "label": "gradient, largest entry",
        "meaning": "Largest magnitude in each gradient.",
    },
    {
        **_UPDATES,
        "name": "update_norm",
        "label": "update norm",
        "combine": "norm",
        "in_report": False,
        "meaning": "L2 norm of what the optimizer added.",
    },
    {
        **_UPDATES,
        **_SHARE,
        "name": "update_lost",
        "label": "updates rounded away",
        "in_report": False,
        "meaning": "Of the entries of a parameter in 16 bits that had a gradient, the share that the step left as they "
        "were: their update was rounded away.",
        "absent": "the parameter does not have 16 bits, or no gradient",
    },
    {
        **_HISTOGRAMS,
        **_COUNT,
        "name": "nonfinite_count",
        "label": "non-finite entries",
        "meaning": "NaN and infinite entries of each gradient.",
    },
    {
        **_HISTOGRAMS,
        **_SHARE,
        "name": "underflow_fraction",
        "label": "underflow share",
        "meaning": "Share of the gradient’s entries that are not zero and lie below 2⁻¹⁴ (6.1e-5), "
        "float16’s smallest normal number: below it digits are lost.",
    },
    {
        **_OUTPUT,
        **_SHARE,
        "name": "output_zero_fraction",
        "label": "activation zero share",
        "meaning": "Share of each output that is exactly zero.",
    },
    {
        **_OUTPUT,
        **_SHARE,
        "name": "silent_fraction",
        "label": "silent units",
        "meaning": "Share of units that no sample of the window activated.",
        "absent": "the module is no ReLU or the like",
    },
    {
        **_OUTPUT,
        **_SHARE,
        "name": "saturated_fraction",
        "label": "saturated share",
        "meaning": "Share of sigmoid or tanh inputs beyond ±5, where the slope is nearly zero.",
        "absent": "the module is no sigmoid or tanh",
    },
    {
        **_OUTPUT,
        "name": "output_std",
        "label": "activation standard deviation",
        "meaning": "Spread of each module’s output.",
    },
    {
        **_OUTPUT,
        "name": "output_mean",
        "label": "activation |mean|",
        "signed": True,
        "meaning": "Mean of each module’s output; pictures show its magnitude.",
    },
    {
        **_OUTPUT,
        "name": "output_absmax",
        "label": "activation, largest",
        "meaning": "Largest magnitude in each module’s output.",
    },
    {
        **_GRAD_OUTPUT,
        "name": "grad_output_absmax",
        "label": "grad_output, largest",
        "meaning": "Largest magnitude in each grad_output.",
    },
    {
        **_OUTPUT,
        **_COUNT,
        "name": "output_nonfinite",
        "label": "non-finite activations",
        "meaning": "NaN and infinite entries of each module’s output.",
    },
    {
        **_OUTPUT,
        **_COUNT,
        "name": "input_nonfinite",
        "label": "non-finite inputs",
        "in_report": False,
        "meaning": "NaN and infinite entries of each module’s input.",
        "absent": "the module was given no float tensor",
    },
    {
        **_GRAD_OUTPUT,
        **_COUNT,
        "name": "grad_output_nonfinite",
        "label": "non-finite grad_output",
        "meaning": "NaN and infinite entries of each grad_output.",
    },
    {
        "name": "spectral_norm",
        "kind": "parameter",
        "label": "largest singular value",
        "when": f"with the statistic `weight_spectra`, {_LATER}",
        "absent": "the parameter has fewer than two dimensions, or lies in pieces",
        "meaning": "Largest singular value of each weight.",
    },
    {
        "name": "stable_rank",
        "kind": "parameter",
        "scale": "linear",
        "label": "stable rank",
        "when": f"with the statistic `weight_spectra`, {_LATER}",
        "absent": "the parameter has fewer than two dimensions, or lies in pieces",
        "meaning": "Squared norm of each weight over the square of its largest singular value.",
    },
    {
        **_SHARE,
        "name": "dormant_fraction",
        "kind": "module",
        "label": "dormant units",
        "when": f"with the statistic `dormant_units`, {_LATER}",
        "absent": "the module’s output has no units",
        "meaning": "Share of each module’s units whose mean magnitude is at most 0.025 of that of all.",
    },
    {
        "name": "effective_rank",
        "kind": "module",
        "scale": "linear",
        "label": "effective rank",
        "when": f"with the statistic `effective_rank`, {_LATER}",
        "absent": "the module’s output has no units, or is 0",
        "meaning": "Directions in which each module’s outputs differ over a batch: e to the entropy of their singular "
        "values’ shares, of at most 64 units.",
    },
    {
        **_ATTENTION,
        "name": "attention_logit_max",
        "label": "attention logit, largest",
        "guide": 100.0,
        "meaning": "Largest attention logit of any head: what the softmax is taken of, where no mask is.",
    },
    {
        **_ATTENTION,
        "name": "attention_logit_head",
        "label": "head of the largest logit",
        "scale": "linear",
        "in_report": False,
        "meaning": "The head that has it, counted from 0.",
    },
    {
        **_ATTENTION,
        **_SHARE,
        "name": "attention_entropy",
        "label": "attention entropy",
        "meaning": "Entropy of the attention pattern over all heads, as a share of what it can be at most: "
        "1 looks everywhere alike, 0 at one place.",
    },
    {
        **_ATTENTION,
        **_SHARE,
        "name": "attention_entropy_min",
        "label": "attention entropy, lowest head",
        "in_report": False,
        "meaning": "The same of the head that has the lowest one.",
    },
    {
        "name": "row_spread",
        "kind": "parameter",
        "label": "row spread at start",
        "in_report": False,
        "meaning": "How much a weight’s rows differ; 0 is a symmetric start.",
        "when": "step 0",
        "absent": "the parameter has fewer than two rows or two dimensions",
    },
    {
        "name": "recompute_elements",
        "kind": "parameter",
        "label": "elements that differ when run again",
        "in_report": False,
        "meaning": "Elements of each gradient that came out otherwise when the same batch was run again.",
        "when": "recompute_every",
        "absent": "what is run again is not what was run, or the gradient lies in pieces",
    },
    {
        "name": "replica_differs",
        "kind": "parameter",
        "label": "ranks’ copies differ",
        "in_report": False,
        "meaning": "What differs over the ranks, bit for bit: 1 the gradient, 2 the weight, 3 both.",
        "when": "replicas_every",
        "absent": "one rank, or the parameter lies in pieces",
    },
)

_SAMPLED = "activations_every"
_VALIDATED = "after a validation"
_NO_TARGETS = "no targets were given"
_NO_OUTPUT = "no prediction was seen"
_SET = "updates_every"
_NOISE = "with `noise_scale` or micro-batch surgery"
_NO_TOKENS = "inputs and targets are no tokens of one size"
_NO_GRAPH = "the graph does not tell"
_NO_FORMULA = "prediction and targets fit no such formula"

FIELDS = ("loss", "lr", "step", "epoch", "num_samples", "global_norm", "global_norm_after")
"""Scalars that are attributes of the record itself."""

# name, meaning, when, absent
_SCALARS: tuple[tuple[str, str, str, str], ...] = (
    ("loss", "Mean of the losses of the step’s micro-batches.", "every step", "no loss was given"),
    ("lr", "Largest learning rate over the optimizers’ groups.", "every step", ""),
    ("step", "Optimizer steps taken before this one.", "every step", ""),
    ("epoch", "As the trainer counts; -1 where it does not.", "every step", ""),
    ("num_samples", "Samples in the step’s batches; 0 where unknown.", "every step", ""),
    ("global_norm", "L2 norm of all gradients as one vector, before treatment.", "every step", "no gradient was seen"),
    ("global_norm_after", "The same after gradwatch’s treatments.", "every step", "no gradient was seen"),
    (
        "global_norm_applied",
        "The same as the optimizer got it, after every other clip.",
        "every step",
        "the optimizer did not move, or it was not measured",
    ),
    ("trainer_clip", "The largest norm that the trainer’s own clip lets pass.", "every step", "it does not clip"),
    ("limit", "Smallest global norm that some rule would not accept.", "every step", "no rule has a limit yet"),
    ("grad_scale", "The loss scaler’s scale.", "every step", "there is no loss scaler"),
    ("amp_overflow", "1 where the loss scaler drops the step.", "every step", "there is no loss scaler"),
    ("num_overflows", "Steps that the loss scaler has dropped so far.", "every step", "there is no loss scaler"),
    ("num_trainable", "Parameters that require a gradient and are in an optimizer.", "every step", ""),
    ("grads_kept", "1 where gradients were not reset since the last step.", "every step", "it can’t be told"),
    ("optimizer", "Which optimizer stepped.", "every step", "all step together"),
    ("rank_spread", "Largest minus smallest gradient norm of the ranks, over the largest.", "every step", "one rank"),
    (
        "replicas_differ",
        "Ranks whose weights are not those of most, bit for bit.",
        "replicas_every",
        "one rank, or not compared on all",
    ),
    (
        "replica_gradients_differ",
        "Ranks whose reduced gradients are not those of most, bit for bit.",
        "replicas_every",
        "one rank, or not compared on all",
    ),
    ("replica_rank", "The rank that differs; -1 where it can’t be told.", "replicas_every", "none differs"),
    ("recompute_differs", "Gradients that came out otherwise when run again.", "recompute_every", "none can be told"),
    ("recompute_rank", "The rank on which most of them did.", "recompute_every", "none differs"),
    (
        "recompute_noise",
        "Largest relative distance between two re-runs; 0 where they are the same bits.",
        "recompute_every",
        "none can be told",
    ),
    (
        "batch_fingerprint",
        "Checksum over some elements of the step’s batches.",
        "with `fingerprints`; over ranks also at `activations_every`",
        "no batch was seen, or ranks share batches",
    ),
    (
        "ranks_alike",
        "Ranks whose batches are the very ones of another rank.",
        "with `fingerprints`, or `activations_every`",
        "one rank, or ranks share batches",
    ),
    ("seconds", "Since the step before.", "every step", ""),
    ("overhead_seconds", "Spent by gradwatch since the step before.", "every step", ""),
    ("end_of_run", "1 in the last record, with which rules judge the run as a whole.", "at the end", ""),
    ("val_loss", "The validation loss.", _VALIDATED, "none was given"),
    ("train_eval_loss", "Loss of training data in eval mode.", _VALIDATED, "none was given"),
    ("batch_size", "First dimension of the inputs.", _SAMPLED, "the batch holds no float tensor"),
    ("input_mean", "Mean of the inputs.", _SAMPLED, "the batch holds no float tensor"),
    ("input_std", "Standard deviation of the inputs.", _SAMPLED, "the batch holds no float tensor"),
    ("input_absmax", "Largest magnitude in the inputs.", _SAMPLED, "the batch holds no float tensor"),
    ("val_input_mean", "Mean of the validation inputs.", _VALIDATED, "no validation batch was seen"),
    ("val_input_std", "Standard deviation of the validation inputs.", _VALIDATED, "no validation batch was seen"),
    ("val_input_absmax", "Largest magnitude in the validation inputs.", _VALIDATED, "no validation batch was seen"),
    ("output_units", "Numbers that the model gives per sample.", _SAMPLED, _NO_OUTPUT),
    (
        "output_batch_variance",
        "Largest over units of the prediction’s variance over samples.",
        _SAMPLED,
        "fewer than two samples",
    ),
    ("output_min", "Smallest entry of the prediction.", _SAMPLED, _NO_OUTPUT),
    ("output_max", "Largest entry of the prediction.", _SAMPLED, _NO_OUTPUT),
    ("output_row_sum_min", "Smallest sum over the classes of a sample.", _SAMPLED, "there is one unit"),
    ("output_row_sum_max", "Largest sum over the classes of a sample.", _SAMPLED, "there is one unit"),
    (
        "output_log_z",
        "Logarithm of the sum of the exponentials of a prediction’s scores, mean over some rows.",
        _SAMPLED,
        "there is one unit",
    ),
    (
        "slope_after_step",
        "Slope of the loss along the last step at its end: gradient times step; above 0 the loss rises there.",
        "every step, with the statistic `step_curvature`",
        "there was no step before",
    ),
    ("target_min", "Smallest target.", _SAMPLED, _NO_TARGETS),
    ("target_max", "Largest target.", _SAMPLED, _NO_TARGETS),
    ("target_row_sum_min", "Smallest sum over a target’s classes.", _SAMPLED, "targets have no rows"),
    ("target_row_sum_max", "Largest sum over a target’s classes.", _SAMPLED, "targets have no rows"),
    ("target_is_integer", "1 where targets are whole numbers by type.", _SAMPLED, _NO_TARGETS),
    ("target_entropy", "Entropy of the classes in the batch.", _SAMPLED, "targets are no class indices"),
    ("target_variance", "Squared error of the best constant prediction.", _SAMPLED, _NO_FORMULA),
    ("num_classes", "Classes that the prediction has.", _SAMPLED, "targets are no class indices"),
    ("expected_initial_loss", "Cross-entropy of a uniform guess.", _SAMPLED, "targets are no class indices"),
    ("baseline_loss", "Cross-entropy of the classes’ shares.", _SAMPLED, "targets are no class indices"),
    ("shape_mismatch", "1 where prediction and targets broadcast against each other.", _SAMPLED, "they do not"),
    ("squared_error", "Mean squared error of the batch.", _SAMPLED, _NO_FORMULA),
    ("squared_error_of_pairs", "The same of every prediction against every target.", _SAMPLED, _NO_FORMULA),
    ("cross_entropy", "Cross-entropy of the batch.", _SAMPLED, _NO_FORMULA),
    ("cross_entropy_of_probabilities", "The same, predictions taken as probabilities.", _SAMPLED, _NO_FORMULA),
    ("cross_entropy_over_batch", "The same, softmax over the samples.", _SAMPLED, _NO_FORMULA),
    ("cross_entropy_twice", "The same, softmax applied twice.", _SAMPLED, _NO_FORMULA),
    ("rolled_back_from", "The step after which the training went back.", "after a rollback", "it did not"),
    ("rolled_back_to", "Steps taken by the time of that snapshot.", "after a rollback", "it did not"),
    ("cross_entropy_shifted", "The same, each position against the next one’s class.", _SAMPLED, _NO_FORMULA),
    ("binary_cross_entropy", "Binary cross-entropy of the batch, from logits.", _SAMPLED, _NO_FORMULA),
    ("binary_cross_entropy_twice", "The same, of logits that a sigmoid has made.", _SAMPLED, _NO_FORMULA),
    ("binary_baseline", "Binary cross-entropy of the best constant.", _SAMPLED, _NO_FORMULA),
    ("binary_least", "Binary cross-entropy of the targets themselves.", _SAMPLED, _NO_FORMULA),
    ("target_is_whole", "1 where numbers to be predicted are whole ones.", _SAMPLED, "targets are classes"),
    ("target_at_minus_1", "Share of targets that are the token before.", _SAMPLED, _NO_TOKENS),
    ("target_at_0", "Share of targets that are the input’s own token.", _SAMPLED, _NO_TOKENS),
    ("target_at_1", "Share of targets that are the next token.", _SAMPLED, _NO_TOKENS),
    ("target_at_2", "Share of targets that are the token after the next.", _SAMPLED, _NO_TOKENS),
    ("target_in_inputs", "1 where targets stand in the inputs as they are.", _SAMPLED, "inputs hold no such rows"),
    ("target_mode", "The commonest of the batch’s targets.", _SAMPLED, "targets are no numbers, or are many"),
    ("target_mode_share", "Share of the targets that are just this number.", _SAMPLED, "as above"),
    ("target_tail", "Farthest target from the median, in median distances.", _SAMPLED, "half of the targets are alike"),
    ("attention_sees_all", "Share of the attention behind the outputs without any mask.", _SAMPLED, _NO_GRAPH),
    ("loss_of_softmax", "1 where a softmax comes before a cross-entropy.", _SAMPLED, _NO_GRAPH),
    ("loss_of_sigmoid", "1 where a sigmoid comes before a loss of logits.", _SAMPLED, _NO_GRAPH),
    ("loss_of_chosen", "1 where the loss compares one value a row, chosen by an index.", _SAMPLED, _NO_GRAPH),
    ("loss_of_shares", "1 where the loss is a binary cross-entropy.", _SAMPLED, _NO_GRAPH),
    ("targets_of_loss", "1 where targets were found in the loss’s graph alone.", _SAMPLED, "the batch holds them"),
    ("weight_decay", "Largest weight decay over the optimizers’ groups.", _SET, "there is none"),
    ("decay_is_decoupled", "1 where it acts beside the gradient, as in AdamW.", _SET, "there is no weight decay"),
    ("epsilon", "Largest epsilon of Adam and its kin.", _SET, "the optimizer has none, or keeps pieces"),
    ("second_moments", "Sum of some of Adam’s second moments.", _SET, "the optimizer has none, or keeps pieces"),
    ("num_second_moments", "How many these are.", _SET, "the optimizer has none, or keeps pieces"),
    ("beta2", "Largest second beta of Adam and its kin.", _SET, "the optimizer has none, or keeps pieces"),
    ("dropout_in_eval", "Share of the dropout layers that are in eval mode.", _SET, "there are none"),
    ("dropout_rate", "Largest rate of the dropout layers that are in training mode.", _SET, "there are none"),
    (
        "batch_norm_in_eval",
        "Share of the BatchNorm layers in eval mode with the module around them.",
        _SET,
        "there are none",
    ),
    ("batch_norm_batches", "Batches that BatchNorm has seen in training mode.", _SET, "there are no such layers"),
    ("batch_norm_means", "Size of BatchNorm’s running means; 0 where untouched.", _SET, "there are no such layers"),
    ("batch_norm_followed", "Share of what these showed that its statistics hold.", _SET, "there are no such layers"),
    ("batch_norm_momentum", "Smallest momentum of BatchNorm.", _SET, "there are no such layers"),
    (
        "update_error",
        "Largest relative standard error of an update norm that is estimated from a sample of elements.",
        _SET,
        "whole copies fit in `memory_limit_mb`",
    ),
    ("written_between", "Share of parameters written to since the optimizer’s last step.", _SET, ""),
    ("others_loss", "Last loss of another optimizer of this training.", "every step", "one optimizer steps alone"),
    (
        "others_step",
        "Other watched trainings in this program that stepped since this one did.",
        "every step",
        "there are none",
    ),
    ("conflict_rate", "Share of pairs of tasks whose gradients conflict.", "with task losses", "no task losses"),
    ("surgery_length_ratio", "Length of the combined gradient over that of the sum.", "with surgery", ""),
    ("surgery_cos_to_sum", "Cosine of the combined gradient with the sum.", "with surgery", ""),
    ("surgery_applied", "1 where surgery changed the gradient.", "with surgery", ""),
    ("surgery_fallback", "1 where surgery fell back to the mean.", "with surgery", ""),
    ("micro_cos", "Mean cosine between gradients of micro-batches.", "with micro-batch surgery", ""),
    ("micro_cos_min", "Smallest cosine between gradients of micro-batches.", "with micro-batch surgery", ""),
    ("micro_taken", "Micro-batches that agreed and were taken.", "with micro-batch surgery", "not by cosine"),
    (
        "micro_signs_kept",
        "Share of entries on whose sign micro-batches agree.",
        "with micro-batch surgery",
        "not by signs",
    ),
    ("noise_trace", "Trace of the covariance of the samples’ gradients.", _NOISE, ""),
    ("noise_squared_norm", "Squared norm of the gradient without noise.", _NOISE, ""),
    ("noise_scale", "Batch size at which noise and signal are equal.", _NOISE, "one batch size"),
    ("noise_scale_error", "Standard error of the noise scale.", "with `noise_scale`", ""),
    ("noise_batch_size", "Samples of the step, at which the noise scale was measured.", "with `noise_scale`", ""),
)

FAMILIES: Mapping[str, str] = {
    "val_": "Validation metrics, by their names.",
    "surgery_weight/": "Weight of each task in the combined gradient.",
    "surgery_": "What surgery did.",
    "task_norm/": "Gradient norm of each task.",
    "task_cos/": "Cosine between two tasks’ gradients.",
    "task_similarity/": "Magnitude similarity of two tasks’ gradients.",
    "kind/": "1 where the training is of this kind.",
    "local_norm/": "Gradient norm of each rank before reduction.",
    "attention_logit_max/": "Largest attention logit of each head, by module and head.",
    "attention_entropy/": "Entropy of each head’s pattern, as a share of what it can be at most.",
}
"""How names begin of scalars that depend on the run, and what they are."""


def _scalars() -> Iterator[dict[str, Any]]:
    for name, meaning, when, absent in _SCALARS:
        yield {"name": name, "kind": "scalar", "meaning": meaning, "when": when, "absent": absent}


BUILT_IN: tuple[dict[str, Any], ...] = (*_COLUMNS, *_scalars())
