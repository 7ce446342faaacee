"""The examples run, at a small size, and show what they promise."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from gradwatch.callbacks import GradWatch

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "log_every": 1}


def load(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example"))


def test_the_plain_loop_names_the_layer_that_the_optimizer_does_not_hold(tmp_path: Path) -> None:
    watch = load("plain_loop").main(["--steps", "120", "--run-dir", str(tmp_path / "run")])
    (incident,) = [i for i in watch.incidents if i.severity == "critical"]
    assert incident.rule == "not_updating"
    assert set(incident.paths) == {"2.weight", "2.bias"}
    assert (tmp_path / "run" / "incidents.jsonl").exists()


def test_the_digits_are_learned_without_an_incident(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = load("digits").main(["--epochs", "3", "--out", str(tmp_path / "digits")])
    assert watch.incidents == []
    assert len(watch.history) == 90
    said = capsys.readouterr()
    assert "validation accuracy" in said.out
    assert "90 records" in said.err


@pytest.mark.slow
def test_autoclip_saves_the_gpt_from_a_corrupt_batch_that_stalls_it_unwatched(tmp_path: Path) -> None:
    example = load("char_gpt")
    sizes = ["--steps", "260", "--dim", "32", "--layers", "2", "--context", "32", "--out", str(tmp_path)]
    losses = example.main(sizes)
    assert abs(losses["autoclip"] / losses["healthy"] - 1) < 0.05
    assert losses["spiked"] / losses["healthy"] - 1 > 0.05
    assert (tmp_path / "report.html").stat().st_size < 500_000


@pytest.mark.slow
def test_the_healthy_gpt_has_no_incident_over_its_whole_run(tmp_path: Path) -> None:
    example = load("char_gpt")
    options = example.parse(["--steps", "260", "--dim", "32", "--layers", "2", "--out", str(tmp_path)])
    watch = GradWatch(verbose=False)
    example.train(options, corrupt=False, callback=watch, name="healthy")
    assert watch.incidents == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "char_gpt"])
def test_two_hundred_watched_steps_equal_unwatched_ones_bit_for_bit(name: str, tmp_path: Path) -> None:
    example = load(name)

    def fit(*callbacks: pl.Callback) -> list[torch.Tensor]:
        pl.seed_everything(0, verbose=False)
        if name == "digits":
            model, data = example.DigitNet(width=8), example.digits()[0]
        else:
            data = example.Characters(example.read_sources(), 32)
            model = example.CharGPT(len(data.alphabet), dim=32, layers=2, context=32)
        logged: list[float] = []
        inner = model.training_step

        def step(*args: object) -> torch.Tensor:
            loss = inner(*args)
            logged.append(float(loss.detach()))
            return loss

        model.training_step = step
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=200,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True))
        states = [v for s in trainer.optimizers[0].state_dict()["state"].values() for v in s.values()]
        return [*model.parameters(), *model.buffers(), *states, torch.get_rng_state(), torch.tensor(logged)]

    bare, watched = fit(), fit(GradWatch(verbose=False, on_error="raise", **EVERYTHING))
    assert len(bare) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
