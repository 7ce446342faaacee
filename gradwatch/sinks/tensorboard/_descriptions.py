"""What each tag of the stock dashboards shows, and in which unit: TensorBoard's cards say it."""

from __future__ import annotations

from ...records import column_of

__all__ = ["BAND_TITLES", "Descriptions"]

GRADIENT = "that of the gradient (loss per unit of weight)"

SCALAR_WORDS = {
    "global_norm": ("L2 norm of all gradients as one vector, before treatment", GRADIENT),
    "global_norm_after": ("L2 norm of all gradients as one vector, after gradwatch's treatments", GRADIENT),
    "global_norm_max": ("largest `global_norm` of the steps since the last point", GRADIENT),
    "largest_layer": ("largest gradient norm of a weight (two dimensions or more)", GRADIENT),
    "smallest_layer": ("smallest gradient norm of a weight (two dimensions or more)", GRADIENT),
    "update_ratio_median": ("norm of the update over norm of the weight, median over weights", "a ratio"),
    "update_ratio_max": ("norm of the update over norm of the weight, largest over weights", "a ratio"),
    "clipped_share": ("share of the steps since the last point at which a treatment changed something", "0 to 1"),
    "num_skipped": ("steps so far at which the optimizer was kept from moving", "steps"),
    "num_incidents": ("incidents so far", "incidents"),
    "loss": ("mean of the losses of the step's micro-batches", "that of the loss"),
    "limit": ("smallest global norm that some rule or treatment would not accept", GRADIENT),
}
BAND_TITLES = {
    "grad_norm": "Gradient norm of the layers",
    "update_ratio": "Update / weight of the layers",
    "output_rms": "Activation RMS of the layers",
}
BAND_UNITS = {"grad_norm": GRADIENT, "update_ratio": "a ratio", "output_rms": "that of the activation"}
QUANTILE_WORDS = {"p10": "10th percentile", "median": "median", "p90": "90th percentile"}


class Descriptions:
    """Gives the description of a tag with its first value, and nothing with the others: readers keep the first.

    Args:
        name: tags begin with it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: set[str] = set()

    def first(self, tag: str, words: str, unit: str) -> str:
        """Return the description where the tag is new; "" where it was told."""
        if tag in self._told:
            return ""
        self._told.add(tag)
        return f"{words[0].upper()}{words[1:]}. Unit: {unit}."

    def scalar(self, tag: str, key: str) -> str:
        """Return what a number of the headline is."""
        return self.first(tag, *SCALAR_WORDS[key])

    def band(self, tag: str, column: str, quantile: str) -> str:
        """Return what a quantile over layers is."""
        known = column_of(column)
        meaning = "" if known is None else f": {known.meaning.rstrip('.')}"
        return self.first(tag, f"{QUANTILE_WORDS[quantile]} over the layers{meaning}", BAND_UNITS[column])

    def histogram(self, tag: str, path: str, scale: str) -> str:
        """Return what a histogram counts."""
        if scale == "log10":
            return self.first(
                tag,
                f"entries of the gradient of `{path}` by the decimal logarithm of their magnitude: -3 is 0.001; zeros "
                "are left out",
                f"log10 of {GRADIENT}",
            )
        return self.first(tag, f"entries of the gradient of `{path}`, with their sign", GRADIENT)

    def text(self, tag: str, words: str) -> str:
        """Return what a text is."""
        return self.first(tag, words, "none, it is text")
