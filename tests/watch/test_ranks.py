"""What ranks tell each other, as far as one process can show it."""

import math
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradwatch.stats import Exchange, Gradients, Shards, gramian
from gradwatch.stats._measure import GradientPieces
from gradwatch.stats._norms import Row
from gradwatch.torchside import StandIn
from gradwatch.treatments import UnitLayout
from gradwatch.treatments._optimizer_state import second_moment
from gradwatch.treatments._units import _groups_inside
from gradwatch.watch import Watch, _transfer
from gradwatch.watch._after_step import AfterStep
from gradwatch.watch._guard import Guard
from gradwatch.watch._local_norms import LocalNorms
from gradwatch.watch._measurement import Measurement, StepView
from gradwatch.watch._model_meter import ModelMeter
from gradwatch.watch._options import MeasureOptions
from gradwatch.watch._parallel import num_batches_at_once
from gradwatch.watch._ranks import merged_extras, pack_extras
from gradwatch.watch._replicas import Replicas
from gradwatch.watch._stages import _fits
from gradwatch.watch._turn import Turn
from gradwatch.watch._undo import Undo

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
    local = LocalNorms(ModelMeter(model, [torch.optim.SGD(model.parameters(), 0.1)], MeasureOptions()))
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


def test_a_unit_is_summed_over_the_ranks_that_hold_other_parts_of_it_and_not_over_copies(four_ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    first, second = mesh.get_group(0), mesh.get_group(1)

    def summed_over(*placements: Placement) -> list:
        return _groups_inside(distribute_tensor(torch.ones(4, 4), mesh, placements), UnitLayout(0))

    assert summed_over(Replicate(), Shard(1)) == [second]
    assert summed_over(Shard(1), Replicate()) == [first]
    assert summed_over(Shard(0), Shard(1)) == [second]
    assert summed_over(Replicate(), Replicate()) == summed_over(Shard(0), Replicate()) == []


def test_products_of_pieces_are_summed_over_ranks_and_those_of_whole_gradients_are_not(
    four_ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_four_alike(tensor: torch.Tensor, **_) -> None:
        tensor.mul_(4)

    monkeypatch.setattr(dist, "all_reduce", of_four_alike)
    split = [distribute_tensor(torch.full((8,), v), init_device_mesh("cpu", (4,)), [Shard(0)]) for v in (1.0, 3.0)]
    whole = [torch.full((2,), v) for v in (1.0, 3.0)]
    alike = torch.tensor([[1.0, 3.0], [3.0, 9.0]], dtype=torch.float64)
    assert torch.equal(gramian([[g] for g in split]), 8 * alike)
    assert torch.equal(gramian([[g] for g in whole]), 2 * alike)
    assert torch.equal(gramian([list(pair) for pair in zip(split, whole, strict=True)]), 10 * alike)


@pytest.mark.parametrize("absent", [None, [1]], ids=["all-there", "one-absent"])
def test_a_gradient_that_no_rank_holds_is_absent_and_no_norm(absent: list[int] | None) -> None:
    squares = torch.tensor([[4.0], [9.0 if absent is None else -math.inf]], dtype=torch.float64)
    shards = SimpleNamespace(groups={"g": None}, absent=absent)
    merged = GradientPieces(shards, squares, None, Row(torch.zeros(2))).whole()
    assert merged.norms.tolist() == [2.0, 3.0 if absent is None else 0.0]
    assert (merged.absent if absent is None else merged.absent.tolist()) == (None if absent is None else [False, True])


def test_an_optimizers_state_of_a_whole_is_told_of_its_part() -> None:
    class Half(StandIn):
        def part_of(self, value):
            return value[:2]

    held, half = nn.Parameter(torch.zeros(4)), Half(torch.zeros(2))
    half._behind = weakref.ref(held)
    optimizer = torch.optim.Adam([held])
    optimizer.state[held] = {"exp_avg_sq": torch.arange(4.0)}
    assert second_moment([optimizer], held).tolist() == [0, 1, 2, 3]
    assert second_moment([optimizer], half).tolist() == [0, 1]


def test_a_parameter_stands_for_that_of_another_stage_only_where_shape_and_type_are_the_same() -> None:
    member = SimpleNamespace(row=SimpleNamespace(shape=(2, 3)), dtype=torch.float32)
    assert _fits(torch.zeros(2, 3), member)
    assert not _fits(torch.zeros(3, 2), member)
    assert not _fits(torch.zeros(2, 3, dtype=torch.float16), member)
    assert not _fits(None, member)


def test_what_ddp_is_told_to_ignore_is_no_copy_of_other_ranks() -> None:
    model = nn.Linear(2, 2)
    model._ddp_params_and_buffers_to_ignore = ["bias"]
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), rules="observe", on_error="raise") as watch:
        model(torch.ones(1, 2)).sum().backward()
        watch.step()
        weight, bias = Replicas(watch.session.engine.meter)._weights()
    assert weight is model.weight
    assert bias is None


def test_numbers_on_their_way_from_a_device_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_its_way(flat: torch.Tensor) -> tuple[torch.Tensor, SimpleNamespace]:
        host = torch.full_like(flat, -1.0)
        return host, SimpleNamespace(query=lambda: False, synchronize=lambda: host.copy_(flat))

    monkeypatch.setattr(_transfer, "_IS_CPU", lambda tensor: False)
    monkeypatch.setattr(_transfer, "fetched", on_its_way)
    numbers = _transfer.Transfer({"norms": torch.tensor([1.0, 2.0]), "step": 7})
    assert not numbers.ready
    found = numbers.result()
    assert (found["norms"].tolist(), found["step"]) == ([1.0, 2.0], 7)


@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support")
def test_a_state_that_can_not_be_read_is_named_and_the_copy_called_incomplete() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([p], 0.1)
    assert Undo([optimizer], limit_bytes=1 << 20).is_complete
    optimizer.state[p]["odd"] = torch.eye(2).to_sparse_csc()
    undo = Undo([optimizer], limit_bytes=1 << 20)
    (why,) = undo.unreadable
    assert "can't be read bit by bit" in why
    assert not undo.is_complete


@pytest.mark.parametrize("has_exchanged", [False, True])
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_rank_that_gives_up_says_so_once_and_that_it_moves_nothing(is_alone: bool, has_exchanged: bool) -> None:
    said: list[object] = []
    measuring = SimpleNamespace(
        guard=lambda what: nullcontext(),
        meter=SimpleNamespace(gradients=lambda optimizers, scale: "gradients"),
        give_up=lambda turn: said.append("nothing measured"),
    )
    ratios = SimpleNamespace(before=lambda turn, *, moves: said.append(f"moves: {moves}"))
    plan, inputs = SimpleNamespace(is_alone=is_alone, measures=True), SimpleNamespace(grad_scale=1.0)
    turn = Turn(plan, inputs, [], measuring, ratios)
    turn.has_exchanged = has_exchanged
    turn.give_up()
    left = [] if has_exchanged else ["nothing measured"]
    assert said == ([] if is_alone else [*left, "moves: False"])


@pytest.mark.parametrize("has_said", [False, True])
def test_a_rank_that_has_said_whether_it_moves_does_not_say_it_again_when_its_step_fails(has_said: bool) -> None:
    """The others wait for one word of each rank: a second one would be taken for the next step's."""

    class Spanning(Measurement):
        spans_step = True

        def before_step(self, view: StepView, *, moves: bool) -> None:
            said.append(moves)

    said: list[bool] = []
    guard = Guard("raise")
    spanning = Spanning(None)  # type: ignore[arg-type]
    plan = SimpleNamespace(is_alone=False, measures=True, num_ranks=2, statistics=(spanning,))
    inputs = SimpleNamespace(step=0, scale=None, optimizer=None)
    measuring = SimpleNamespace(guard=guard, give_up=lambda turn: None)
    after_step = AfterStep(guard)
    turn = Turn(plan, inputs, (), measuring, after_step)  # type: ignore[arg-type]
    turn.grads = Gradients.collect([])
    if has_said:
        after_step.before(turn, moves=True)
    turn.give_up()
    assert said == [has_said]
