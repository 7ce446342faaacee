"""The door TensorBoard comes in by. Importing it can't fail for a reason of ours: that would kill `tensorboard`."""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin

__all__ = ["PLUGIN_NAME", "SAMPLES", "GradwatchPlugin"]

PLUGIN_NAME = "gradwatch"

SAMPLES = 10_000
"""Tensors kept of each series. TensorBoard's own default is 100 for plugins it does not know (10 without the fast
loader), drawn at random: a spike of one step would be lost."""

_log = logging.getLogger(__name__)


class GradwatchPlugin(base_plugin.TBLoader):
    """Loads the tab; where that fails, TensorBoard runs on without it."""

    def fix_flags(self, flags: Any) -> None:
        """Ask for all samples of our series, unless the user asked for another number.

        TensorBoard calls this before it begins to read, so that the default reaches both data loaders.
        """
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN_NAME, SAMPLES)

    def load(self, context: Any) -> base_plugin.TBPlugin | None:
        if getattr(context, "data_provider", None) is None:
            _log.warning("The GradWatch tab needs TensorBoard's data provider (--generic_data=auto); it stays away.")
            return None
        try:
            from ._tab import GradwatchTab

            return GradwatchTab(context)
        except Exception:
            _log.exception("The GradWatch tab could not be loaded. TensorBoard goes on without it.")
            return None
