"""Decoding and pooling, and what is done with data that are damaged or foreign."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensorboard_plugin_gradwatch import MISSING, exponent_row, pool, ridge
from tensorboard_plugin_gradwatch._cache import Cache
from tensorboard_plugin_gradwatch._catalogue import Series, Source, catalogue
from tensorboard_plugin_gradwatch._reader import Point, read_headline, read_index, read_scalars, read_statistic
from tensorboard_plugin_gradwatch._shown import Table, Unreadable
from tensorboard_plugin_gradwatch._wire import pack, unpack

floats = st.one_of(st.floats(0, 2.0**100, width=32), st.sampled_from([np.nan, np.inf, MISSING]))


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=floats), st.integers(1, 50))
def test_pooling_keeps_the_worst_of_each_path(matrix, columns):
    steps, pooled = pool(np.arange(len(matrix), dtype=np.float64), matrix, columns)
    assert len(steps) == min(columns, len(matrix))
    assert steps[0] == 0
    np.testing.assert_array_equal(np.maximum.reduce(pooled), np.maximum.reduce(matrix))


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.integers(0, 4)), elements=floats), st.text(max_size=20))
def test_packing_is_undone_by_unpacking(matrix, text):
    steps = np.arange(len(matrix)) * 3.0
    header, steps_back, back = unpack(pack(steps, matrix, {"text": text}))
    assert header["text"] == text
    np.testing.assert_array_equal(steps_back, steps)
    np.testing.assert_array_equal(back, matrix)


def test_one_packed_histogram_spreads_its_buckets_over_exponents():
    first, counts = exponent_row(left=-10 * np.log10(2), width=2 * np.log10(2), counts=np.array([4, 0, 6]))
    assert first == -10
    assert counts.tolist() == [2, 2, 0, 0, 3, 3]


def test_ridge_puts_histograms_of_different_edges_on_one_grid():
    rows = [(0, 5, 0, -3, np.array([1.0, 2.0])), (10, 0, 1, -1, np.array([7.0]))]
    steps, matrix, header = ridge(rows)
    assert steps.tolist() == [0, 10]
    assert matrix.tolist() == [[5, 0, 1, 2, 0], [0, 1, 0, 0, 7]]
    assert header["left"] == pytest.approx(-3 * np.log10(2))


def test_ridge_of_many_steps_sums_neighbours():
    steps, matrix, _ = ridge([(s, 0, 0, 0, np.array([1.0])) for s in range(600)])
    assert len(steps) == 60
    assert matrix[:, 2].sum() == 600


INDEX = {
    "paths": ["a.weight", "b.weight"],
    "kinds": ["parameter"] * 2,
    "numel": [4, 4],
    "shapes": [[2, 2]] * 2,
    "depth": [0, 1],
}


def make_source(**tensors):
    """A source and a reader over given points: name -> list of (step, value)."""
    source = Source("run", "run", "gradwatch")
    held = {}
    for name, points in {"index": [(0, json.dumps(INDEX))], **tensors}.items():
        content = {"fields": ["global_norm", "limit"], "over": "parameter"}
        series = Series("run", name, content, (1.0, 1.0))
        held[name] = [Point(step, np.asarray(value)) for step, value in points]
        if name in ("index", "headline", "scalars"):
            source.by_kind[name] = series
        else:
            source.statistics.setdefault(name.removesuffix("_max"), {})["max" if name.endswith("_max") else "last"] = (
                series
            )
    return source, lambda series: held[series.tag]


def read(name="grad_norm", **tensors):
    source, reader = make_source(**tensors)
    return read_statistic(reader, source, name)


def test_negative_zero_is_not_measured_and_zero_is_zero():
    table = read(grad_norm=[(0, np.array([-0.0, 0.0], np.float32))])
    assert table.matrix.tolist() == [[MISSING, 0.0]]


def test_values_beyond_float32_stay_finite_and_above_zero():
    table = read(grad_norm=[(0, np.array([1e300, 1e-300]))])
    assert np.isfinite(table.matrix).all()
    assert (table.matrix > 0).all()


def test_non_finite_values_are_kept():
    table = read(grad_norm=[(0, np.array([np.nan, np.inf], np.float32))])
    assert np.isnan(table.matrix[0, 0])
    assert table.matrix[0, 1] == np.inf


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(np.zeros(3, np.float32), id="other-length"),
        pytest.param(np.zeros(0, np.float32), id="empty"),
        pytest.param(np.array([b"x", b"y"]), id="strings"),
        pytest.param(np.zeros(2, np.int64), id="integers"),
    ],
)
def test_tensor_that_does_not_fit_is_left_out_and_counted(damaged):
    table = read(grad_norm=[(0, np.ones(2, np.float32)), (1, damaged), (2, np.ones(2, np.float32))])
    assert table.steps.tolist() == [0, 2]
    assert table.left_out == 1


def test_rows_of_an_older_index_move_to_their_places_in_the_newest():
    newer = {**INDEX, "paths": ["b.weight", "c.weight"]}
    table = read(
        index=[(0, json.dumps(INDEX)), (10, json.dumps(newer))],
        grad_norm=[(5, np.array([1, 2], np.float32)), (10, np.array([3, 4], np.float32))],
    )
    assert table.names == ("b.weight", "c.weight")
    assert table.matrix.tolist() == [[2, MISSING], [3, 4]]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"paths": 3}', json.dumps({**INDEX, "kinds": ["parameter"]})])
def test_damaged_index_is_told(text):
    source, reader = make_source(index=[(0, text)])
    with pytest.raises(Unreadable, match=r"^The list of paths of run is damaged, so its rows have no names\.$"):
        read_index(reader, source)


def test_scalars_that_are_no_numbers_are_left_out():
    source, reader = make_source(
        scalars=[(0, '{"val_loss": "inf", "x": "?", "y": [1]}'), (1, "nonsense"), (2, "[3]")],
    )
    table = read_scalars(reader, source)
    assert table.names == ("val_loss",)
    assert table.matrix.tolist() == [[np.inf]]
    assert table.left_out == 2


def test_headline_nan_is_a_norm_and_otherwise_not_measured():
    source, reader = make_source(
        headline=[(0, np.array([1.0, np.nan])), (1, np.array([2.0])), (2, np.array([np.nan, 5.0]))]
    )
    table = read_headline(reader, source)
    column = dict(zip(table.names, table.matrix.T.tolist(), strict=True))
    assert table.steps.tolist() == [0, 2]
    assert column["limit"] == [MISSING, 5.0]
    assert column["global_norm"][0] == 1.0
    assert np.isnan(column["global_norm"][1])
    assert table.left_out == 1


class Listed:
    def __init__(self, content, step=1):
        self.plugin_content, self.max_step, self.max_wall_time = content, step, 0.0


def test_higher_schema_is_refused_with_a_message():
    listing = {"run": {"gradwatch/_index": Listed(b'{"schema": 9, "kind": "index", "name": "gradwatch"}')}}
    assert catalogue(listing)["run"].message == (
        "run was written in schema 9; this tab reads up to 1. Update gradwatch where TensorBoard runs: "
        "pip install -U gradwatch."
    )


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"null", b'{"kind": 3}', b"{"])
def test_metadata_that_say_nothing_are_borne(content):
    source = catalogue({"run": {"gradwatch/x": Listed(content)}})["run"]
    assert "cut short" in source.message
    assert "gradwatch/x" in source.notes[0]


def test_cache_makes_again_only_what_has_grown():
    cache, made = Cache(), []
    for stamp in (1, 1, 2):
        cache.get(("run", "x"), (stamp,), lambda stamp=stamp: made.append(stamp) or stamp)
    assert made == [1, 2]


def test_cache_lets_go_of_the_oldest_beyond_its_limit():
    table = Table(np.zeros(10), np.zeros((10, 100), np.float32))
    cache, made = Cache(limit_bytes=10_000), []
    for name in "abcaa":
        cache.get((name,), (0,), lambda name=name: made.append(name) or table)
    assert made == ["a", "b", "c", "a"]
