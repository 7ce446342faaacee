"""What ranks tell each other, as far as one process can show it."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradwatch.stats import Exchange, Shards
from gradwatch.watch._local_norms import LocalNorms
from gradwatch.watch._parallel import num_batches_at_once
from gradwatch.watch._ranks import merged_extras, pack_extras

CPU = torch.device("cpu")


@pytest.fixture
def four_ranks():
    """One of four ranks whose collectives go nowhere."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_numbers_that_all_ranks_know_are_their_means() -> None:
    told = [{"kl": 1.0, "reward": -4.0}, {"reward": 8.0, "kl": 2.0}]
    packed = sum(pack_extras(one, CPU) for one in told)
    assert merged_extras(("kl", "reward"), packed.numpy(), 2) == {"kl": 1.5, "reward": 2.0}


@pytest.mark.parametrize("other", [{}, {"rewards": 8.0}, {"kl": 1.0, "reward": 8.0}])
def test_numbers_that_some_ranks_alone_know_are_on_no_record(other: dict[str, float]) -> None:
    packed = pack_extras({"reward": 2.0}, CPU) + pack_extras(other, CPU)
    assert merged_extras(("reward",), packed.numpy(), 2) == {}


def test_a_ranks_own_norm_is_that_of_its_gradients_free_of_the_loss_scale() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    local = LocalNorms()
    local.attach(model.parameters())
    (8.0 * model(torch.randn(5, 3)).sum()).backward()
    whole = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    found = local.take(8.0)
    assert float(found) == pytest.approx(whole / 8)
    assert local.take(8.0) is None  # nothing since
    local.close()


def test_ranks_that_split_batches_have_batches_of_their_own_those_that_split_layers_share_one(four_ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batches", "layers"))

    def model(split: bool) -> nn.Linear:
        layer = nn.Linear(4, 4, bias=False)
        if split:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh["layers"], [Shard(0)]))
        return layer

    def num_batches(layer: nn.Module) -> int:
        return num_batches_at_once(layer, list(layer.parameters()))

    assert num_batches(model(split=False)) == 4
    assert num_batches(model(split=True)) == 2
    assert num_batches(fully_shard(model(split=True), mesh=mesh["batches"])) == 2
    assert num_batches(fully_shard(model(split=False), mesh=init_device_mesh("cpu", (4,)))) == 4


def test_sums_over_the_axes_of_a_full_grid_alone_are_sums_over_all_ranks(four_ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batches", "layers"))

    def spans(*placements: Placement, over: DeviceMesh) -> bool:
        tensor = distribute_tensor(torch.ones(4, 4), over, placements)
        return Exchange(Shards([tensor])).spans

    assert spans(Shard(0), Shard(1), over=mesh)
    assert spans(Shard(0), over=init_device_mesh("cpu", (4,)))
    assert not spans(Shard(0), over=mesh["layers"])
    assert not spans(Shard(0), Replicate(), over=mesh)
    assert not Exchange(Shards([torch.ones(4)])).spans
