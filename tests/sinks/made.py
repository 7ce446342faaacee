"""Records to write: drawn at random with everything in them, or plain ones."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from gradwatch.records import MODULE, PARAMETER, Histogram, Index, StepRecord, TreatmentReport

SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, 1e-40, 1e40, 1e-310, 0.1]
NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats())
COLUMNS = ["grad_norm", "update_ratio", "output_rms", 'grad_norm of a "hostile" name\n']


def mixed_index(parameters: int = 3, modules: int = 2) -> Index:
    n = parameters + modules
    return Index(
        paths=(*(f"blocks.{i}.weight" for i in range(parameters)), *(f"blocks.{i}" for i in range(modules))),
        kinds=(PARAMETER,) * parameters + (MODULE,) * modules,
        numel=np.array([4] * parameters + [0] * modules, np.int64),
        shapes=((2, 2),) * parameters + ((),) * modules,
        depth=np.arange(n, dtype=np.int64),
        types=("Linear",) * n,
    )


def arrays(n: int):
    # Drawn by a seed: a list of n numbers each takes hypothesis longer than the code under test.
    return st.builds(_array, st.just(n), st.integers(0, 2**32 - 1))


def _array(n: int, seed: int):
    rng = np.random.default_rng(seed)
    usual = np.exp(rng.normal(0, 20, n)).astype(rng.choice([np.float32, np.float64])).astype(np.float64)
    return np.where(rng.random(n) < 0.3 * rng.integers(0, 2), rng.choice(SPECIAL, n), usual)


def bools(n: int):
    return st.integers(0, 2**n - 1).map(lambda bits: np.array([bits >> i & 1 for i in range(n)], np.bool_))


def histograms():
    counts = st.dictionaries(st.integers(0, 511), st.integers(1, 2**40), max_size=5)
    return counts.map(lambda c: Histogram(np.array([c.get(i, 0) for i in range(512)], np.int64)))


def treatments():
    return st.builds(
        TreatmentReport,
        name=st.text(max_size=5),
        rule=st.sampled_from(["", "exploding"]),
        before=NUMBERS,
        after=NUMBERS,
        applied=st.booleans(),
        values=st.dictionaries(st.sampled_from(["limit", "coefficient"]), NUMBERS),
    )


def step_records(index: Index, step: int):
    n = len(index)
    return st.builds(
        StepRecord,
        step=st.just(step),
        index=st.just(index),
        epoch=st.integers(-1, 5),
        batch_idx=st.integers(-1, 2**40),
        num_samples=st.integers(0, 9),
        time=NUMBERS,
        loss=NUMBERS,
        has_loss=st.booleans(),
        lr=NUMBERS,
        global_norm=NUMBERS,
        global_norm_after=NUMBERS,
        columns=st.dictionaries(st.sampled_from(COLUMNS), arrays(n), max_size=3),
        masks=st.dictionaries(st.sampled_from(COLUMNS), bools(n), max_size=3),
        scalars=st.dictionaries(st.sampled_from(["val_loss", "grad_scale", "task_cos/a/b"]), NUMBERS),
        histograms=st.dictionaries(st.sampled_from(["blocks.0.weight", "gone"]), histograms()),
        treatments=st.lists(treatments(), max_size=2).map(tuple),
        skipped=st.booleans(),
    )


@st.composite
def runs_of_records(draw, max_size: int = 6):
    index = mixed_index(draw(st.integers(0, 9)), draw(st.integers(0, 2)))
    return [draw(step_records(index, step)) for step in range(draw(st.integers(1, max_size)))]


def record(step: int, index: Index | None = None, *, norm: float = 1.0, **more) -> StepRecord:
    """A plain record: gradient norms of `norm * (1, 2, ...)`, measured for parameters alone."""
    index = index or INDEX
    values = np.where(index.is_parameter, norm * np.arange(1, len(index) + 1), 0.0)
    given = {
        "loss": 1.0 / (step + 1),
        "lr": 0.1,
        "global_norm": norm,
        "global_norm_after": norm,
        "columns": {"grad_norm": values},
        "masks": {"grad_norm": index.is_parameter},
    }
    return StepRecord(step=step, index=index, **{**given, **more})


INDEX = mixed_index()


def same(a: StepRecord, b: StepRecord) -> bool:
    """Return whether two records hold the same bits (the payload of a nan apart)."""
    for name in ("step", "epoch", "batch_idx", "num_samples", "has_loss", "skipped"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("time", "loss", "lr", "global_norm", "global_norm_after"):
        assert bits(getattr(a, name)) == bits(getattr(b, name)), name
    for name in ("columns", "masks", "scalars", "histograms"):
        mine, other = getattr(a, name), getattr(b, name)
        assert set(mine) == set(other), name
        for key in mine:
            x, y = (getattr(v, "counts", v) for v in (mine[key], other[key]))
            assert bits(x) == bits(y), (name, key)
    assert [(t.name, t.rule, t.applied) for t in a.treatments] == [(t.name, t.rule, t.applied) for t in b.treatments]
    for s, t in zip(a.treatments, b.treatments, strict=True):
        assert (bits(s.before), bits(s.after)) == (bits(t.before), bits(t.after))
        assert {k: bits(v) for k, v in s.values.items()} == {k: bits(v) for k, v in t.values.items()}
    assert a.index.to_json() == b.index.to_json()
    return True


def bits(value) -> bytes:
    array = np.asarray(value)
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), np.nan, array.astype(np.float64))
    return array.dtype.str.encode() + array.tobytes()
