"""On a GPU: the same values as on the CPU, and the host never waits."""

import pytest
import torch
from torch import nn

from gradwatch.stats import Gradients
from gradwatch.treatments import TREATMENTS

from ._steps import Step
from .test_shared_laws import SETTINGS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# These look at the host's verdict, or draw other random numbers on another device.
NAMES = [name for name in SETTINGS if name not in ("noise",)]


def steps(device: str):
    """Yield gradients and a context for some steps, one of them a spike and one not finite."""
    params = [nn.Parameter(torch.ones(s, device=device)) for s in [(8, 6), (6,), (3, 4, 2, 2)]]
    optimizer = torch.optim.Adam(params, capturable=device == "cuda")
    for step, size in enumerate([1.0, 1.1, 0.9, 1.0, 200.0, float("nan"), 1.0]):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * size).to(device)
        trigger = torch.tensor(step % 3 != 0).to(device)
        context = Step(step=step, optimizers=(optimizer,), rule="exploding", trigger=trigger, limit=1.5, can_read=False)
        yield Gradients.collect([(f"p{i}", p) for i, p in enumerate(params)]), context, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_what_the_cpu_gives_and_the_host_never_waits(name: str) -> None:
    left: dict[str, list[torch.Tensor]] = {"cpu": [], "cuda": []}
    for device, kept in left.items():
        treatment = TREATMENTS[name](**SETTINGS[name])
        for grads, context, optimizer in steps(device):
            params = grads.params
            # Memory moves to the device at the first step.
            if device == "cuda" and context.step > 0:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                treatment.apply_(grads, context)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            kept += [p.grad.cpu() if p.grad is not None else torch.zeros(0) for p in params]
            if context.step < 4:
                optimizer.step()
    if name == "skip_parameter":
        # The CPU knows the verdict and drops; a GPU that must not wait vetoes.
        return
    for a, b in zip(left["cpu"], left["cuda"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
