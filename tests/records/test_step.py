"""What a record says of more than one path."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch.records import MODULE, PARAMETER, HistogramTable, Index, StepRecord

PATHS = ("encoder.0.weight", "encoder.0.bias", "head.weight", "encoder.0")
INDEX = Index(
    paths=PATHS,
    kinds=(PARAMETER, PARAMETER, PARAMETER, MODULE),
    numel=np.array([4, 2, 2, 0]),
    shapes=((2, 2), (2,), (2,), ()),
    depth=np.arange(4),
)


def record(*norms: float) -> StepRecord:
    values = np.array([*norms, 99.0])
    return StepRecord(step=0, index=INDEX, columns={"grad_norm": values}, masks={"grad_norm": np.isfinite(values)})


def test_a_table_of_histograms_gives_back_what_went_in_and_is_as_small_as_that() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2**40, (1000, 512)) * (rng.random((1000, 512)) < 0.01)
    table = HistogramTable([f"p{i}" for i in range(1000)], counts)
    assert list(table) == [f"p{i}" for i in range(1000)]
    assert np.array_equal(np.stack([h.counts for h in table.values()]), counts)
    again = HistogramTable.of(dict(table))
    assert all(np.array_equal(getattr(again, k), getattr(table, k)) for k in ("starts", "bins", "counts"))
    assert table.nbytes < counts.nbytes / 30
    assert "p1000" not in table


def test_a_table_of_no_histograms_is_empty() -> None:
    table = HistogramTable([], np.zeros((0, 512), np.int64))
    assert (len(table), dict(table)) == (0, {})
    with pytest.raises(ValueError, match=r"2 paths need counts \(2, 512\). Got \(1, 512\)."):
        HistogramTable(["a", "b"], np.zeros((1, 512), np.int64))


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_norms_of_modules_and_of_the_model_are_roots_of_sums_of_squares_at_any_size(size: float) -> None:
    found = record(3 * size, 4 * size, 12 * size)
    assert found.rollup("module") == pytest.approx({"encoder.0": 5 * size, "head": 12 * size})
    assert found.rollup("model") == pytest.approx({"": 13 * size})


def test_what_was_not_measured_is_in_no_sum() -> None:
    assert record(3.0, np.nan, np.nan).rollup("module") == pytest.approx({"encoder.0": 3.0})
    assert record(3.0, 4.0, 5.0).rollup("model", "update_norm") == {}
