"""An incident is a case file: which batch, what was measured around it, what was done, what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from gradwatch import RememberedBatches, Watch
from gradwatch.errors import ConfigError
from gradwatch.records import CaseFile, Histogram, Incident
from gradwatch.rules import Expression
from gradwatch.runs import read_run
from gradwatch.stats import Gradients, exponent_histograms
from gradwatch.watch._alarmed import Alarmed, note_histograms
from gradwatch.watch._batches import NUM_STEPS, Batches
from gradwatch.watch._case_files import MAX_BATCHES, MAX_CASES, CaseFiles
from gradwatch.watch._loaders import samples_of
from gradwatch.watch._prediction import Forward

SIZE = 16
SPIKE = 60


def batch_of(step: int, spikes: tuple[int, ...] = (SPIKE,)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SIZE, 8, generator=generator)
    y = x.sum(1, keepdim=True) * (300.0 if step in spikes else 1.0)
    return {"x": x, "y": y, "idx": torch.arange(step * SIZE, (step + 1) * SIZE)}


def train(steps: int = 100, *, spikes: tuple[int, ...] = (SPIKE,), share: bool = True, **options) -> Watch:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with Watch(model, optimizer, on_error="raise", **options) as watch:
        for step in range(steps):
            batch = batch_of(step, spikes)
            loss = (model(batch["x"]) - batch["y"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss, batch=batch if share else None)
    return watch


def spike_case(watch: Watch) -> CaseFile:
    (incident,) = [i for i in watch.incidents if i.rule == "exploding"]
    assert incident.case is not None
    assert incident.case.is_of(incident)
    return incident.case


def test_a_case_tells_the_samples_and_the_numbers_around_its_step() -> None:
    watch = train()
    case = spike_case(watch)
    assert case.sample_ids == tuple(range(SPIKE * SIZE, (SPIKE + 1) * SIZE))
    assert case.samples_from == "`idx` of the batch"
    records = {r.step: r for r in watch.history}
    assert case.step == SPIKE
    for curve in ("loss", "global_norm"):
        shown = dict(zip(case.steps, case.curves[curve], strict=True))
        assert all(shown[step] == getattr(records[step], curve) for step in range(SPIKE - 20, SPIKE + 10))
    assert case.at("global_norm") == records[SPIKE].global_norm > 10 * case.before("global_norm")
    for layer in case.layers:
        assert layer.at == records[SPIKE]["grad_norm", layer.path]
    assert case.complete


def test_histograms_at_an_alarm_are_of_gradients_that_lie_on_the_host_alone() -> None:
    def alarmed_by(device: str, grad_scale: float = 1.0) -> dict:
        # A meta tensor has no data: whoever reads it fails.
        p = nn.Parameter(torch.ones(3, device=device))
        p.grad = torch.ones(3, device=device)
        incident = SimpleNamespace(worst_path="w", first_path="w", paths=("w",))
        alarmed: Alarmed = {}
        note_histograms(alarmed, [incident], 5, Gradients.collect([("w", p)], grad_scale=grad_scale))
        return alarmed

    assert list(alarmed_by("cpu")[5]) == ["w"]
    assert not alarmed_by("meta")
    assert not alarmed_by("cpu", grad_scale=8.0)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_step_that_showed_no_batch_takes_no_room_among_those_that_did(keeps: bool) -> None:
    batches = Batches(keeps=keeps, limit_bytes=1 << 20)
    assert batches.wants(batch_of(0))
    assert batches.wants(torch.ones(2)) is keeps  # tells no samples, but may be saved
    assert not batches.wants(None)
    assert not batches.wants(Forward())  # what the trainer's own door has kept of a forward pass: no batch


def test_the_alarm_s_bar_and_the_clip_s_limit_are_two_numbers() -> None:
    case = spike_case(train(rules="autoclip"))
    assert case.value == case.at("global_norm") > case.bar > case.at("accepted") > 0
    assert case.worst_path == ""
    assert case.at("limit") > 0
    (done,) = [t for t in case.treatments if t.step == SPIKE]
    assert done.before == pytest.approx(case.at("global_norm"))
    assert done.after == pytest.approx(case.at("global_norm_after")) != done.before


@pytest.mark.parametrize("worst", [SPIKE, SPIKE + 1])
def test_a_number_stands_with_the_step_that_it_is_of(worst: int, tmp_path: Path) -> None:
    """Also where it became worse after the case was opened."""
    higher = {SPIKE: 30.0, SPIKE + 1: 20.0, worst: 90.0}
    rule = Expression("loss > 20 * median(loss, 40)", name="high")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with Watch(model, optimizer, on_error="raise", rules=[rule], run_dir=tmp_path / "run") as watch:
        for step in range(100):
            batch = batch_of(step, ())
            loss = (model(batch["x"]) - batch["y"] * higher.get(step, 1.0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss, batch=batch)
    (incident,) = watch.incidents
    (case,) = read_run(tmp_path / "run").cases
    records = {r.step: r for r in watch.history}
    assert incident.worst_step == case.worst_step == worst
    assert incident.value == case.value == records[worst].loss
    assert case.step == SPIKE
    bar = dict(case.lines())["bar"]
    assert bar.startswith(f"{case.value:.3g} in the whole model" + (f" at step {worst}," if worst > SPIKE else ","))


def test_a_case_takes_up_the_place_and_the_number_of_what_is_worse_together() -> None:
    """None of the four stays behind: a number of the whole model is not told of a layer."""
    model = nn.Linear(8, 1)
    watch = Watch(model, torch.optim.SGD(model.parameters(), lr=1e-4), on_error="raise")
    for step in range(4):
        batch = batch_of(step)
        (model(batch["x"]) - batch["y"]).square().mean().backward()
        watch.step(batch=batch)
    known = watch.session.engine
    first = Incident(rule="r", first_step=2, last_step=2, value=3.0, limit=1.0, worst_path="weight", worst_step=2)
    worse = replace(first, last_step=3, value=0.0, limit=float("nan"), worst_path="", worst_step=3)
    engine = SimpleNamespace(
        completion=known.completion,
        autopsy=None,
        alarmed=known.alarmed,
        options=known.options,
        judge=SimpleNamespace(incidents=[worse]),
    )
    cases = CaseFiles(engine, saves_batches=False)  # type: ignore[arg-type]
    cases.open(first, watch.session.sinks)
    assert (cases.cases[0].worst_path, cases.cases[0].value) == ("weight", 3.0)
    cases.finish(watch.session.sinks)
    (case,) = cases.cases
    assert (case.worst_path, case.value, case.worst_step) == ("", 0.0, 3)
    assert np.isnan(case.bar)
    watch.close()


def test_the_layer_that_the_number_is_of_stands_first_with_its_own_norm() -> None:
    rule = Expression("grad_norm < 1e9 and step == 60", name="small", paths="0.weight")
    case = train(rules=[rule], spikes=()).incidents[0].case
    assert case is not None
    assert case.worst_path == case.layers[0].path == "0.weight"
    told = dict(case.lines())
    assert told["layers"].startswith(f"0.weight {case.layers[0].at:.3g} (before ")
    # Of what keeps its level there is nothing to say.
    assert "2.weight" in [layer.path for layer in case.layers]
    assert "2.weight" not in told["layers"]


def test_a_case_tells_how_to_judge_its_run_anew_where_the_run_lies_now(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    live = spike_case(train(run_dir="a run"))
    assert "replay         gradwatch replay 'a run' --rules rules.yaml" in str(live)
    Path("a run").rename("moved")
    (case,) = read_run("moved").cases
    assert "replay         gradwatch replay moved --rules rules.yaml" in str(case)
    assert "gradwatch replay moved --rules rules.yaml" in case._repr_html_()
    assert "moved" not in json.dumps(case.to_json())
    assert "replay" not in str(spike_case(train()))


def test_what_passes_as_usual_is_said_of_the_global_norm_alone() -> None:
    told = dict(spike_case(train(rules="autoclip")).lines())
    assert "would have passed as usual" in told["global norm"]
    assert "usual" not in told["bar"]


def test_histograms_stand_before_at_and_after_the_step() -> None:
    case = spike_case(train())
    (path,) = {h.path for h in case.histograms} & {"2.bias"}
    found = {h.when: h for h in case.histograms if h.path == path}
    assert found["before"].step < SPIKE == found["at"].step < found["after"].step <= SPIKE + 2
    # Larger by hundreds: its exponents lie higher.
    exponents = np.arange(256)
    mean = {when: np.average(exponents, weights=h.histogram.magnitude_counts) for when, h in found.items()}
    assert mean["at"] > max(mean["before"], mean["after"]) + 4


def test_the_histogram_at_the_step_is_of_the_gradient_before_treatment() -> None:
    shown: dict[int, Tensor] = {}

    class Spy:
        name, order = "spy", 0

        def apply_(self, grads, context):
            shown[context.step] = dict(zip(grads.paths, grads.grads, strict=True))["2.weight"].clone()

    case = spike_case(train(rules="autoclip", treatments=[Spy()]))
    (at,) = [h for h in case.histograms if h.when == "at" and h.path == "2.weight"]
    assert at.histogram.counts.tolist() == exponent_histograms([shown[SPIKE]])[0].tolist()


def test_a_case_is_read_back_from_the_run_folder_as_it_was(tmp_path: Path) -> None:
    watch = train(run_dir=tmp_path / "run", rules="autoclip")
    live, run = spike_case(watch), read_run(tmp_path / "run")
    (read,) = [c for c in run.cases if c.rule == "exploding"]
    assert json.dumps(read.to_json()) == json.dumps(live.to_json())
    assert str(read) == str(live)
    (incident,) = [i for i in run.incidents if i.rule == "exploding"]
    assert incident.case is not None


def test_a_case_is_on_disk_when_its_incident_is_and_whole_sixteen_steps_later(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    watch = Watch(model, optimizer, run_dir=tmp_path / "run", on_error="raise")
    found = {}
    for step in range(SPIKE + 17):
        batch = batch_of(step)
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        watch.step(loss, batch=batch)
        if step in (SPIKE, SPIKE + 15, SPIKE + 16):
            assert watch.history[-1].step == step  # asking wakes the judge
            (found[step],) = read_run(tmp_path / "run").cases
    assert found[SPIKE].sample_ids
    assert [case.complete for case in found.values()] == [False, False, True]
    assert found[SPIKE + 16].steps[-1] == SPIKE + 16
    watch.close()


def test_a_saved_batch_is_the_batch_of_the_step(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    watch = train(run_dir=tmp_path / "run", save_batch=True)
    saved = load_file(tmp_path / "run" / spike_case(watch).batch_file)
    expected = batch_of(SPIKE)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_a_batch_that_was_written_over_is_not_saved_as_if_it_were_whole() -> None:
    batches = Batches(keeps=True, limit_bytes=1 << 20)
    x = torch.ones(4)
    batches.see((x, torch.zeros(4)))
    batches.stepped(0)
    x.mul_(2)
    seen = batches.of(0)
    assert seen is not None
    from gradwatch.watch._batches import Fetched

    fetched = Fetched(seen, saves=True)
    assert fetched.left_out == ["0 of the batch (it was written over since)"]


def test_no_batch_is_held_that_nobody_asked_for() -> None:
    batches = Batches(keeps=False, limit_bytes=1 << 20)
    for step in range(10):
        batches.see((torch.ones(4), torch.ones(4)))
        batches.see({"x": torch.ones(4)})
        batches.stepped(step)
    assert all(batches.of(step) is None for step in range(10))


def test_held_batches_are_bounded_in_bytes_and_steps() -> None:
    batches = Batches(keeps=True, limit_bytes=3 * 4000)
    for step in range(3 * NUM_STEPS):
        batches.see(torch.ones(1000))
        batches.stepped(step)
    seen = [batches.of(step) for step in range(3 * NUM_STEPS)]
    assert sum(s is not None for s in seen) == NUM_STEPS
    assert sum(bool(s.batches) for s in seen if s is not None) == 3


def test_a_batch_shown_twice_is_kept_once_and_every_micro_batch() -> None:
    batches = Batches(keeps=True, limit_bytes=1 << 20)
    x, y = torch.ones(4), torch.zeros(4)
    for shown in ((x, y), [x, y], {"x": x}, (x.clone(), y.clone())):
        batches.see(shown)
    batches.stepped(0)
    seen = batches.of(0)
    assert seen is not None
    assert len(seen.batches) == 2


def test_cases_and_batches_of_a_run_are_bounded(tmp_path: Path) -> None:
    rules = [Expression("loss >= 0", name=f"r{i}") for i in range(MAX_CASES + 8)]
    train(30, run_dir=tmp_path / "run", rules=rules, save_batch=True)
    assert len(read_run(tmp_path / "run").cases) == MAX_CASES
    assert len(list((tmp_path / "run").glob("batch-*"))) == MAX_BATCHES


@pytest.mark.parametrize("damage", ["cut", "turned", "newer", "link", "list"])
def test_a_damaged_case_file_is_told_and_its_incident_stays(tmp_path: Path, damage: str) -> None:
    train(run_dir=tmp_path / "run")
    (file,) = (tmp_path / "run").glob("case-*")
    text = file.read_text()
    if damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        changed = {"cut": text[:-40], "turned": text.replace('"loss"', '"lost"', 1), "list": "[1]"}
        changed["newer"] = json.dumps({**json.loads(text), "schema": 99})
        file.write_text(changed[damage])
    run = read_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="left out"):
        incidents = run.incidents
    assert [i.case for i in incidents if i.rule == "exploding"] == [None]
    assert len(run) == 100


def test_where_nobody_tells_the_samples_the_case_says_so() -> None:
    case = spike_case(train(share=False))
    assert not case.sample_ids
    assert any("which samples" in note for note in case.notes)


def test_as_many_samples_are_told_as_there_were_or_none() -> None:
    data = TensorDataset(torch.arange(22.0))
    loader = DataLoader(data, batch_size=4)
    assert samples_of(loader, 1, 4)[0] == (4, 5, 6, 7)
    assert samples_of(loader, 5, 2)[0] == (20, 21)
    assert samples_of(loader, 2, 8)[0] == tuple(range(4, 12))  # two accumulated micro-batches
    assert samples_of(loader, 5, 4) == ((), "")
    assert samples_of(loader, 9, 4) == ((), "")
    assert samples_of(DataLoader(data, batch_size=4, shuffle=True), 1, 4) == ((), "")
    assert samples_of([1, 2, 3], 1, 1) == ((), "")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_remembered_batches_tell_the_samples_of_a_shuffled_loader(workers: int) -> None:
    data = TensorDataset(torch.arange(50.0))
    batches = RememberedBatches(BatchSampler(RandomSampler(data), 8, drop_last=False))
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers)
    assert len(loader) == 7
    for number, (x,) in enumerate(loader):
        assert samples_of(loader, number, len(x))[0] == tuple(x.int().tolist())


def test_watch_batches_count_epochs_and_batches_and_tell_the_samples() -> None:
    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    loader = DataLoader(data, batch_size=16)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rules = [Expression("step == 6", name="six")]
    with Watch(model, optimizer, on_error="raise", rules=rules) as watch:
        for _ in range(2):
            for x, y in watch.batches(loader):
                (model(x) - y).square().mean().backward()
                watch.step(batch=(x, y))
                optimizer.zero_grad()
    assert [(r.epoch, r.batch_idx) for r in watch.history] == [(e, b) for e in range(2) for b in range(4)]
    (incident,) = watch.incidents
    assert incident.case is not None
    assert incident.case.sample_ids == tuple(range(32, 48))


def test_save_batch_is_checked_at_the_door() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="`save_batch` must be True or False"):
        Watch(model, torch.optim.SGD(model.parameters()), save_batch="yes")


def test_a_case_survives_json_with_numbers_that_are_not_finite() -> None:
    counts = np.zeros(512, np.int64)
    counts[[0, 255, 400]] = 3
    from gradwatch.records import CaseHistogram, CaseLayer, CaseTreatment, Sample

    case = CaseFile(
        rule="non_finite",
        step=3,
        steps=(2, 3),
        curves={"loss": (1.0, float("nan")), "global_norm": (1.0, float("inf"))},
        layers=(CaseLayer("a", 1.0, float("inf")),),
        histograms=(CaseHistogram("at", 3, "a", Histogram(counts)),),
        treatments=(CaseTreatment(3, "skip_step", "non_finite", float("inf"), float("nan")),),
        samples=(Sample(index=4, share=float("nan"), dataset_index="a", is_finite=False),),
        sample_ids=(1, "two"),
    )
    back = CaseFile.from_json(json.loads(json.dumps(case.to_json(), allow_nan=False)))
    assert str(back.to_json()) == str(case.to_json())
    assert back.histograms[0].histogram.counts.tolist() == counts.tolist()


def test_a_notebook_shows_a_case_and_names_in_it_stay_words() -> None:
    case = CaseFile(rule="<b>x</b>", step=3, sample_ids=("<img src=x>",), samples_from="`idx` of the batch")
    html = case._repr_html_()
    assert "<img" not in html
    assert "<b>x</b>" not in html
    assert "&lt;img src=x&gt;" in html
    assert "case of &lt;b&gt;x&lt;/b&gt;, step 3" in html
