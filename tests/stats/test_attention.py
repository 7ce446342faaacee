"""Largest scores and entropies of attention, block by block, against all of them at once in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.stats import _attention, attention_bound, attention_peaks, attention_sums
from gradwatch.torchside import Attended


def by_hand(q, k, *, mask=None, is_causal=False, scale=None):
    """Return largest score, sum of entropies and of their bounds by head, from whole scores in float64."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    sees = scores > -1e30
    pattern = scores.softmax(dim=-1)
    entropy = torch.special.entr(torch.where(sees, pattern, 0.0)).sum(-1)
    entropy = torch.where(sees.any(-1), entropy, 0.0)
    bound = sees.sum(-1).clamp(min=1).double().log()
    peaks = torch.where(sees, scores, -math.inf).amax(dim=(0, 2, 3))
    return peaks, torch.stack([entropy.sum(dim=(0, 2)), bound.sum(dim=(0, 2))], dim=-1)


def masks(kind, generator):
    """Return a mask of a kind for two samples, four heads, 7 queries and 9 keys."""
    free = torch.rand(2, 1, 7, 9, generator=generator) > 0.4
    free[0, 0, 3] = False  # a query that may look at nothing
    return {
        "none": None,
        "bool": free,
        "places": free[0, 0],
        "added": torch.zeros(2, 1, 7, 9).masked_fill(~free, torch.finfo(torch.float32).min),
        "infinite": torch.zeros(7, 9).masked_fill(~free[1, 0], -math.inf),
        "slopes": -torch.arange(9.0) * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None],
    }[kind]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["none", "bool", "places", "added", "infinite", "slopes"]),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 1.0, 0.3]),
    groups=st.sampled_from([1, 2, 4]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    block=st.sampled_from([1, 40, 300, 2**20]),
    seed=st.integers(0, 99),
)
def test_every_block_size_gives_what_the_whole_does(kind, is_causal, scale, groups, size, block, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 7, 8, generator=generator) * size
    k = torch.randn(2, 4 // groups, 9, 8, generator=generator)
    mask = masks(kind, generator)
    is_causal = is_causal and mask is None
    attended = Attended(q, k, mask, is_causal, scale)
    peaks, sums = by_hand(q, k, mask=mask, is_causal=is_causal, scale=scale)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_attention, "_HOST_BLOCK", block)
        found_sums, found = attention_sums(attended)
        alone = attention_peaks(attended)
    assert torch.allclose(found, peaks, rtol=1e-5, atol=1e-6)
    assert torch.equal(alone.double(), found)
    assert torch.allclose(found_sums, sums, rtol=1e-4, atol=1e-4)
    bound = attention_bound(attended)
    assert bound is None or bool((bound.double() >= peaks * (1 - 1e-6)).all())


def test_the_bound_is_the_longest_query_times_the_longest_key():
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2, 4)
    q[0, 0, 0], q[0, 1, 0] = torch.tensor([1.0, 1, 1, 1]), torch.tensor([3.0, 0, 4, 0])
    k[0, 0, 0], k[0, 0, 1] = torch.tensor([2.0, 2, 2, 2]), torch.tensor([1.0, 0, 0, 0])
    bound = attention_bound(Attended(q, k, None, False, 1.0))
    assert bound.tolist() == pytest.approx([2 * 4, 5 * 4])


def test_scores_that_are_there_are_taken_as_they_are():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k)
    peaks, sums = by_hand(q, k, scale=1.0)
    for heads, given_scores in ((None, scores), (4, scores.flatten(0, 1))):
        found_sums, found = attention_sums(Attended(q, k, scale=1.0, scores=given_scores, heads=heads))
        assert torch.allclose(found, peaks)
        assert torch.allclose(found_sums, sums, rtol=1e-5)


def test_half_precision_is_not_rounded_again():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 16, 32).to(torch.bfloat16) for _ in range(2))
    peaks, _ = by_hand(q, k)
    assert torch.allclose(attention_peaks(Attended(q, k)).double(), peaks, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    q[0, 1, 2, 0] = bad
    sums, peaks = attention_sums(Attended(q, k))
    assert not peaks[1].isfinite()
    assert peaks[0].item() == 2.0
    assert sums[1, 0].isnan()
    assert sums[0, 0].item() == pytest.approx(3 * math.log(3))


def test_kernels_read_nothing_back_to_the_host():
    attended = Attended(torch.ones(2, 4, 7, 8, device="meta"), torch.ones(2, 2, 9, 8, device="meta"), is_causal=True)
    found = [*attention_sums(attended), attention_peaks(attended), attention_bound(attended)]
    assert [(one.device.type, tuple(one.shape)) for one in found] == [
        ("meta", (4, 2)),
        ("meta", (4,)),
        ("meta", (4,)),
        ("meta", (4,)),
    ]


def test_an_empty_batch_has_no_largest_score():
    sums, peaks = attention_sums(Attended(torch.ones(0, 2, 3, 4), torch.ones(0, 2, 3, 4)))
    assert sums.tolist() == [[0, 0], [0, 0]]
    assert peaks.tolist() == [-math.inf, -math.inf]
