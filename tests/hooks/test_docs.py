"""Every block of code in docs/hooks.md runs, in order, and the example draws its picture."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hooks.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_example_of_the_hooks_page_runs(capsys):
    torch.manual_seed(0)
    namespace = {"__name__": "docs"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/hooks.md, block {number}", "exec"), namespace)
    assert len(BLOCKS) >= 15
    assert "out_proj" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["TransformerLens", "nnsight", "pyvene", "baukit", "mi-crow", "torch hooks"])
def test_the_page_compares_with_what_people_come_from(name):
    assert f"## Coming from {name}" in PAGE


def test_patching_example_goes_from_training_to_the_heatmap(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("patching", ROOT / "examples" / "patching.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    try:
        restored = example.main(steps=5, out=str(tmp_path / "heat.png"))
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"
    assert restored == pytest.approx(1, abs=1e-4)  # the last position after the last layer holds the whole answer
    assert "heatmap in" in capsys.readouterr().out


@pytest.mark.slow
def test_patching_example_finds_where_the_answer_moves(tmp_path):
    spec = importlib.util.spec_from_file_location("patching", ROOT / "examples" / "patching.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.accuracy(example.train(400)) > 0.99
