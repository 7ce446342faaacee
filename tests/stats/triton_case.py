"""Runs the CUDA kernels without a device, as Triton interprets them, and compares with float64: `test_triton.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradwatch.stats._triton import scan


def reference(x: Tensor) -> list[float]:
    """Return sum, sum of squares, zeros, non-finite and absmax, in float64."""
    wide = x.double()
    known = wide[~wide.isnan()].abs()
    most = float(known.max()) if len(known) else 0.0
    return [float(wide.sum()), float(wide.square().sum()), int((wide == 0).sum()), int((~wide.isfinite()).sum()), most]


def agree(x: Tensor, *, digits: float) -> None:
    """Assert that the kernel finds what float64 does: sums relative to those of what is added up."""
    (found, again), counts = scan([x, x.clone()], histograms=True)
    assert torch.equal(found.nan_to_num(7.0), again.nan_to_num(7.0))
    assert counts is not None
    assert int(counts[0].sum()) == x.numel()
    want, got = reference(x), found.tolist()
    assert got[2:] == want[2:], (x.dtype, got, want)
    whole = float(x.double().abs().sum())
    for value, wanted, size in ((got[0], want[0], whole), (got[1], want[1], want[1])):
        if math.isfinite(wanted):
            assert abs(value - wanted) <= digits * size, (x.dtype, value, wanted)
        else:
            assert value == wanted or (math.isnan(value) and math.isnan(wanted)), (x.dtype, value, wanted)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    digits = {torch.float32: 1e-7, torch.bfloat16: 1e-8, torch.float16: 1e-8, torch.float64: 1e-14}
    for dtype, most in digits.items():
        # The interpreter gets the smallest numbers of bfloat16 wrong.
        for scale in (1e-44, 1e-37, 1e-20, 1e-15, 1.0, 1e15, 1e20, 1e37):
            x = (torch.randn(3000, generator=generator, dtype=torch.float64) * scale).to(dtype)
            if x.isfinite().all() and (dtype is not torch.bfloat16 or scale > 1e-36):
                agree(x, digits=most)
        for bad in ([math.inf], [-math.inf], [math.nan], [math.inf, -math.inf], [0.0, -0.0]):
            x = torch.randn(3000, generator=generator).to(dtype)
            x[torch.arange(len(bad)) * 1024 + 5] = torch.tensor(bad, dtype=dtype)
            agree(x, digits=most)
    # From one end of float32 to the other, and of one sign: nothing but additions whose sums are far larger.
    ends = torch.logspace(-44, 38, 5000, dtype=torch.float64).float()
    agree(ends[torch.randperm(5000, generator=generator)], digits=1e-7)
    agree(torch.full((40_000,), 3e38), digits=1e-7)
    agree(torch.full((40_000,), 1 / 3), digits=1e-7)
    agree(torch.zeros(0), digits=0.0)


if __name__ == "__main__":
    main()
