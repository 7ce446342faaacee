"""Casts by arithmetic are those of torch's own types, and of the formats' published definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch import ConfigError
from gradwatch.precision import FORMATS, Format, cast, cast_loss

OWN = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def unscaled(name):
    own = FORMATS[name]
    return Format(own.name, own.mantissa_bits, own.smallest_exponent, own.largest)


@pytest.mark.parametrize("name", OWN)
def test_every_number_of_a_format_stays_as_it_is(name):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16) if OWN[name].itemsize == 2 else torch.arange(256)
    bits = bits if OWN[name].itemsize == 2 else bits.to(torch.uint8)
    values = bits.view(OWN[name]).to(torch.float32)
    values = values[values.isfinite()]
    assert torch.equal(cast(values, unscaled(name)), values.double())


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-40, 20))
def test_casts_are_torchs_own(name, seed, exponent):
    to = unscaled(name)
    values = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values = values[values.abs() < to.largest]  # beyond it torch's narrow types differ among each other
    assert torch.equal(cast(values, to), values.to(OWN[name]).double())


def test_halves_are_rounded_to_even_and_half_of_the_smallest_to_nothing():
    smallest = FORMATS["float16"].smallest
    assert smallest == 2.0**-24
    values = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64) * smallest
    assert (cast(values, "float16") / smallest).tolist() == [0, 2, 2]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_four_bits_hold_eight_magnitudes_a_block(name):
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    found = cast(values, name)
    width = FORMATS[name].block
    for row in found:
        for block in row.split(width):
            scales = block.abs().max() / E2M1[1:]
            fits = [(block.abs()[:, None] / s - E2M1).abs().min(dim=1).values.max() < 1e-12 for s in scales]
            assert any(fits)


def test_a_block_of_mx_is_scaled_by_the_power_of_two_that_the_definition_gives():
    block = torch.zeros(32)
    block[0], block[1] = 5.0, 0.3  # floor(log2 5) = 2, less 2 of E2M1: scale 1
    assert cast(block, "mxfp4")[:2].tolist() == [4.0, 0.5]
    assert cast(block * 2**10, "mxfp4")[:2].tolist() == [4.0 * 2**10, 0.5 * 2**10]


def test_a_tensors_scale_lets_its_largest_entry_in_and_costs_no_overflow():
    values = torch.tensor([3e-9, 1e-7, 447.9e3])
    loss = cast_loss(values, "float8_e4m3")
    assert (int(loss.num_nonzero), int(loss.num_underflows), int(loss.num_overflows)) == (3, 2, 0)


def test_what_overflows_without_a_scale_is_counted_and_left_out_of_the_error():
    loss = cast_loss(torch.tensor([1e5, 1.0, 1e-9, 0.0, float("nan")]), "float16")
    assert (int(loss.num_nonzero), int(loss.num_underflows), int(loss.num_overflows)) == (3, 1, 1)
    assert loss.underflow_share == pytest.approx(1 / 3)
    assert loss.relative_error == pytest.approx(1e-9)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (2, 3, 33)])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e38, float("inf"), float("nan")])
def test_odd_values_and_shapes_are_cast(name, shape, value):
    values = torch.full(shape, value)
    found = cast(values, name)
    assert found.shape == values.shape
    assert torch.equal(found.isnan(), values.isnan())
    if value in (0.0, float("inf")):
        assert torch.equal(found, values.double())


@pytest.mark.parametrize("name", FORMATS)
def test_one_bad_entry_does_not_spoil_the_others(name):
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    values[5] = float("inf")
    found = cast(values, name)
    assert found[5].isinf()
    assert found[:5].isfinite().all()
    assert found[6:].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_read_back_from_the_device(name):
    loss = cast_loss(torch.randn(4, 40, device="meta"), name)
    assert loss.num_underflows.shape == ()


def test_an_unknown_format_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="float8_e4m3"):
        cast(torch.ones(2), "float8_e4m4")
    with pytest.raises(ConfigError, match="int64"):
        cast(torch.ones(2, dtype=torch.int64), "float16")
