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
    "alone_cases.py": "DistributedDataParallel and FSDP2, 2 processes",
    "change_cases.py": "plain gloo, 2 processes, whose models change in mid run",
    "company_cases.py": "DistributedDataParallel, 2 processes that do not all take part alike",
    "statistic_cases.py": "DistributedDataParallel and FSDP2, 2 processes",
    "flat_cases.py": "FSDP1 (`FullyShardedDataParallel`), 2 processes; HSDP1, 4 processes",
    "pipeline_cases.py": "`torch.distributed.pipelining`, 2 processes; times DDP or FSDP2, 4 processes",
    "expert_cases.py": "experts: as DTensors, or as each rank's own; 2 and 4 processes",
    "deepspeed_cases.py": "DeepSpeed, 2 processes",
    "sharded_cases.py": "FSDP2, HSDP, tensor parallel, ModelParallelStrategy; 2 and 4 processes",
}
ALONE = {
    "test_resume.py": "FSDP2, FSDP1 and pipelines, saved by some processes and resumed by others",
    "test_deepspeed.py": "DeepSpeed, saved by 2 processes and resumed by 1 and 4",
    "test_thousand.py": "1,000 ranks, what each sends and learns computed in one process",
    "test_faults.py": "DistributedDataParallel and FSDP2, 2 processes; and one",
    "test_single.py": "one process",
    "test_lightning_single.py": "one process",
    "test_skips.py": "one process",
    "test_module_db.py": "one process",
    "test_soak.py": "one process",
}


def table() -> str:
    sys.path.insert(0, str(ROOT))
    rows = ["| how it is trained | case | test |", "|---|---|---|"]
    for file, title in GROUPS.items():
        module = __import__(f"tests.modes.{file.removesuffix('.py')}", fromlist=["CASES"])
        rows += [f"| {title} | {name.replace('-', ' ')} | `tests/modes/{file}` |" for name in module.CASES]
    for file, title in ALONE.items():
        tree = ast.parse((ROOT / "tests" / "modes" / file).read_text())
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        names = [name for name in names if f"{name}.py" != file]  # it runs cases, which are listed above
        rows += [f"| {title} | {_words(name)} | `tests/modes/{file}` |" for name in names]
    return "\n".join(rows)


def _words(name: str) -> str:
    return re.sub(r"^test_", "", name).replace("_", " ")


def page() -> str:
    """The page as it has to be: its own words, and the table of today's tests."""
    head, rest = PAGE.read_text().split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    wanted = page()
    if "--check" in sys.argv:
        return int(PAGE.read_text() != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
