"""Names that load on first use are typed: what a user writes is checked as if they were plain imports."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradwatch

ROOT = Path(gradwatch.__file__).parent
TYPED = Path(__file__).parent / "typed"
OTHERS = ["pytorch_lightning", "lightning", "lightning_fabric", "transformers", "accelerate", "wandb", "mlflow"]
LAZY = ["", "callbacks", "hooks", "sinks", "testing", "treatments"]


def names_for_checkers(package: str) -> set[str]:
    """Return what the package's `__init__` imports where nothing but a type checker looks, and plainly."""
    found: set[str] = set()
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found | {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}


@pytest.mark.parametrize("package", LAZY)
def test_every_name_of_a_lazy_package_is_known_to_checkers(package: str) -> None:
    module = importlib.import_module(f"gradwatch.{package}".rstrip("."))
    annotated = set(vars(module).get("__annotations__", ()))
    assert set(module.__all__) <= names_for_checkers(package) | annotated


@pytest.mark.parametrize("package", [*LAZY, "rules", "stats", "records", "watch"])
def test_the_list_of_names_is_one_that_checkers_can_read(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (names,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    assert ast.literal_eval(names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_program_passes_mypy_strict_and_its_mistakes_do_not(tmp_path: Path) -> None:
    settings = tmp_path / "mypy.ini"  # other people's trainers need not be read through for our names
    settings.write_text("[mypy]\n" + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in OTHERS))
    options = ["--strict", "--follow-imports=silent", f"--config-file={settings}", f"--cache-dir={tmp_path / 'cache'}"]
    files = [str(TYPED / name) for name in ("right.py", "wrong.py")]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--no-error-summary", "--no-namespace-packages", *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT.parent)},
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if ": error:" in line]
    assert not [line for line in lines if "right.py" in line], run.stdout + run.stderr
    seen = {int(line.split(":")[1]) for line in lines if "wrong.py" in line}
    meant = [i for i, line in enumerate((TYPED / "wrong.py").read_text().splitlines(), 1) if line.endswith("# wrong")]
    assert seen == set(meant), run.stdout + run.stderr
