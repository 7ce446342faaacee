"""A state in a checkpoint that can't be gone on from is one warning and a fresh start; the resumed run goes on."""

import copy
import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed import checkpoint

from gradwatch import ConfigError, GradwatchWarning, Watch
from gradwatch.callbacks import GradWatch
from gradwatch.callbacks._transformers_run import packed, unpacked
from gradwatch.callbacks.fabric import GradWatch as FabricGradWatch
from gradwatch.callbacks.transformers import GradWatchCallback
from gradwatch.rules import Exploding, NonFinite
from gradwatch.treatments import AdaptiveClip, ClipToLimit, SkipStep, ZClip
from tests.callbacks.hf import trainer as trainer_of_hugging_face

NASTY = [None, True, -1, 7, 1e300, math.nan, "", "many", [], [1, 2], {}, {"x": 1}, {"x": [1]}, (1,), "\ud800", b"\0"]


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))


def rules():
    return [Exploding(then=ClipToLimit()), NonFinite(then=SkipStep())]


def watched(model=None, **options):
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    return Watch(model, optimizer, **{"rules": rules(), "treatments": [ZClip()], **options}), model, optimizer


def train(watch, model, optimizer, steps=30):
    torch.manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 4)
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved():
    watch, model, optimizer = watched()
    with watch:
        train(watch, model, optimizer)
        state = watch.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def places(value, above=()):
    """Yield the path of every entry inside a state."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


def changed(value, path, new, *, cut=False):
    """Return a copy with the entry at a path replaced, or cut out."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        if cut and not rest:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], rest, new, cut=cut)}
    items = [changed(v, rest, new, cut=cut) if i == key else v for i, v in enumerate(value)]
    if cut and not rest:
        del items[key]
    return type(value)(items)


def told_by(load):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in seen if issubclass(w.category, GradwatchWarning)]


def test_a_state_as_it_was_saved_is_gone_on_from_without_a_word(saved):
    watch, model, optimizer = watched()
    with watch:
        assert told_by(lambda: watch.load_state_dict(saved)) == []
        assert watch.num_steps == 30
        assert watch.session.state_dict()["digest"] == saved["memory"][0]["digest"]
        train(watch, model, optimizer)


def test_any_damage_is_one_warning_and_a_fresh_start(saved):
    rng = np.random.default_rng(0)
    memory = saved["memory"][0]
    everywhere = list(places(memory))
    watch, model, optimizer = watched()
    fresh = watch.session.state_dict()["digest"]
    for _ in range(150):
        path = everywhere[rng.integers(len(everywhere))]
        new = NASTY[rng.integers(len(NASTY))]
        damaged = changed(memory, path, new, cut=rng.random() < 0.2)
        if damaged == memory:
            continue
        told = told_by(lambda state=damaged: watch.load_state_dict({"step": 30, "memory": (state,)}))
        assert len(told) == 1, (path, new, told)
        assert "the state in the checkpoint" in told[0]
        assert watch.session.state_dict()["digest"] == fresh, (path, new)
        watch.session.engine.guard.limits.clear()
    with watch:
        train(watch, model, optimizer)


@pytest.mark.parametrize(
    "state", [*NASTY, {"step": 3, "memory": 7}, {"memory": ()}, {"step": "x", "memory": ({},)}], ids=repr
)
def test_what_is_no_state_is_one_warning(state):
    watch, model, optimizer = watched()
    with watch:
        told = told_by(lambda: watch.load_state_dict(state))
        assert len(told) == 1
        train(watch, model, optimizer, 3)
        assert len(watch.history) == 3


@pytest.mark.parametrize("bound", [*NASTY, torch.zeros(2), np.zeros(2), pytest.param(object(), id="object")], ids=repr)
def test_what_binds_a_memory_to_its_steps_may_be_anything(saved, bound):
    watch, *_ = watched()
    with watch:
        (told,) = told_by(lambda: watch.load_state_dict({**saved, "bound": bound}))
        assert "is damaged" in told
        assert watch.num_steps == 0


def damages(state):
    """Yield states that can't be gone on from, made of one that can."""
    memory = state["memory"][0]
    yield {**state, "memory": ({**memory, "judge": 7},)}
    yield {**state, "memory": ({**memory, "version": 99},)}
    yield {**state, "memory": ({k: v for k, v in memory.items() if k != "rates"},)}
    yield {**state, "step": 29}
    yield {"another": "library's"}


def test_accelerate_resumes_whatever_the_checkpoint_holds_of_ours(tmp_path):
    accelerator = Accelerator(cpu=True)
    watch, model, optimizer = watched()
    accelerator.register_for_checkpointing(watch)
    with watch:
        train(watch, model, optimizer)
        accelerator.save_state(str(tmp_path))
        saved = watch.state_dict()
    file = tmp_path / "custom_checkpoint_0.pkl"
    for state in (saved, *damages(saved)):
        torch.save(state, file)
        later = Accelerator(cpu=True)
        watch, model, optimizer = watched()
        later.register_for_checkpointing(watch)
        with watch:
            told = told_by(lambda later=later: later.load_state(str(tmp_path)))
            assert len(told) == (state is not saved), told
            train(watch, model, optimizer, 3)
            assert len(watch.history) == 3


def test_distributed_checkpoints_resume_whatever_they_hold_of_ours(tmp_path):
    watch, model, optimizer = watched()
    with watch:
        train(watch, model, optimizer)
        saved = watch.state_dict()
    for number, state in enumerate((saved, *damages(saved))):
        folder = str(tmp_path / str(number))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a single process
            checkpoint.save({"watch": {**watch.state_dict(), **state}}, checkpoint_id=folder, no_dist=True)
        watch, model, optimizer = watched()
        with watch:
            told = told_by(
                lambda watch=watch, folder=folder: checkpoint.load({"watch": watch}, checkpoint_id=folder, no_dist=True)
            )
            assert len(told) == (number not in (0, 5)), (number, told)
            train(watch, model, optimizer, 3)
            assert len(watch.history) == 3


@pytest.mark.parametrize(("version", "word"), [(1, "older"), (99, "newer"), (-1, "older")])
def test_a_state_of_another_release_says_so(saved, version, word):
    watch, *_ = watched()
    with watch:
        state = {**saved["memory"][0], "version": version}
        (told,) = told_by(lambda: watch.load_state_dict({"step": 30, "memory": (state,)}))
        assert f"{word} gradwatch (form {version}" in told
        assert watch.num_steps == 30


def test_a_state_without_a_version_is_not_taken_for_one(saved):
    watch, *_ = watched()
    with watch:
        state = {k: v for k, v in saved["memory"][0].items() if k != "version"}
        (told,) = told_by(lambda: watch.load_state_dict(state))
        assert "parts of it are missing" in told


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: net(width=16), id="other-shapes"),
        pytest.param(lambda: nn.Sequential(nn.Identity(), nn.Linear(4, 1)), id="other-names"),
    ],
)
def test_a_state_of_another_model_is_not_gone_on_from(saved, model):
    watch, *_ = watched(model())
    with watch:
        (told,) = told_by(lambda: watch.load_state_dict(saved))
        assert "of another model" in told
        assert watch.incidents == []


def test_a_model_that_grew_goes_on_from_its_state(saved):
    grown = net()
    grown.append(nn.Linear(1, 1))
    watch, *_ = watched(grown)
    with watch:
        assert told_by(lambda: watch.load_state_dict(saved)) == []


def test_memory_of_other_treatments_is_left_alone_and_the_rest_gone_on_from(saved):
    watch, *_ = watched(treatments=[AdaptiveClip()])
    with watch:
        (told,) = told_by(lambda: watch.load_state_dict(saved))
        assert "they start afresh" in told
        assert watch.session.state_dict()["judge"] == saved["memory"][0]["judge"]


def test_where_errors_are_to_be_raised_it_is(saved):
    watch, *_ = watched(on_error="raise")
    with watch, pytest.raises(ConfigError, match="the state in the checkpoint is damaged"):
        watch.load_state_dict({"step": 3, "memory": ({**saved["memory"][0], "judge": 7},)})


def test_a_treatment_that_can_not_take_its_memory_up_leaves_nothing_half_done(saved, monkeypatch):
    watch, *_ = watched()
    fresh = watch.session.state_dict()

    def refuse(self, state):
        raise KeyError("mean")

    with watch:
        monkeypatch.setattr(SkipStep, "load_state_dict", refuse)
        (told,) = told_by(lambda: watch.load_state_dict(saved))
        assert "KeyError" in told
        assert watch.session.state_dict()["judge"] == fresh["judge"]


# The trainers' doors


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(80, 4), batch_size=8)


def trainer(steps, folder, **options):
    return Trainer(
        max_steps=steps, callbacks=[GradWatch(run_dir=False, verbose=False, **options)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        default_root_dir=folder,
    )  # fmt: skip


DAMAGES = {
    "judge": lambda s: {**s, "judge": 7},
    "treatments": lambda s: {**s, "treatments": [1, 2]},
    "newer": lambda s: {**s, "version": 99, "judge": {"new": 1}},
    "older": lambda s: {**s, "version": 0},
    "rates": lambda s: {**s, "rates": {"x": [1]}},
    "a word for a number": lambda s: {**s, "num_skipped": "many"},
    "cut": lambda s: {k: s[k] for k in list(s)[:3]},
    "a number": lambda s: 7,
    "foreign": lambda s: {"some": "thing"},
}


def test_lightning_resumes_whatever_the_checkpoint_holds_of_ours(tmp_path):
    first = trainer(5, tmp_path)
    first.fit(Module())
    first.save_checkpoint(tmp_path / "a.ckpt")
    whole = torch.load(tmp_path / "a.ckpt", weights_only=False)
    (key,) = (k for k in whole["callbacks"] if k.startswith("gradwatch:"))
    for name, damage in DAMAGES.items():
        broken = copy.deepcopy(whole)
        broken["callbacks"][key] = damage(broken["callbacks"][key])
        torch.save(broken, tmp_path / "b.ckpt")
        second = trainer(8, tmp_path)
        told = told_by(lambda t=second: t.fit(Module(), ckpt_path=tmp_path / "b.ckpt", weights_only=False))
        assert second.global_step == 8, name
        assert len(told) == 1, (name, told)
        assert [r.step for r in second.callbacks[0].history] == [5, 6, 7], name


@pytest.mark.parametrize("damage", DAMAGES)
def test_fabric_resumes_whatever_the_checkpoint_holds_of_ours(damage):
    def run(state):
        watch = FabricGradWatch(run_dir=False, verbose=False)
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=[watch])
        model = net()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 1e-2))
        if state is not None:
            watch.load_state_dict(state)
        for _ in range(4):
            fabric.backward(model(torch.randn(8, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        saved = watch.state_dict()
        watch.close()
        return saved, len(watch.watches[0].history)

    state, _ = run(None)
    broken = {"watches": [{**w, "memory": (DAMAGES[damage](w["memory"][0]),)} for w in state["watches"]]}
    steps = []
    assert len(told_by(lambda: steps.append(run(broken)[1]))) == 1
    assert steps == [4]
    assert len(told_by(lambda: run(DAMAGES["foreign"](None)))) == 1


@pytest.mark.slow
def test_hugging_face_resumes_whatever_the_checkpoint_holds_of_ours(tmp_path):
    def made():
        watch = GradWatchCallback(run_dir=False, verbose=False)
        return watch, trainer_of_hugging_face(tmp_path, watch, max_steps=4, save_strategy="steps", save_steps=2)

    made()[1].train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    whole = json.loads(file.read_text())
    (key,) = (k for k in whole["stateful_callbacks"] if "radwatch" in k)
    state = unpacked(whole["stateful_callbacks"][key])
    spoilt = {name: packed(damage(state)) for name, damage in DAMAGES.items() if name != "a number"}
    for name, held in {**spoilt, "no state": {"args": {}, "attributes": {"state": "!"}}, "nothing": {}}.items():
        file.write_text(json.dumps({**whole, "stateful_callbacks": {**whole["stateful_callbacks"], key: held}}))
        watch, trainer = made()
        told = told_by(lambda t=trainer: t.train(resume_from_checkpoint=str(file.parent)))
        assert len(told) == 1, (name, told)
        assert [r.step for r in watch.history] == [2, 3], name
