"""The words of the language."""

from __future__ import annotations

__all__ = ["COLUMNS", "ELEMENTWISE", "FUNCTIONS", "REDUCTIONS", "SCALARS", "TRAILING", "is_scalar"]

COLUMNS = frozenset(
    {
        "grad_norm",
        "grad_absmax",
        "zero_fraction",
        "nonfinite_count",
        "underflow_fraction",
        "param_norm",
        "update_norm",
        "update_ratio",
        "row_spread",
        "output_rms",
        "output_mean",
        "output_std",
        "output_absmax",
        "output_zero_fraction",
        "output_nonfinite",
        "input_nonfinite",
        "silent_fraction",
        "saturated_fraction",
        "grad_output_norm",
        "grad_output_absmax",
        "grad_output_nonfinite",
    }
)
"""One number per path."""

RECORD_FIELDS = frozenset({"loss", "lr", "step", "epoch", "num_samples", "global_norm", "global_norm_after"})

SCALARS = RECORD_FIELDS | frozenset(
    {
        "grad_scale",
        "amp_overflow",
        "num_overflows",
        "num_trainable",
        "grads_kept",
        "output_batch_variance",
        "output_units",
        "output_min",
        "output_max",
        "output_row_sum_min",
        "output_row_sum_max",
        "target_min",
        "target_max",
        "target_row_sum_min",
        "target_row_sum_max",
        "target_entropy",
        "target_is_integer",
        "num_classes",
        "expected_initial_loss",
        "shape_mismatch",
        "baseline_loss",
        "squared_error",
        "squared_error_of_pairs",
        "target_variance",
        "cross_entropy",
        "cross_entropy_of_probabilities",
        "cross_entropy_over_batch",
        "cross_entropy_twice",
        "input_mean",
        "input_std",
        "input_absmax",
        "batch_size",
        "val_loss",
        "train_eval_loss",
        "rank_spread",
        "seconds",
        "end_of_run",
        "conflict_rate",
    }
)
"""One number per step. Beside these, every `val_...` and `surgery_...`."""

TRAILING = ("median", "mean", "std", "max", "min", "quantile", "ema", "lag", "rate")
"""Functions of the past: of x and a number of measurements. The present is not among them."""

REDUCTIONS = ("max_over", "min_over", "mean_over", "median_over", "norm_over", "share_over", "any_over", "all_over")
"""Functions over paths."""

ELEMENTWISE = ("abs", "log", "sqrt")

FUNCTIONS = (*TRAILING, *REDUCTIONS, *ELEMENTWISE, "over")


def is_scalar(name: str) -> bool:
    """Return whether a name may stand for one number per step."""
    return name in SCALARS or name.startswith(("val_", "surgery_"))
