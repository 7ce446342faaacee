"""Which units of ReLU-like modules were never active over a window of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["CHANNELS", "LAST", "UnitWindows", "is_relu_like", "is_saturating", "layout_after"]

MIN_SAMPLES = 256
CHANNELS = "channels"
LAST = "last"
_CHANNEL_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)
_LAST_LAYERS = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


def is_relu_like(module: nn.Module) -> bool:
    """Return whether units of this module can fall silent: zero output and zero gradient below a threshold.

    ReLU and ReLU6. Leaky, smooth and gated ones (GELU, SiLU) pass a gradient wherever they are.
    """
    return isinstance(module, (nn.ReLU, nn.ReLU6))


def is_saturating(module: nn.Module) -> bool:
    """Return whether large inputs of either sign lose their gradient in this module."""
    return isinstance(module, (nn.Sigmoid, nn.Tanh))


def layout_after(module: nn.Module) -> str | None:
    """Return where the units of this module's output lie, or None where it leaves that as it was."""
    if isinstance(module, _CHANNEL_LAYERS):
        return CHANNELS
    return LAST if isinstance(module, _LAST_LAYERS) else None


class UnitWindows:
    """Remembers per module which units were active, until a window of at least 256 samples is complete.

    A unit is an entry of dimension 1 after convolutions (and for 4 or 5 dimensions where nothing else is known), else
    of the last dimension. A sample is an element of the batch, in the second case each position of a sequence. A module
    that is called several times counts a unit as active when it was in any of its calls.
    """

    def __init__(self) -> None:
        self._active: dict[tuple[int, int], Any] = {}
        self._samples: dict[tuple[int, int], int] = {}

    def see(self, row: int, output: Tensor, layout: str | None) -> None:
        """Add one output of the module in this row."""
        if not output.dim() or not output.numel():
            return
        if layout is None:
            layout = CHANNELS if output.dim() > 3 else LAST
        if layout == CHANNELS and output.dim() > 2:
            dims = [d for d in range(output.dim()) if d != 1]
            units, samples = output.shape[1], output.shape[0]
            largest = output.amax(dim=dims)
        else:
            units = output.shape[-1]
            samples = output.numel() // units
            largest = output.reshape(-1, units).amax(dim=0)
        # Not `> 0`: nan is no sign of silence.
        found = ~(largest <= 0)
        key = (row, units)
        # On the host an array: between steps there is no tensor of ours.
        active = found.numpy().copy() if found.device.type == "cpu" else found
        known = self._active.get(key)
        if known is None or type(known) is not type(active):
            self._active[key] = active
        else:
            self._active[key] = known | (active.to(known.device) if isinstance(active, Tensor) else active)
        self._samples[key] = self._samples.get(key, 0) + samples

    def complete(self) -> Iterator[tuple[int, Any, int]]:
        """Yield (row, number of silent units, number of units) of each complete window, and begin it again."""
        for key in [key for key, samples in self._samples.items() if samples >= MIN_SAMPLES]:
            active = self._active.pop(key)
            del self._samples[key]
            yield key[0], (~active).sum(), key[1]
