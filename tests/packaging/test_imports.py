"""What importing gradwatch pulls in, and what of it works where only the core's dependencies are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("pytorch_lightning", "lightning", "lightning_fabric", "transformers", "accelerate", "tensorboard", "wandb")
HEAVY += ("mlflow", "matplotlib", "rich", "torchjd", "sklearn", "torchvision", "pandas")

BLOCK = """
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)
sys.meta_path[:] = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
ABSENT = NAMES
"""
"""Hides packages from the import system, as if they were not installed."""


def without(*names: str) -> str:
    return BLOCK.replace("NAMES", repr(names))


CORE = """
import tempfile
from pathlib import Path
import torch
from torch import nn
import gradwatch
from gradwatch.hooks import HookManager
from gradwatch.runs import read_run
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
folder = Path(tempfile.mkdtemp()) / "run"
with gradwatch.Watch(model, torch.optim.SGD(model.parameters(), 0.1), rules="autoclip", run_dir=folder) as watch:
    for i in range(4):
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        watch.step(loss=loss)
        watch.optimizers[0].zero_grad()
    watch.report(folder / "report.html")
assert [r.global_norm for r in read_run(folder).records()] == [r.global_norm for r in watch.history]
assert (folder / "report.html").stat().st_size > 1000
with HookManager(model) as hooks:
    out, cache = hooks.run_with_cache(torch.ones(2, 4), points="*:output")
    assert len(list(cache)) >= 3
print("works")
"""


LOADED = "import sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"


def python(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import gradwatch",
        "from gradwatch import Watch, load_rules",
        "import gradwatch.hooks, gradwatch.rules, gradwatch.treatments, gradwatch.sinks, gradwatch.runs",
        "import gradwatch.callbacks",
        "import gradwatch.callbacks._entry_points as e; assert e.lightning() == e.fabric() == []",
    ],
)
@pytest.mark.slow
def test_importing_pulls_in_no_trainer_and_no_logger(statement: str) -> None:
    # torch itself brings some of these along in some versions.
    brought, loaded = (set(json.loads(python(f"{code}\n{LOADED}"))) for code in ("import torch", statement))
    assert loaded & set(HEAVY) <= brought


def test_importing_gradwatch_does_not_even_import_torch() -> None:
    assert python("import sys, gradwatch; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.slow
def test_the_core_works_without_any_of_the_optional_packages() -> None:
    assert python(without(*HEAVY) + CORE).strip().endswith("works")


NEEDS = """
from gradwatch.errors import GradwatchError
try:
    from gradwatch.callbacks import GradWatch
except GradwatchError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_needs_an_absent_package_says_what_to_install() -> None:
    assert python(without(*HEAVY) + NEEDS).strip() == (
        "GradWatch needs Lightning, and neither `lightning` nor `pytorch_lightning` is installed: "
        "pip install 'gradwatch[lightning]'. A plain loop needs neither: see gradwatch.Watch."
    )


EITHER = """
from gradwatch.callbacks import GradWatch
assert issubclass(GradWatch, pl.Callback)
print(GradWatch().state_key)
"""


@pytest.mark.parametrize(
    ("absent", "present"), [("lightning", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
)
@pytest.mark.slow
def test_the_lightning_callback_works_with_either_package_alone(absent: str, present: str) -> None:
    code = without(absent) + f"import {present} as pl" + EITHER
    assert python(code).strip() == "gradwatch:gradwatch"


def test_the_type_marker_and_the_tabs_files_lie_in_the_packages() -> None:
    import gradwatch
    import tensorboard_plugin_gradwatch

    assert (Path(gradwatch.__file__).parent / "py.typed").is_file()
    assert list((Path(tensorboard_plugin_gradwatch.__file__).parent / "static").glob("*.js"))
