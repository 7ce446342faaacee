"""Notebooks run by a real kernel, through nbclient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SETUP = """
import torch
from torch import nn
from gradwatch import Watch
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
def train(watch, steps):
    for _ in range(steps):
        loss = (model(torch.randn(16, 8)) - 1).square().mean()
        loss.backward()
        watch.step(loss=loss)
        optimizer.zero_grad()
"""

LIGHTNING = """
import warnings, logging
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from gradwatch.callbacks import GradWatch
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)
    def training_step(self, batch, i):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
callback = GradWatch(live=0.01, run_dir=False, sinks=[], verbose=False)
trainer = pl.Trainer(max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
                     enable_progress_bar=False, enable_model_summary=False)
"""

FIT = "trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(128, 8)), batch_size=4))"


def executed(*cells: str):
    """Run cells in a kernel of this interpreter; return the notebook with its outputs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        book, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(Path.cwd())}}
    ).execute()
    nbformat.validate(book)
    return book


def html_of(cell) -> list[str]:
    return [o["data"]["text/html"] for o in cell.outputs if "text/html" in o.get("data", {})]


def test_a_watch_its_summary_and_its_incidents_are_shown_as_html_and_text() -> None:
    book = executed(
        SETUP,
        "watch = Watch(model, optimizer); train(watch, 60); watch.close()",
        "watch",
        "watch.summary()",
        "watch.incidents",
    )
    for cell in book.cells[2:]:
        assert len(html_of(cell)) == 1
    watch, summary, incidents = (cell.outputs[0]["data"]["text/plain"] for cell in book.cells[2:])
    assert watch == summary
    assert watch.startswith("gradwatch: 60 records, steps 0 to 59\n")
    assert "\\n" not in watch
    assert incidents.splitlines()[0].startswith(("no incidents", "["))


def test_a_live_cell_is_one_output_that_ends_with_the_verdict() -> None:
    book = executed(
        SETUP, "with Watch(model, optimizer, live=0.01) as watch:\n    train(watch, 80)", "print(watch.verdict())"
    )
    (shown,) = html_of(book.cells[1])
    verdict = "".join(o["text"] for o in book.cells[2].outputs).strip()
    assert "step 79" in shown or "steps 0 to 79" in shown or "steps to 79" in shown
    assert verdict.split(":")[0] in shown
    assert "data:image/svg" in shown


def test_a_live_cell_is_drawn_while_it_trains() -> None:
    count = """
from IPython.display import DisplayHandle
drawn, update = [], DisplayHandle.update
def counted(self, shown, **options):
    drawn.append(shown["text/plain"].splitlines()[0])
    return update(self, shown, **options)
DisplayHandle.update = counted
"""
    loop = "with Watch(model, optimizer, live=0.001) as watch:\n    while len(drawn) < 3:\n        train(watch, 20)"
    book = executed(SETUP + count, loop, "for line in drawn: print(line)")
    lines = "".join(o["text"] for o in book.cells[2].outputs).splitlines()
    assert len(lines) > 3
    assert lines[0].startswith("running, step ")
    assert not lines[-1].startswith("running")


def test_a_live_cell_of_a_lightning_fit() -> None:
    book = executed(SETUP, LIGHTNING, FIT, "callback")
    (shown,) = html_of(book.cells[2])
    assert "steps to 63" in shown
    assert len(html_of(book.cells[3])) == 1


# As a progress bar of rich, Lightning's default, stands in for stdout and stderr; the program has printed half a line.
RICH = """
import sys
from rich.console import Console
from rich.live import Live
from gradwatch.callbacks._say import say
bar = Live("a bar", console=Console(), auto_refresh=False)
"""


def printed(cell) -> str:
    """Return all that a cell shows, as text."""
    return "".join(o.get("text", "") or o["data"].get("text/plain", "") for o in cell.outputs)


def test_a_live_cell_beside_a_bar_of_rich_shows_the_end_and_repeats_nothing() -> None:
    loop = "train(watch, 20); print('half a line', end='', file=sys.stderr); train(watch, 20)"
    fit = f"with bar, Watch(model, optimizer, live=0.001) as watch:\n    {loop}"
    book = executed(SETUP, RICH, fit, "print(watch.summary())")
    assert any("steps to 39" in shown for shown in html_of(book.cells[2]))
    assert printed(book.cells[2]).count("half a line") <= 1
    assert "LiveCell" not in printed(book.cells[3])


def test_lines_said_beside_a_bar_of_rich_are_said_once() -> None:
    book = executed(SETUP, RICH, "with bar:\n    say('first\\nsecond\\nlast'); display(1)")
    assert [printed(book.cells[2]).count(word) for word in ("first", "second", "last")] == [1, 1, 1]


def test_an_interrupted_cell_keeps_its_last_card() -> None:
    loop = "train(w, 30)\n        raise KeyboardInterrupt"
    stop = f"try:\n    with Watch(model, optimizer, live=1) as w:\n        {loop}\nexcept KeyboardInterrupt:\n    pass"
    (shown,) = html_of(executed(SETUP, stop).cells[1])
    assert "interrupted" in shown


FORKED = """
import os
from gradwatch.notebook import in_notebook
out, into = os.pipe()
if os.fork() == 0:
    os.write(into, repr(in_notebook()).encode())
    os._exit(0)
os.wait()
print(in_notebook(), os.read(out, 99).decode())
"""


def test_a_process_forked_from_a_kernel_is_no_notebook() -> None:
    (told,) = executed(FORKED).cells[0].outputs
    assert told["text"].split() == ["True", "False"]


WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ("IPython", "ipykernel") else super().find_spec(name, path, target)
sys.meta_path[:] = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
"""
IN_TERMINAL = "from IPython.core.interactiveshell import InteractiveShell\nInteractiveShell.instance()\n"


@pytest.mark.parametrize(
    "before", [pytest.param(WITHOUT, id="no-IPython"), pytest.param(IN_TERMINAL, id="terminal-shell")]
)
def test_outside_of_a_notebook_live_says_so_and_the_training_is_as_ever(before: str) -> None:
    code = (
        before
        + SETUP
        + "with Watch(model, optimizer, live=True) as watch:\n    train(watch, 20)\nprint(len(watch.history))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "20"
    assert done.stderr.count("a live cell is shown in notebooks only") <= 1
