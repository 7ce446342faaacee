"""Collectives and bytes a step that gradwatch adds, counted: `python benchmarks/distributed.py`.

Counts, not times: every all-reduce on rank 0 under DDP, FSDP2, HSDP, tensor parallelism and FSDP2 + TP, per step, at
the defaults and with everything measured at every step, on gloo and the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradwatch import Watch  # noqa: E402
from tests.modes.ranks import counted, main, run_group  # noqa: E402
from tests.modes.reference import EVERYTHING, Net, batches, loss_of, mine, sgd  # noqa: E402
from tests.modes.sharded_cases import both, fsdp, hsdp, tensor_parallel  # noqa: E402

MODES = {"ddp": (None, 2), "fsdp2": (fsdp, 2), "tp": (tensor_parallel, 2), "hsdp": (hsdp, 4), "fsdp2-tp": (both, 4)}
ARMS = {"defaults": {}, "everything": EVERYTHING}


def count(mode: str, arm: str, rank: int, world: int) -> dict[str, object]:
    distribute, _ = MODES[mode]
    net = Net()
    at_once = world
    model: nn.Module = net
    if distribute is None:
        model = DistributedDataParallel(net)
    else:
        at_once = distribute(net, world)
    optimizer = sgd(model)
    rows = []
    with Watch(model, optimizer, on_error="raise", **ARMS[arm]) as watch:
        for (pair,) in batches(at_once):
            loss = loss_of(model, mine(pair, rank * at_once // world))
            loss.backward()
            with counted() as made:
                watch.step(loss=loss)
            rows.append(made)
            optimizer.zero_grad()
    # Step 3 is the first that neither the dense beginning nor the first step's extras fall on.
    step = rows[3]
    return {
        "mode": mode,
        "arm": arm,
        "tensors": len(list(net.parameters())),
        "sum": sum(op == "SUM" for op, _, _ in step),
        "max": sum(op == "MAX" for op, _, _ in step),
        "bytes": 8 * sum(size for _, size, _ in step),
    }


def case(mode: str, arm: str):
    def run(rank: int, world: int, folder: Path) -> None:
        found = count(mode, arm, rank, world)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()

    return run


CASES = {f"{mode}-{arm}": case(mode, arm) for mode in MODES for arm in ARMS}


def table() -> str:
    lines = ["| mode | measured | tensors | SUM a step | MAX a step | bytes a step |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        for world in (2, 4):
            names = [n for n in CASES if MODES[n.rpartition("-")[0]][1] == world]
            folder = Path(place, str(world))
            folder.mkdir()
            outcomes = run_group("benchmarks.distributed", world, folder, names)
            for name in names:
                if outcomes[name]:
                    raise SystemExit(f"{name}: {outcomes[name]}")
                f = json.loads((folder / name / "found.json").read_text())
                lines.append(f"| {f['mode']} | {f['arm']} | {f['tensors']} | {f['sum']} | {f['max']} | {f['bytes']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(CASES)
    else:
        print(table())
