"""A rank that dies, and a process that is killed: nobody hangs, and what was written can be read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

DIES = """
import os, sys, datetime, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from gradwatch import Watch
from tests.modes.reference import Net, batches, loss_of, mine, sgd
rank, folder, rules, mode, death = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=20))
model = fully_shard(Net()) if mode == "fsdp" else DistributedDataParallel(Net())
optimizer = sgd(model)
with Watch(model, optimizer, rules=rules, run_dir=f"{folder}/run", log_every=1) as watch:
    for step, (pair,) in enumerate(batches(2)):
        loss = loss_of(model, mine(pair, rank))
        loss.backward()
        if step == 3 and rank == 1:
            os._exit(7) if death == "exit" else os.kill(os.getpid(), 9)
        watch.step(loss=loss)
        optimizer.zero_grad()
"""

KILLED = """
import sys, pytorch_lightning as pl, torch, time
from pathlib import Path
from pytorch_lightning.loggers import TensorBoardLogger
from gradwatch.callbacks import GradWatch
from tests.callbacks.test_lightning import Net, loader
class Slow(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 300:
            Path(sys.argv[1], "far").touch()
            time.sleep(60)
folder = sys.argv[1]
pl.Trainer(callbacks=[GradWatch(verbose=False, log_every=1), Slow()], max_epochs=100, accelerator="cpu",
           logger=TensorBoardLogger(folder, name="tb"), enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False, default_root_dir=folder).fit(Net(), loader())
"""


def start(code: str, *args: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", code, *args]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("rules", "mode", "death"),
    [
        pytest.param("default", "ddp", "exit", id="default"),
        pytest.param("autoclip", "ddp", "exit", id="autoclip"),
        pytest.param("autoclip", "ddp", "kill", id="killed"),
        pytest.param("autoclip", "fsdp", "exit", id="fsdp"),
    ],
)
def test_when_a_rank_dies_the_other_ends_with_torchs_own_error(
    rules: str, mode: str, death: str, tmp_path: Path
) -> None:
    from gradwatch.runs import read_run

    ranks = [start(DIES, str(rank), str(tmp_path), rules, mode, death) for rank in range(2)]
    try:
        outputs = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == (7 if death == "exit" else -signal.SIGKILL), outputs[1]
    assert ranks[0].returncode not in (0, None), outputs[0]
    assert "gloo" in outputs[0].lower(), outputs[0]
    # What was measured before is all there.
    assert [r.step for r in read_run(tmp_path / "run").records()] == [0, 1, 2]


def test_what_was_written_before_a_kill_can_be_read(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradwatch.runs import read_run

    process = start(KILLED, str(tmp_path))
    try:
        for _ in range(1500):
            if (tmp_path / "far").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert (tmp_path / "far").exists(), process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        process.communicate()
    (version,) = (tmp_path / "tb").iterdir()
    records = list(read_run(version / "gradwatch").records())
    steps = [r.step for r in records]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 256
    events = EventAccumulator(str(version), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    assert "scalars" in events.Tags()
