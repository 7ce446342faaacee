"""Snapshots that nobody asks for change no bit of a training, each program in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import hashlib, random, sys
import numpy as np, torch
from tests.treatments._rollback import Loop, at

watched, optimizer, scaler = sys.argv[1] == "watched", sys.argv[2], sys.argv[3] == "scaler"
options = {"storage": sys.argv[4]} if len(sys.argv) > 4 else {}
loop = Loop(at(10**6, steps=3, **options), optimizer=optimizer, scaler=scaler, watched=watched)
loop.run(24)
if watched:
    assert len(loop.watch.session.engine.rollbacks.snapshots.held) == 2
    loop.watch.close()
found = hashlib.sha256()
for part in (*loop.net.parameters(), *loop.net.buffers(), torch.get_rng_state()):
    found.update(part.detach().numpy().tobytes())
for state in loop.optimizer.state.values():
    for value in state.values():
        found.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
found.update(repr((random.getstate(), np.random.get_state()[1].tolist())).encode())
print(found.hexdigest())
"""


def run(*arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    program = "import random, numpy; random.seed(1); numpy.random.seed(1)\n" + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("adamw-fused", "plain"),
        ("sgd", "scaler"),
        ("adamw", "plain", "disk"),
    ],
    ids="-".join,
)
def test_training_with_snapshots_is_bit_for_bit_training_without(arguments: tuple[str, ...]) -> None:
    assert run("watched", *arguments) == run("alone", *arguments)
