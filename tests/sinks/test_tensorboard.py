import json

import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util
from torch.utils.tensorboard import SummaryWriter

from gradwatch.errors import ConfigError, GradwatchError, GradwatchWarning
from gradwatch.protocols import RunMeta, Sink
from gradwatch.records import Buckets, Histogram, Incident, StepRecord, TreatmentReport
from gradwatch.sinks import SafeSinks, TensorBoardSink
from gradwatch.sinks.tensorboard._values import signed_buckets

from .made import INDEX, mixed_index, record


class Log:
    """What TensorBoard reads of a directory."""

    def __init__(self, path):
        everything = {"tensors": 0, "scalars": 0, "histograms": 0}
        self.events = EventAccumulator(str(path), size_guidance=everything)
        self.events.Reload()

    @property
    def tags(self):
        return self.events.Tags()

    def scalars(self, tag):
        return [(e.step, e.value) for e in self.events.Scalars(tag)]

    def content(self, tag):
        metadata = self.events.SummaryMetadata(tag)
        assert metadata.plugin_data.plugin_name == "gradwatch"
        return json.loads(metadata.plugin_data.content)

    def tensors(self, tag):
        return {e.step: tensor_util.make_ndarray(e.tensor_proto) for e in self.events.Tensors(tag)}

    def json(self, tag):
        return {step: json.loads(a.item()) for step, a in self.tensors(tag).items()}


def logged(path, windows, *, incidents=(), **options):
    with SummaryWriter(str(path)) as writer:
        sink = TensorBoardSink(writer, **options)
        sink.open(RunMeta(model="Net", started=3.0))
        for window in windows:
            sink.write(window[-1], window)
        for incident in incidents:
            sink.incident(incident)
        sink.close()
    return Log(path)


def missing(values):
    return (values == 0) & np.signbit(values)


def histogram(**counts):
    """A histogram from `n20=3` (three values in exponent bin 20) and `m20=1` (negative)."""
    array = np.zeros(512, np.int64)
    for name, count in counts.items():
        array[int(name[1:]) + 256 * (name[0] == "m")] = count
    return Histogram(array)


def test_it_is_a_sink(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        assert isinstance(TensorBoardSink(writer), Sink)


def test_headline_page_has_at_most_twelve_scalars_with_the_right_values(tmp_path):
    clip = TreatmentReport(name="clip", before=9.0, after=4.0, values={"limit": 4.0})
    window = [
        record(0, norm=2.0),
        record(1, norm=9.0, global_norm_after=4.0, treatments=(clip,)),
        record(2, norm=3.0, skipped=True),
        record(3, columns={"grad_norm": np.array([3.0, 1, 2, 0, 0]), "update_ratio": np.array([1.0, 2, 6, 0, 0])},
               masks={"grad_norm": INDEX.is_parameter, "update_ratio": INDEX.is_parameter},
               treatments=(TreatmentReport(name="clip", applied=False, values={"limit": 5.0}),)),
    ]  # fmt: skip
    log = logged(tmp_path, [window])
    page = {t.removeprefix("gradwatch/"): log.scalars(t) for t in log.tags["scalars"] if t.startswith("gradwatch/")}
    assert page == {
        "global_norm": [(3, 1.0)],
        "global_norm_after": [(3, 1.0)],
        "global_norm_max": [(3, 9.0)],
        "largest_layer": [(3, 3.0)],
        "smallest_layer": [(3, 1.0)],
        "update_ratio_median": [(3, 2.0)],
        "update_ratio_max": [(3, 6.0)],
        "clipped_share": [(3, 0.25)],
        "num_skipped": [(3, 1.0)],
        "num_incidents": [(3, 0.0)],
        "loss": [(3, 0.25)],
        "limit": [(3, 5.0)],
    }


def test_log_step_is_one_event(tmp_path):
    logged(tmp_path, [[record(0)], [record(1)]])
    (file,) = (p for p in tmp_path.iterdir() if "tfevents" in p.name)
    with_norm = [e for e in EventFileLoader(str(file)).Load() if any("global_norm" in v.tag for v in e.summary.value)]
    assert [e.step for e in with_norm] == [0, 1]


def test_statistic_is_one_series_over_its_paths_with_metadata_and_the_index(tmp_path):
    values = np.array([1.5, np.nan, 7.0, 2.0, 3.0])
    mask = np.array([True, True, False, False, False])
    window = [
        record(
            5,
            columns={"grad_norm": values, "output_rms": values},
            masks={"grad_norm": mask, "output_rms": INDEX.is_module},
        )
    ]
    log = logged(tmp_path, [window])
    assert log.content("gradwatch/grad_norm") == {
        "schema": 1,
        "kind": "statistic",
        "name": "gradwatch",
        "statistic": "grad_norm",
        "over": "parameter",
        "window": "last",
    }
    found = log.tensors("gradwatch/grad_norm")[5]
    assert found.dtype == np.float32
    assert found[0] == 1.5
    assert np.isnan(found[1])
    assert missing(found).tolist() == [False, False, True]
    assert log.content("gradwatch/output_rms")["over"] == "module"
    assert log.tensors("gradwatch/output_rms")[5].tolist() == [2.0, 3.0]
    assert log.json("gradwatch/_index") == {5: INDEX.to_json()}
    assert log.json("gradwatch/_meta")[5]["model"] == "Net"


def test_plugin_tensors_carry_data_class_and_bytes(tmp_path):
    logged(tmp_path, [[record(0)]])
    (file,) = (p for p in tmp_path.iterdir() if "tfevents" in p.name)
    (value,) = (v for e in EventFileLoader(str(file)).Load() for v in e.summary.value if v.tag == "gradwatch/grad_norm")
    assert value.metadata.data_class == 2
    assert len(value.tensor.tensor_content) == 12


def test_largest_of_the_window_stands_beside_the_newest_and_no_spike_is_lost(tmp_path):
    window = [record(t, norm=n) for t, n in enumerate([1.0, 50.0, np.nan, 1.0])]
    window[2].columns["grad_norm"][:] = [1.0, np.nan, 1.0, 0, 0]
    log = logged(tmp_path, [window, [record(4)]])
    assert log.tensors("gradwatch/grad_norm")[3].tolist() == [1.0, 2.0, 3.0]
    assert log.content("gradwatch/grad_norm_max")["window"] == "max"
    assert log.content("gradwatch/grad_norm_max")["statistic"] == "grad_norm"
    found = log.tensors("gradwatch/grad_norm_max")
    np.testing.assert_array_equal(found[3], [50.0, np.nan, 150.0])
    assert list(found) == [3]
    assert np.isnan(log.scalars("gradwatch/global_norm_max")[0][1])


def test_statistic_measured_within_the_window_is_not_lost(tmp_path):
    more = {"columns": {"update_ratio": np.array([1.0, 2, 3, 0, 0])}, "masks": {"update_ratio": INDEX.is_parameter}}
    log = logged(tmp_path, [[record(0, **more), record(1)]])
    assert log.tensors("gradwatch/update_ratio")[1].tolist() == [1.0, 2.0, 3.0]


def test_values_beyond_float32_and_non_finite_ones_survive(tmp_path):
    values = np.array([1e40, np.inf, 1e-60, 0, 0])
    window = [record(0, norm=1e40, columns={"grad_norm": values}, loss=np.inf, lr=np.nan, global_norm_after=-1e40)]
    log = logged(tmp_path, [window])
    found = log.tensors("gradwatch/grad_norm")[0]
    assert found.dtype == np.float64
    assert found[:3].tolist() == [1e40, np.inf, 1e-60]
    (fields,) = (log.content("gradwatch/_headline")["fields"],)
    headline = dict(zip(fields, log.tensors("gradwatch/_headline")[0], strict=True))
    assert headline["global_norm"] == 1e40
    assert headline["loss"] == np.inf
    assert np.isnan(headline["lr"])
    # A scalar is a float32: the largest one is nearer the truth than infinity.
    largest = float(np.finfo(np.float32).max)
    assert log.scalars("gradwatch/global_norm") == [(0, largest)]
    assert log.scalars("gradwatch/global_norm_after") == [(0, -largest)]
    assert log.scalars("gradwatch/loss") == [(0, np.inf)]


def test_index_that_changes_is_written_at_its_step(tmp_path):
    other = mixed_index(4, 1)
    log = logged(tmp_path, [[record(0), record(1)], [record(2, mixed_index()), record(3, other), record(4, other)]])
    assert {step: len(i["paths"]) for step, i in log.json("gradwatch/_index").items()} == {0: 5, 3: 5}
    assert log.json("gradwatch/_index")[3] == other.to_json()
    assert {s: len(a) for s, a in log.tensors("gradwatch/grad_norm").items()} == {1: 3, 4: 4}


def test_scalars_of_the_window_travel_as_json_with_non_finite_values_said(tmp_path):
    window = [record(0, scalars={"val_loss": np.nan}), record(1, scalars={"task_cos/a/b": -0.5})]
    assert logged(tmp_path, [window]).json("gradwatch/_scalars") == {1: {"val_loss": "nan", "task_cos/a/b": -0.5}}


def test_newest_treatments_that_applied_are_written(tmp_path):
    clip = TreatmentReport(name="zclip", rule="exploding", before=9.0, after=4.0, values={"limit": 4.0})
    none = TreatmentReport(name="zclip", applied=False)
    log = logged(tmp_path, [[record(0, treatments=(clip,)), record(1, treatments=(none,))], [record(2)]])
    assert log.json("gradwatch/_treatments") == {
        1: [
            {
                "step": 0,
                "name": "zclip",
                "rule": "exploding",
                "before": 9.0,
                "after": 4.0,
                "applied": True,
                "values": {"limit": 4.0},
            }
        ]
    }


# Incidents


def incident(step=0, **more):
    return Incident(
        **{"rule": "exploding", "first_step": step, "last_step": step, "paths": ("a.b",), "first_path": "a.b", **more}
    )


def test_incidents_of_one_step_are_all_in_its_one_event(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        sink.open(RunMeta())
        sink.incident(incident(0, id=1))
        sink.write(record(0))
        sink.incident(incident(0, id=2, rule="dead"))
        sink.flush()
        sink.incident(incident(0, id=2, rule="dead", resolved=True, resolved_step=3))
        sink.write(record(3))
        sink.close()
    last = {}
    for step, values in Log(tmp_path).tensors("gradwatch/_incidents").items():
        last[step] = [(i["rule"], i["resolved"]) for i in map(json.loads, values)]
    assert last == {0: [("exploding", False), ("dead", False)], 3: [("dead", True)]}


def test_incident_with_thousands_of_paths_stays_small(tmp_path):
    paths = tuple(f"p{i}" for i in range(5000))
    log = logged(tmp_path, [[record(0)]], incidents=[incident(0, paths=paths)])
    (data,) = map(json.loads, log.tensors("gradwatch/_incidents")[0])
    assert (len(data["paths"]), data["num_paths"]) == (256, 5000)


def test_text_dashboard_tells_incidents_and_a_summary_with_hostile_names_inert(tmp_path):
    bad = "<script>alert(1)</script>|*"
    log = logged(tmp_path, [[record(0)]], incidents=[incident(0, first_path=bad, advice="Clip.", severity="critical")])
    for tag in ("gradwatch/incident_log", "gradwatch/summary"):
        (said,) = (v.item().decode() for v in log.tensors(tag).values())
        assert log.events.SummaryMetadata(tag).plugin_data.plugin_name == "text"
        assert r"&lt;script&gt;alert\(1\)&lt;/script&gt;\|\*" in said
        assert "Clip." in said
    assert "1 steps up to step 0" in said


def test_summary_given_by_the_trainer_is_shown_once_column_under_column(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        sinks = SafeSinks([TensorBoardSink(writer)])
        sinks.open(RunMeta())
        sinks.push(record(0))
        sinks.summary("layer   norm\na.b      1.0```")
        sinks.close()
    (said,) = (v.item().decode() for v in Log(tmp_path).tensors("gradwatch/summary").values())
    assert said.startswith("### gradwatch")
    assert said.endswith("\n\n```\nlayer   norm\na.b      1.0'''\n```")


# Histograms and bands


def test_histogram_is_log10_of_the_magnitude_with_outer_edges_at_its_bounds(tmp_path):
    counts = histogram(n100=5, m110=7, n0=3, n255=1)
    log = logged(tmp_path, [[record(0, histograms={"blocks.0.weight": counts}), record(1)]])
    (event,) = log.events.Histograms("gradwatch log10 |gradient|/blocks.0.weight")
    found = event.histogram_value
    assert event.step == 0
    assert found.num == 12
    assert len(found.bucket) <= 41
    assert found.min == pytest.approx(-27 * np.log10(2))
    assert found.max == pytest.approx(-16 * np.log10(2))
    assert (found.bucket_limit[0], found.bucket_limit[-1]) == (found.min, found.max)
    # and as the dashboard gets it, after TensorBoard has made it over:
    (file,) = (p for p in tmp_path.iterdir() if "tfevents" in p.name)
    tags = (v for e in EventFileLoader(str(file)).Load() for v in e.summary.value)
    (value,) = (v for v in tags if v.tag == "gradwatch log10 |gradient|/blocks.0.weight")
    buckets = tensor_util.make_ndarray(value.tensor)
    np.testing.assert_allclose(buckets[[0, -1], [0, 1]], [found.min, found.max], rtol=1e-6)
    np.testing.assert_allclose(buckets[1:, 0], buckets[:-1, 1])
    assert buckets[:, 2].sum() == 12


def test_histograms_travel_packed_for_the_tab(tmp_path):
    counts = {"blocks.1.weight": histogram(n100=5, m103=7, n0=3, n255=1), "blocks.2.weight": histogram(n0=9)}
    log = logged(tmp_path, [[record(0, histograms=counts)]])
    rows = log.tensors("gradwatch/_histograms")[0]
    assert rows.shape == (2, 45)
    np.testing.assert_allclose(rows[0, :5], [1, 3, 1, -27 * np.log10(2), np.log10(2)], rtol=1e-6)
    assert rows[0, 5:9].tolist() == [5, 0, 0, 7]
    assert rows[1, :5].tolist() == [2, 9, 0, 0, 0]
    assert "gradwatch log10 |gradient|/blocks.2.weight" not in log.tags["histograms"]


def test_signed_histogram_keeps_the_sign_and_counts_everything_finite(tmp_path):
    counts = histogram(n120=5, m90=7, n0=3, m255=1)
    log = logged(tmp_path, [[record(0, histograms={"blocks.0.weight": counts})]], histogram_scale="signed")
    (event,) = log.events.Histograms("gradwatch gradient/blocks.0.weight")
    found = event.histogram_value
    assert found.num == 15
    assert found.min < 0 < found.max
    assert len(found.bucket) <= 41


@pytest.mark.parametrize("seed", range(20))
def test_signed_buckets_merge_to_the_right_sums_and_rising_edges(seed):
    rng = np.random.default_rng(seed)
    counts = Histogram(
        rng.integers(0, 2, 512) * (np.arange(512) % 256 < rng.integers(1, 257)) * rng.integers(0, 9, 512)
    )
    edges, merged = signed_buckets(counts)
    assert merged.sum() == counts.total - counts.nonfinite
    assert len(merged) <= 40
    assert len(edges) == len(merged) + 1
    assert (np.diff(edges) > 0).all()
    assert merged[edges[1:] <= 0].sum() == counts.counts[257:511].sum()
    assert merged[edges[:-1] >= 0].sum() == counts.counts[1:255].sum()


def test_number_of_stock_histograms_is_bounded(tmp_path):
    index = mixed_index(6, 0)
    counts = dict.fromkeys(index.paths, histogram(n100=1))
    log = logged(tmp_path, [[record(0, index, histograms=counts)]], max_histograms=4)
    assert len(log.tags["histograms"]) == 4
    assert len(log.tensors("gradwatch/_histograms")[0]) == 6


def test_stock_histograms_are_some_steps_apart_and_the_tab_gets_all(tmp_path):
    counts = {"blocks.1.weight": histogram(n100=5)}
    log = logged(tmp_path, [[record(step, histograms=counts) for step in range(12)]], histograms_apart=5)
    stock = log.events.Histograms("gradwatch log10 |gradient|/blocks.1.weight")
    assert [event.step for event in stock] == [0, 5, 10]
    assert list(log.tensors("gradwatch/_histograms")) == list(range(12))


@pytest.mark.parametrize("seed", range(20))
def test_buckets_of_many_histograms_are_those_of_neighbouring_exponents(seed):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(9):
        low, high = np.sort(rng.integers(0, 257, 2))
        place = np.arange(512) % 256
        made.append(Histogram(rng.integers(0, 3, 512) * ((low <= place) & (place < high))))
    buckets = Buckets.of(made, 40)
    for row, one in enumerate(made):
        edges, merged = buckets[row]
        exponents = np.flatnonzero(one.magnitude_counts[1:255])
        assert buckets.rest[row].tolist() == [one.zeros, one.nonfinite]
        assert merged.sum() == one.total - one.zeros - one.nonfinite
        if not len(exponents):
            assert (len(edges), len(merged)) == (0, 0)
            continue
        assert len(merged) <= 40
        assert edges[0] == (exponents[0] - 126) * np.log10(2)
        assert merged[0] > 0
        assert merged[-1] > 0
        centres = (np.arange(1, 255) - 127 + 0.5) * np.log10(2)
        again, _ = np.histogram(centres, edges, weights=one.magnitude_counts[1:255])
        assert again.tolist() == merged.tolist()


def layouts_of(path):
    """Every layout in the events of a folder, in order."""
    found = []
    for file in sorted(p for p in path.iterdir() if "tfevents" in p.name):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "custom_scalars__config__":
                    found.append(layout_pb2.Layout.FromString(tensor_util.make_ndarray(value.tensor).item()))
    return found


def test_layout_is_written_once_into_the_run_itself_and_names_tags_that_exist(tmp_path):
    for _ in range(2):
        log = logged(tmp_path, [[record(0)]])
    (layout,) = layouts_of(tmp_path)
    (series,) = layout.category[0].chart[0].margin.series
    assert {series.value, series.lower, series.upper} <= set(log.tags["scalars"])
    # A sub-run would be one more entry in every list of runs.
    assert all("tfevents" in p.name for p in tmp_path.iterdir())


def test_layout_of_the_users_own_is_kept_beside_ours(tmp_path):
    mine = {"mine": {"losses": ["Multiline", ["loss/a", "loss/b"]]}}
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_custom_scalars(mine)
        sink = TensorBoardSink(writer)
        sink.open(RunMeta())
        sink.write(record(0))
        sink.close()
    *_, last = layouts_of(tmp_path)
    assert [category.title for category in last.category] == ["mine", "gradwatch"]
    assert list(last.category[0].chart[0].multiline.tag) == ["loss/a", "loss/b"]


def test_layout_is_left_out_where_asked_or_where_one_that_is_there_can_not_be_read(tmp_path, monkeypatch):
    logged(tmp_path / "none", [[record(0)]], layout=False)
    assert layouts_of(tmp_path / "none") == []
    monkeypatch.setattr("gradwatch.sinks.tensorboard._layout.MOST_BYTES", 0)
    logged(tmp_path / "large", [[record(0)]])
    assert layouts_of(tmp_path / "large") == []


def test_first_value_of_a_tag_says_what_it_is_and_in_which_unit(tmp_path):
    counts = {"blocks.1.weight": histogram(n100=5)}
    log = logged(
        tmp_path, [[record(step, histograms=counts)] for step in (0, 20)], incidents=[incident(0, advice="Clip.")]
    )
    (file,) = (p for p in tmp_path.iterdir() if "tfevents" in p.name)
    told = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            told.setdefault(value.tag, []).append(value.metadata)
    stock = ("scalars", "histograms", "text")
    described = [tag for tag, found in told.items() if found[0].plugin_data.plugin_name in stock]
    tags = {"gradwatch/loss", "gradwatch/incident_log", "gradwatch log10 |gradient|/blocks.1.weight"}
    assert tags <= set(described)
    assert len(described) > 10
    for tag in described:
        first, *others = (metadata.summary_description for metadata in told[tag])
        assert "Unit: " in first, tag
        assert not any(others), tag
    assert set(log.tags["scalars"]) <= set(described)


def test_bands_are_quantiles_over_weights(tmp_path):
    index = mixed_index(11, 0)
    log = logged(tmp_path, [[record(0, index, columns={"grad_norm": np.arange(11.0)}, masks={})]])
    found = {q: log.scalars(f"gradwatch_bands/grad_norm/{q}")[0][1] for q in ("p10", "median", "p90")}
    assert found == {"p10": 1.0, "median": 5.0, "p90": 9.0}


# Writers that can't, and settings that can't be


class PlainWriter:
    """A writer with the public methods alone."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        pass


def test_writer_without_packed_events_gets_the_headline(tmp_path):
    writer = PlainWriter()
    sink = TensorBoardSink(writer)
    sink.open(RunMeta())
    sink.write(record(0, histograms={"blocks.0.weight": histogram(n3=1)}))
    sink.incident(incident())
    sink.close()
    assert ("gradwatch/global_norm", 1.0, 0) in writer.scalars
    assert {tag.split("/")[0] for tag, _, _ in writer.scalars} == {"gradwatch"}


def test_closed_writer_is_one_warning_and_no_second_event_file(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    sinks = SafeSinks([TensorBoardSink(writer)], log_every=1)
    sinks.open(RunMeta())
    sinks.push(record(0))
    writer.close()
    with pytest.warns(
        GradwatchWarning, match="TensorBoardSink failed while writing: GradwatchError: the SummaryWriter"
    ) as caught:
        sinks.push(record(1))
    sinks.push(record(2))
    sinks.close()
    assert len(caught) == 1
    assert len([p for p in tmp_path.iterdir() if "tfevents" in p.name]) == 1


def test_writer_closed_first_at_the_end_of_a_run_is_no_error(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    sink.open(RunMeta())
    sink.write(record(0))
    writer.close()
    sink.close()
    with pytest.raises(GradwatchError, match="was closed"):
        sink.write(record(1))


def test_a_writer_closed_after_one_run_is_written_on_in_the_next(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step in (0, 1):
        sink = TensorBoardSink(writer)
        sink.open(RunMeta(start_step=step))
        sink.write(record(step))
        sink.close()
        writer.close()
    assert [step for step, _ in Log(tmp_path).scalars("gradwatch/global_norm")] == [0, 1]


def test_steps_that_a_resumed_run_writes_again_replace_those_of_the_run_before(tmp_path):
    for start, size in ((0, 1.0), (5, 2.0)):
        with SummaryWriter(str(tmp_path)) as writer:
            sink = TensorBoardSink(writer)
            sink.open(RunMeta(start_step=start))
            for step in range(start, 10):
                sink.write(record(step, global_norm=size, histograms={"blocks.0.weight": histogram(n3=step + 1)}))
            sink.close()
    expected = [(step, 1.0 if step < 5 else 2.0) for step in range(10)]
    assert Log(tmp_path).scalars("gradwatch/global_norm") == expected
    # The reader of TensorBoard's own pages: all is a tensor to it.
    pages = plugin_event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    pages.Reload()
    ours = [tag for tag in pages.Tags()["tensors"] if tag.startswith("gradwatch")]
    assert {"gradwatch/global_norm", "gradwatch/_headline", "gradwatch/_histograms"} <= set(ours)
    for tag in ours:
        steps = [event.step for event in pages.Tensors(tag)]
        assert steps == sorted(set(steps)), tag


def test_resumed_run_takes_nothing_away_from_tags_that_count_otherwise(tmp_path):
    for start in (0, 5):
        with SummaryWriter(str(tmp_path)) as writer:
            for epoch in range(40, 43):
                writer.add_scalar("accuracy", 0.5, epoch + start)
            sink = TensorBoardSink(writer)
            sink.open(RunMeta(start_step=start))
            for step in range(start, 10):
                sink.write(record(step))
            sink.close()
    assert [step for step, _ in Log(tmp_path).scalars("accuracy")] == [40, 41, 42, 45, 46, 47]


def test_writer_stays_open_and_its_users_own_tags_stay_whole(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
        sink = TensorBoardSink(writer)
        sink.open(RunMeta())
        sink.write(record(0))
        sink.close()
        writer.add_scalar("loss", 2.0, 1)
    assert Log(tmp_path).scalars("loss") == [(0, 1.0), (1, 2.0)]
    assert len([p for p in tmp_path.iterdir() if "tfevents" in p.name]) == 1


def test_two_sinks_of_different_names_share_a_writer(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for name in ("gan", "gradwatch"):
            sink = TensorBoardSink(writer, name=name)
            sink.open(RunMeta(name=name))
            sink.write(record(0))
            sink.close()
    log = Log(tmp_path)
    assert log.content("gan/grad_norm")["name"] == "gan"
    *_, layout = layouts_of(tmp_path)
    assert [category.title for category in layout.category] == ["gan", "gradwatch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"histogram_scale": "log2"}, "`histogram_scale` must be 'log10' or 'signed'. Got 'log2'.", id="scale"
        ),
        pytest.param({"histograms_apart": 0}, "`histograms_apart` must be at least 1. Got 0.", id="histograms-apart"),
        pytest.param({"max_histograms": -1}, "`max_histograms` must be at least 0. Got -1.", id="max-histograms"),
    ],
)
def test_setting_that_can_not_be_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        TensorBoardSink(PlainWriter(), **options)
    assert str(caught.value) == f"TensorBoardSink: {message}"
    with pytest.raises(ConfigError, match=r"TensorBoardSink needs a SummaryWriter \(with `add_scalar`\)\. Got int\."):
        TensorBoardSink(3)


def test_empty_model_and_empty_record_are_written(tmp_path):
    log = logged(tmp_path, [[StepRecord(step=0, index=mixed_index(0, 0), columns={"grad_norm": np.zeros(0)})]])
    assert log.scalars("gradwatch/num_skipped") == [(0, 0.0)]
