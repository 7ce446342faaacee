import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.errors import RunFormatError
from gradwatch.sinks import blocks
from gradwatch.sinks._rows import RowEncoder
from gradwatch.sinks.blocks._block import FRAME

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


def whole(data):
    return [found for _, found in blocks.scan(data) if isinstance(found, blocks.Block)]


def damages(data):
    return [found for _, found in blocks.scan(data) if isinstance(found, blocks.Damage)]


@pytest.mark.parametrize("cut", [1, 21, 300])
def test_last_block_that_is_cut_short_is_told_as_a_tail(cut):
    data = blocks.encode([record(0)]).to_bytes()
    assert len(data) > 300
    assert len(whole(data + data[:-cut])) == 1
    (tail,) = damages(data + data[:-cut])
    assert (tail.is_tail, tail.start, tail.count, tail.steps) == (True, len(data), 1, (0, 0))


@settings(max_examples=25, deadline=None)
@given(records=runs_of_records(max_size=3))
def test_any_cut_leaves_the_blocks_before_it_readable(records):
    data = blocks.encode(records).to_bytes()
    for cut in range(0, len(data), max(1, len(data) // 20)):
        assert len(whole(data + data[:cut])) == 1
        assert all(d.is_tail for d in damages(data + data[:cut]))


@pytest.mark.parametrize("place", range(0, 120, 3))
def test_flipped_bit_anywhere_costs_one_block_and_those_behind_it_are_read(place):
    first, second, third = (bytearray(blocks.encode([record(t)]).to_bytes()) for t in range(3))
    second[place] ^= 4
    data = bytes(first + second + third)
    assert [block.steps.tolist() for block in whole(data)] == [[0], [2]]
    (damage,) = damages(data)
    assert (damage.start, damage.end, damage.is_tail) == (len(first), len(first + second), False)


def test_damage_inside_a_block_says_how_many_records_of_which_steps_are_gone():
    data = bytearray(blocks.encode([record(t) for t in range(3, 8)]).to_bytes())
    data[len(data) // 2] ^= 4
    (damage,) = damages(bytes(data))
    assert (damage.count, damage.steps) == (5, (3, 7))


def test_rest_that_is_no_block_is_told_apart():
    data = blocks.encode([record(0)]).to_bytes()
    assert len(whole(data + bytes(100))) == 1
    assert [d.is_tail for d in damages(data + bytes(100))] == [False]


def old_frame(block):
    """The bytes of a block as they were written before frames had checksums of their own."""
    data = block.to_bytes()
    fields = FRAME.unpack_from(data)
    return struct.pack("<4sIQI", b"GWB1", fields[1], fields[2], fields[6]) + data[FRAME.size :]


def test_blocks_of_the_older_format_are_read_and_found_again_behind_damage():
    parts = [bytearray(old_frame(blocks.encode([record(t)]))) for t in range(4)]
    assert [b.steps.tolist() for b in whole(bytes(b"".join(parts)))] == [[0], [1], [2], [3]]
    parts[1][9] ^= 1  # its length
    assert [b.steps.tolist() for b in whole(bytes(b"".join(parts)))] == [[0], [2], [3]]


def test_block_of_a_higher_schema_is_refused():
    block = blocks.encode([record(0)])
    data = blocks.Block({**block.header, "schema": 99}, block.arrays).to_bytes()
    with pytest.raises(RunFormatError, match=r"a block has schema 99; this gradwatch reads up to 2\. Update gradwatch"):
        list(blocks.scan(data, where="x.gwr"))


@settings(max_examples=25, deadline=None)
@given(records=runs_of_records())
def test_what_was_encoded_is_sound(records):
    block = blocks.encode(records, numbers=list(range(len(records))))
    assert blocks.is_sound(block, len(records[0].index))
    assert blocks.is_sound(blocks.thin(block, {}), len(records[0].index))


@settings(max_examples=25, deadline=None)
@given(records=runs_of_records(max_size=1), number=st.integers(0, 2**40))
def test_row_of_the_journal_is_a_block_with_the_same_record(records, number):
    data = RowEncoder().encode(records[0], number=number, index=0)
    ((end, block),) = list(blocks.scan(data))
    assert end == len(data)
    assert blocks.is_sound(block, len(records[0].index))
    assert block.numbers.tolist() == [number]
    assert same(records[0], blocks.records(block, records[0].index)[0])


@settings(max_examples=25, deadline=None)
@given(records=runs_of_records())
def test_rows_of_one_encoder_are_each_their_own_record_s(records):
    encoder = RowEncoder()
    rows = [encoder.encode(r, number=i, index=0) for i, r in enumerate(records)]
    for i, (row, expected) in enumerate(zip(rows, records, strict=True)):
        ((_, block),) = list(blocks.scan(row))
        assert block.numbers.tolist() == [i]
        assert same(expected, blocks.records(block, expected.index)[0])


def test_a_row_holds_the_mask_and_the_values_of_its_own_step():
    encoder, n = RowEncoder(), len(INDEX)
    for step in range(6):
        values = np.arange(n) + 100.0 * step
        mask = np.arange(n) % 3 == step // 2
        given = record(step, columns={"a": values, "b": -values}, masks={"b": mask}, scalars={"x": float(step)})
        ((_, block),) = list(blocks.scan(encoder.encode(given, number=step, index=0)))
        (found,) = blocks.records(block, INDEX)
        assert np.array_equal(found.columns["a"], values)
        assert np.array_equal(found.columns["b"][mask], -values[mask])
        assert np.array_equal(found.measured("b"), mask)
        assert found.scalars == {"x": float(step)}


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
