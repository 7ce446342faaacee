"""A run saved by some ranks and gone on with by more or fewer shows what one that was never cut would have shown."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from gradwatch.treatments import ZClip
from tests.modes.ranks import run_group
from tests.modes.reference import Net, sgd
from tests.modes.resume_cases import NOT_FINITE, SAVED_AFTER, SPIKES, STEPS, data, go, told, watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @cache
    def by(world: int) -> Path:
        folder = tmp_path_factory.mktemp(f"saved-by-{world}")
        wrong = run_group("tests.modes.resume_cases", world, folder, ["save"])["save"]
        assert not wrong, wrong
        return folder / "save" / "saved"

    return by


@pytest.fixture(scope="module")
def never_cut():
    """One process in float64 over the whole batches; its norms by arithmetic of their own beside the watch's."""
    net = Net().double()
    optimizer = sgd(net)
    watch = watched(net, optimizer, ZClip(warmup=20))
    norms = []
    for step in range(STEPS):
        handle = optimizer.register_step_pre_hook(lambda *_: None)
        net.last.weight.register_hook(lambda g: None)
        handle.remove()
        go(net, watch, optimizer, [step], 0, 1)
        norms.append(watch.history[-1].global_norm if watch.history else math.nan)
    watch.close()
    return told(watch)
