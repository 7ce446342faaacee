"""Narrow number formats, and what a tensor would lose in them: rounded by arithmetic, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from ..torchside import wide_dtype

__all__ = ["FORMATS", "CastLoss", "Format", "cast", "cast_loss", "format_named"]


@dataclass(frozen=True)
class Format:
    """A binary floating point format, and the scale that goes with it.

    Attributes:
        name: as in a report.
        mantissa_bits: stored bits behind the leading one.
        smallest_exponent: of the smallest normal number.
        largest: largest finite magnitude.
        scaling: `""`: none, the values are cast as they are; `"tensor"`: one power of two per tensor, the largest that
            keeps its largest entry finite; `"mx"`: one power of two per block (OCP Microscaling formats 1.0, section
            6.3); `"nvfp4"`: an E4M3 scale per block below one float32 scale per tensor.
        block: entries along the last dimension that share a scale; 0 without blocks.
    """

    name: str
    mantissa_bits: int
    smallest_exponent: int
    largest: float
    scaling: str = ""
    block: int = 0

    @property
    def smallest(self) -> float:
        """The smallest magnitude above 0, a subnormal one."""
        return 2.0 ** (self.smallest_exponent - self.mantissa_bits)

    @property
    def largest_exponent(self) -> int:
        """Of the largest finite magnitude."""
        return int(torch.frexp(torch.tensor(self.largest, dtype=torch.float64)).exponent) - 1


_ALL = (
    Format("float16", 10, -14, 65504.0),
    Format("bfloat16", 7, -126, 2.0**127 * (2 - 2.0**-7)),
    Format("float8_e4m3", 3, -6, 448.0, "tensor"),
    Format("float8_e5m2", 2, -14, 57344.0, "tensor"),
    Format("mxfp8_e4m3", 3, -6, 448.0, "mx", 32),
    Format("mxfp4", 1, 0, 6.0, "mx", 32),
    Format("nvfp4", 1, 0, 6.0, "nvfp4", 16),
)
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
"""By name: `float16`, `bfloat16`; `float8_e4m3`, `float8_e5m2` with a scale per tensor; `mxfp8_e4m3`, `mxfp4` with one
per 32 entries; `nvfp4` with one per 16."""

_E4M3 = Format("e4m3", 3, -6, 448.0)
_SCALE_EXPONENTS = (-127, 127)
"""What an E8M0 scale can hold."""


def format_named(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown number format {name!r}.{suggest(name, FORMATS)} Known: {', '.join(FORMATS)}.")
    return FORMATS[name]


@dataclass(frozen=True)
class CastLoss:
    """What a tensor loses in a format; 0-dim tensors on its device.

    Attributes:
        num_nonzero: finite entries that are not 0.
        num_underflows: of these, those that become 0.
        num_overflows: of these, those that become infinite (in formats without a scale) or are cut off at the largest
            magnitude by more than rounding.
        squared_error: sum of squared differences over the entries that stay finite.
        squared_sum: sum of squares of those entries.
    """

    num_nonzero: Tensor
    num_underflows: Tensor
    num_overflows: Tensor
    squared_error: Tensor
    squared_sum: Tensor

    @property
    def underflow_share(self) -> float:
        """Share of the entries above 0 in magnitude that become 0; nan where there are none. Waits for the device."""
        return float(self.num_underflows / self.num_nonzero)

    @property
    def relative_error(self) -> float:
        """Root of squared error over sum of squares; nan where there is nothing. Waits for the device."""
        return float((self.squared_error / self.squared_sum).sqrt())


@torch.no_grad()
def cast(tensor: Tensor, to: str | Format) -> Tensor:
    """Return a tensor as it would be after a cast to a format and back, rounded to nearest, ties to even.

    Where the format has blocks they run along the last dimension, as they do for the operands of a matrix product.

    Args:
        tensor: real, floating point, strided; of any shape.
        to: a format or its name, see `FORMATS`.

    Returns:
        Of the same shape and device, float64 (float32 where the device has no float64). Entries that are not finite
        stay as they are.

    Raises:
        ConfigError: there is no format of that name, or the tensor is not a real floating point one.
    """
    to = format_named(to) if isinstance(to, str) else to
    if not tensor.is_floating_point():
        raise ConfigError(f"only real floating point tensors are cast. Got {tensor.dtype}.")
    values = tensor.detach().to(wide_dtype(tensor.device))
    return _limited(_rounded(values, to), to)[0]


def cast_loss(tensor: Tensor, to: str | Format) -> CastLoss:
    """Return what a tensor would lose by a cast, counted on its device; see `cast` for arguments and errors."""
    to = format_named(to) if isinstance(to, str) else to
    if not tensor.is_floating_point():
        raise ConfigError(f"only real floating point tensors are cast. Got {tensor.dtype}.")
    values = tensor.detach().to(wide_dtype(tensor.device))
    rounded, over = _limited(_rounded(values, to), to)
    finite = values.isfinite()
    nonzero = finite & (values != 0)
    over &= finite
    kept = finite & rounded.isfinite()
    error = torch.where(kept, rounded - values, 0).square().sum()
    return CastLoss(
        nonzero.sum(), (nonzero & (rounded == 0)).sum(), over.sum(), error, torch.where(kept, values, 0).square().sum()
    )


@dataclass(frozen=True)
class _Rounded:
    """Values over their scale, rounded as if a format's exponent had no upper end."""

    values: Tensor
    scale: Tensor | float
    shape: torch.Size


def _limited(rounded: _Rounded, to: Format) -> tuple[Tensor, Tensor]:
    """Return the values in their own scale, none beyond the format's largest, and which were beyond it."""
    values, scale = rounded.values, rounded.scale
    over = values.isfinite() & (values.abs() > to.largest)
    most = to.largest if to.scaling else torch.inf
    values = torch.where(over, values.sign() * most, values)
    values = torch.where(values.isfinite(), values * scale, values)
    return tuple(_unblocked(t, rounded.shape, to) for t in (values, over))  # type: ignore[return-value]


def _rounded(values: Tensor, to: Format) -> _Rounded:
    shape = values.shape
    if not values.numel() or not to.scaling:
        return _Rounded(_round(values, to), 1.0, shape)
    if to.block:
        flat = values.reshape(-1, shape[-1]) if values.dim() else values.reshape(1, 1)
        values = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % to.block)).unflatten(-1, (-1, to.block))
    scale = _SCALES[to.scaling](values, to)
    # Where all is 0, or too small for its scale, nothing is left.
    shares = torch.where(values.isfinite(), values / torch.where(scale > 0, scale, torch.inf), values)
    return _Rounded(_round(shares, to), scale, shape)


def _unblocked(values: Tensor, shape: torch.Size, to: Format) -> Tensor:
    if values.shape == shape:
        return values
    return values.flatten(-2)[:, : shape[-1] if shape else 1].reshape(shape)


def _round(values: Tensor, to: Format) -> Tensor:
    exponents = (torch.frexp(values).exponent - 1).clamp(min=to.smallest_exponent)
    step = torch.ldexp(torch.ones_like(values), exponents - to.mantissa_bits)
    return torch.where(values.isfinite(), torch.round(values / step) * step, values)


def _tensor_scale(values: Tensor, to: Format) -> Tensor:
    largest = _magnitudes(values).amax()
    exponents = torch.frexp(largest).exponent - torch.frexp(torch.full_like(largest, to.largest)).exponent
    scale = _power(largest, exponents)
    return torch.where(scale * to.largest < largest, scale * 2, scale)


def _mx_scale(values: Tensor, to: Format) -> Tensor:
    largest = _magnitudes(values).amax(-1, keepdim=True)
    return _power(largest, torch.frexp(largest).exponent - 1 - to.largest_exponent)


def _power(largest: Tensor, exponents: Tensor) -> Tensor:
    scale = torch.ldexp(torch.ones_like(largest), exponents.clamp(*_SCALE_EXPONENTS))
    return torch.where(largest > 0, scale, 0)


def _nvfp4_scale(values: Tensor, to: Format) -> Tensor:
    largest = _magnitudes(values).amax(-1, keepdim=True)
    whole = largest.amax() / (_E4M3.largest * to.largest)
    whole = torch.where(whole > 0, whole, 1)
    return _limited(_Rounded(_round(largest / to.largest / whole, _E4M3), whole, largest.shape), _E4M3)[0]


def _magnitudes(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values.abs(), 0)


_SCALES: dict[str, Callable[[Tensor, Format], Tensor]] = {
    "tensor": _tensor_scale,
    "mx": _mx_scale,
    "nvfp4": _nvfp4_scale,
}
