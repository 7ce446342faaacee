"""Writes the table in docs/modes.md from the tests; `--check` only sees whether it is up to date."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "modes.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
GROUPS = {
    "ddp_cases.py": "DistributedDataParallel, 2 processes",
    "lightning_cases.py": "Lightning `ddp`, 2 processes",
    "sharded_cases.py": "FSDP2, HSDP, tensor parallel, ModelParallelStrategy; 2 and 4 processes",
}


def table() -> str:
    sys.path.insert(0, str(ROOT))
    rows = ["| how it is trained | case | test |", "|---|---|---|"]
    for file, title in GROUPS.items():
        module = __import__(f"tests.modes.{file.removesuffix('.py')}", fromlist=["CASES"])
        rows += [f"| {title} | {name.replace('-', ' ')} | `tests/modes/{file}` |" for name in module.CASES]
    for file in ("test_single.py", "test_lightning_single.py", "test_faults.py", "test_module_db.py", "test_soak.py"):
        tree = ast.parse((ROOT / "tests" / "modes" / file).read_text())
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        rows += [f"| one process | {_words(name)} | `tests/modes/{file}` |" for name in names]
    return "\n".join(rows)


def _words(name: str) -> str:
    return re.sub(r"^test_", "", name).replace("_", " ")


def main() -> int:
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    wanted = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        return int(text != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
