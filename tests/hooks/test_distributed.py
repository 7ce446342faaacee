"""Under DDP: two processes, hooks on the wrapped model."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.hooks import HookManager
from tests.gloo import spawn


def _work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
        hooks = HookManager(model)
        local, seen = [], []
        hooks.add("2.bias:grad", lambda g, p: local.append(g.item()))  # names without the wrapper's are found too
        hooks.observe("*:output", lambda t, p: seen.append(p.path))
        hooks.observe("0:grad_output", lambda t, p: seen.append("back"))
        x = torch.ones(rank + 1, 2)
        model(x).sum().backward()
        assert local == [rank + 1.0]  # H17: of this rank alone
        assert model.module[2].bias.grad.item() == 1.5
        assert seen.count("back") == 1
        assert "module.0" in seen
        _, cache = hooks.run_with_cache(x)
        assert cache["0:output"].shape == (rank + 1, 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_hooks_under_ddp_see_the_gradients_of_their_rank():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_work, (port,))
