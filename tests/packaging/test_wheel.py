"""The wheel and the sdist: built, checked, and installed where nothing of this checkout can be seen."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from .test_imports import CORE, HEAVY, without

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*arguments: object, cwd: Path) -> str:
    words = [str(a) for a in arguments]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=alone, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation: the build backend is here, and nothing has to be fetched.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def test_the_wheel_holds_both_packages_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"gradwatch", "tensorboard_plugin_gradwatch"}
    assert {"gradwatch/py.typed", "gradwatch/book/presets/default.yaml"} <= names
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "tensorboard_plugin_gradwatch").rglob("*") if p.is_file()}
    assert {n for n in here if "__pycache__" not in n} <= names
    assert not any("__pycache__" in n or n.endswith((".so", ".pyc")) for n in names)
    entries = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    groups = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric")
    assert all(f"[{g}.callbacks_factory]" in entries for g in groups)


def test_the_sdist_holds_sources_tests_and_docs(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "gradwatch/__init__.py", "tests/zoo.py"} <= names


def test_the_metadata_is_clean(dist: Path) -> None:
    pytest.importorskip("twine")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert said.count("PASSED") == 2


def test_the_installed_wheel_works_with_the_core_alone(dist: Path, tmp_path: Path) -> None:
    """A fresh environment that sees torch, but neither this checkout nor any optional package."""
    venv.create(tmp_path / "fresh", with_pip=False, symlinks=True)
    python = tmp_path / "fresh" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    import torch

    # torch is lent by the environment that runs the tests; an editable gradwatch in there would come after ours.
    (site / "lent.pth").write_text(str(Path(torch.__file__).parents[1]))
    where = "import gradwatch, sys; assert gradwatch.__file__.startswith(sys.argv[1]), gradwatch.__file__\n"
    said = run(python, "-c", without(*HEAVY) + where + CORE, str(tmp_path), cwd=tmp_path)
    assert said.strip().endswith("works")
