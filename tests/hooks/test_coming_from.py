"""Each line of the tables that say what is where, for who comes from another hook system, is run."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch.hooks
from gradwatch.hooks import HookManager

PAGE = Path(__file__).parents[2] / "docs" / "hooks.md"
SYSTEMS = ("TransformerLens", "nnsight", "pyvene", "baukit", "mi-crow", "torch hooks")
NAME, LAYER = "blocks.1.hook_resid_post", "transformer.h.1"


def lines(system):
    """Return (left, code spans on the right) of each line of a system's table."""
    text = PAGE.read_text().split(f"### Coming from {system}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [(left.strip(), re.findall(r"`([^`]+)`", right)) for left, right in rows[1:]]


def is_code(span):
    """Tell a line of code from a word that is set as code (`observe`)."""
    return not re.fullmatch(r"[\w.]+", span) or "." in span


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(32))

    def forward(self, tensor, point):
        return tensor + self.by


class Words:
    def __call__(self, text, return_tensors="pt", padding=False):
        return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}


def clear_in_place(tensor, point):
    tensor[..., 0] = 0


@pytest.fixture
def names(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=32, vocab_size=50, n_positions=16, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    hooks, tokens = HookManager(model), torch.arange(8).reshape(2, 4)
    _, cache = hooks.run_with_cache(tokens)
    captured = hooks.capture(LAYER)
    model(tokens)
    hooks.add(NAME, Shift(), id="trained")
    hooks.save_interventions(tmp_path / "shift.safetensors")
    public = {name: getattr(gradwatch.hooks, name) for name in gradwatch.hooks.__all__}
    return public | {
        "torch": torch,
        "nn": nn,
        "Shift": Shift,
        "tokenizer": Words(),
        "clear_in_place": clear_in_place,
        "model": model,
        "hooks": hooks,
        "tokens": tokens,
        "cache": cache,
        "captured": captured,
        "name": NAME,
        "layer": LAYER,
        "fn": lambda tensor, point: None,
        "value": torch.zeros(2, 4, 32),
        "loss_function": lambda out: out.logits.sum(),
        "metric": lambda out: out.logits[0, -1, 3],
        "hook": hooks.observe(LAYER, lambda tensor, point: None),
        "folder": tmp_path / "states",
        "path": tmp_path / "shift.safetensors",
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_line_of_a_table_runs(names, system):
    rows = lines(system)
    assert len(rows) >= 9
    for left, spans in rows:
        code = [span for span in spans if is_code(span)]
        assert code, f"nothing to run beside {left}"
        for span in code:
            try:
                exec(span, names)
            except Exception as error:
                raise AssertionError(f"{left}: {span}: {type(error).__name__}: {error}") from error
