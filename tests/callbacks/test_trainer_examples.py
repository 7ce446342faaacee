"""The examples of other trainers run, and show what they say they show."""

from pathlib import Path
from runpy import run_path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def ran(name: str, *arguments: str):
    return run_path(str(EXAMPLES / name))["main"](list(arguments))


@pytest.mark.slow
def test_the_hugging_face_example_skips_the_bad_step_and_names_it(tmp_path: Path) -> None:
    watch = ran("huggingface.py", "--steps", "30", "--output-dir", str(tmp_path))
    assert [r.step for r in watch.history if r.skipped] == [14]
    assert "non_finite" in {i.rule for i in watch.incidents}
    assert (tmp_path / "gradwatch" / "meta.json").exists()


def test_the_fabric_example_finds_the_step_at_which_the_rate_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ran("fabric_loop.py")
    found = [i for i in watch.incidents if i.severity != "info"]
    assert found
    assert 195 <= found[0].first_step <= 220
    assert "incident" in capsys.readouterr().err


def test_the_accelerate_example_skips_the_corrupt_batch() -> None:
    watch = ran("accelerate_loop.py", "--batches", "60")
    assert [r.step for r in watch.history if r.skipped] == [15]
    assert all(torch.isfinite(p).all() for p in watch.session.model.parameters())
