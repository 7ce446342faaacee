import numpy as np
import pytest
from hypothesis import given, settings

from gradwatch.errors import RunFormatError
from gradwatch.sinks import blocks

from .made import INDEX, mixed_index, record, runs_of_records, same


def read_back(written, index=None):
    (end, block), *more = blocks.scan(written)
    assert end == len(written)
    assert not more
    return blocks.records(block, index if index is not None else INDEX)


@settings(max_examples=25, deadline=None)
@given(records=runs_of_records())
def test_records_come_back_bit_by_bit(records):
    back = read_back(blocks.encode(records).to_bytes(), records[0].index)
    assert len(back) == len(records)
    assert all(same(a, b) for a, b in zip(records, back, strict=True))


def test_values_are_kept_in_float32_where_that_loses_nothing():
    small, wide = blocks.encode([record(0, norm=0.5)]), blocks.encode([record(0, norm=0.1)])
    assert small.arrays["c0.values"].dtype == np.float32
    assert wide.arrays["c0.values"].dtype == np.float64


def test_paths_that_were_never_measured_take_no_room():
    index = mixed_index(2, 500)
    assert blocks.encode([record(t, index) for t in range(4)]).arrays["c0.values"].shape == (4, 2)


def test_column_and_mask_are_read_without_making_records():
    block = blocks.encode([record(0), record(1, columns={}, masks={}), record(2, norm=2.0)])
    rows, values = blocks.column(block, "grad_norm", len(INDEX))
    assert rows.tolist() == [True, False, True]
    assert values.tolist() == [[1, 2, 3, 0, 0], [2, 4, 6, 0, 0]]
    assert blocks.measured(block, "grad_norm", len(INDEX)).tolist() == [[True] * 3 + [False] * 2] * 2


@pytest.mark.parametrize("cut", [1, 21, 300])
def test_last_block_that_is_cut_short_is_left_out(cut):
    whole = blocks.encode([record(0)]).to_bytes()
    assert len(whole) > 300
    assert [end for end, _ in blocks.scan(whole + whole[:-cut])] == [len(whole)]


@settings(max_examples=25, deadline=None)
@given(records=runs_of_records(max_size=3))
def test_any_cut_leaves_the_blocks_before_it_readable(records):
    data = blocks.encode(records).to_bytes()
    for cut in range(0, len(data), max(1, len(data) // 20)):
        assert len(list(blocks.scan(data + data[:cut]))) == 1


def test_block_with_a_flipped_bit_is_told_apart_and_the_next_one_read():
    first, second = (bytearray(blocks.encode([record(t)]).to_bytes()) for t in range(2))
    first[len(first) // 2] ^= 4
    found = [block for _, block in blocks.scan(bytes(first + second))]
    assert found[0] is None
    assert found[1].steps.tolist() == [1]


def test_rest_that_is_no_block_is_told_apart():
    whole = blocks.encode([record(0)]).to_bytes()
    assert [block is None for _, block in blocks.scan(whole + bytes(100))] == [False, True]


def test_block_of_a_higher_schema_is_refused():
    block = blocks.encode([record(0)])
    data = blocks.Block({**block.header, "schema": 99}, block.arrays).to_bytes()
    with pytest.raises(RunFormatError, match=r"a block has schema 99; this gradwatch reads up to 1\. Update gradwatch"):
        list(blocks.scan(data, where="x.gwr"))


def test_thinning_drops_every_second_row_of_a_column_and_no_scalar():
    records = [record(t, scalars={"seconds": float(t)}) for t in range(7)]
    thinner = blocks.records(blocks.thin(blocks.encode(records), {}), INDEX)
    assert [r.step for r in thinner if r.columns] == [0, 2, 4, 6]
    assert [r.step for r in thinner if r.masks] == [0, 2, 4, 6]
    assert [r.scalars["seconds"] for r in thinner] == list(range(7))
    assert same(thinner[4], records[4])


def test_thinning_counts_on_over_blocks_of_one_record():
    seen = {}
    kept = [bool(blocks.records(blocks.thin(blocks.encode([record(t)]), seen), INDEX)[0].columns) for t in range(4)]
    assert kept == [True, False, True, False]


@settings(max_examples=12, deadline=None)
@given(records=runs_of_records())
def test_what_thinning_keeps_is_unchanged(records):
    thinner = blocks.thin(blocks.encode(records), {})
    back = read_back(thinner.to_bytes(), records[0].index)
    for old, new in zip(records, back, strict=True):
        for name in new.columns:
            assert np.array_equal(old.columns[name], new.columns[name], equal_nan=True)
        for path in new.histograms:
            assert np.array_equal(old.histograms[path].counts, new.histograms[path].counts)
    for name in {c for r in records for c in r.columns}:
        before = sum(name in r.columns for r in records)
        assert sum(name in r.columns for r in back) == -(-before // 2)
