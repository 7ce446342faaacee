"""What two ranks run with statistics of one's own: under DDP, and under FSDP2 with parameters in pieces."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradwatch import Watch
from gradwatch.ahead import WeightSpectra
from gradwatch.stats import Statistic
from gradwatch.treatments import ClipByGlobalNorm
from gradwatch.watch import _noise_scale
from gradwatch.watch._measuring import Measuring
from gradwatch.watch._noise_scale import NoiseScale
from tests.modes.ranks import counted, equal_on_all_ranks, main
from tests.modes.reference import ROWS, Net, batches, loss_of, mine, sgd
from tests.modes.sharded_cases import shard


class SquaredNorm(Statistic):
    """Squared norm of each gradient, and its largest entry."""

    num_maxima = 1

    @classmethod
    def columns(cls):
        (one,) = super().columns()
        return one, type(one)(name="largest_entry", kind=one.kind, meaning="Largest entry of each gradient.")

    def sums(self, view):
        return view.rows([g.square().sum() for g in view.grads])

    def maxima(self, view):
        return view.rows([g.abs().max() if g.numel() else g.new_zeros(()) for g in view.grads])

    def finish(self, sums, maxima):
        return {"squared_norm": sums[:, 0], "largest_entry": maxima[:, 0]}


class StepCosine(Statistic):
    """Cosine of the whole gradient with that of the step before."""

    kind, scale, signed, num_sums = "scalar", "linear", True, 3

    def sums(self, view):
        last, now = view.memory.get("last"), [g.double() for g in view.grads]
        view.memory["last"] = [g.clone() for g in now]
        if last is None:
            return None
        pairs = list(zip(last, now, strict=True))
        return view.rows([(a * b).sum() for a, b in pairs], *([x[i].square().sum() for x in pairs] for i in (0, 1)))

    def finish(self, sums, maxima):
        dot, first, second = sums.sum(axis=0)
        return dot / np.sqrt(first * second)


class SumOfOutputs(Statistic):
    """Sum of each module's output."""

    needs = frozenset({"outputs"})

    def sums(self, view):
        return sum(t.sum() for t in view.outputs).reshape(1, 1)


class Breaking(SquaredNorm):
    """Fails on the second rank, at the third step."""

    name = "breaking"

    @classmethod
    def columns(cls):
        return Statistic.columns.__func__(cls)

    def sums(self, view):
        if dist.get_rank() == 1 and view.step == 2:
            raise RuntimeError("a bug of one rank")
        return super().sums(view)

    def finish(self, sums, maxima):
        return sums[:, 0]


def ddp(net: nn.Module, world: int) -> nn.Module:
    return DistributedDataParallel(net)


def fsdp(net: nn.Module, world: int) -> nn.Module:
    shard(net, init_device_mesh("cpu", (world,)))
    return net


def train(model: nn.Module, rank: int, world: int, statistics: Any, **options: Any) -> tuple[Watch, list[Any]]:
    optimizer, made_in = sgd(model), []
    watch = Watch(model, optimizer, rules="observe", statistics=statistics, activations_every=None, **options)
    with watch:
        for (pair,) in batches(world):
            loss = loss_of(model, mine(pair, rank))
            loss.backward()
            with counted() as made:
                watch.step(loss=loss)
            made_in.append([op for op, _, _ in made])
            optimizer.zero_grad()
    return watch, made_in


def reference(world: int) -> list[dict[str, Any]]:
    """Return the gradients of each step and the sums of outputs, of one process over the whole batches."""
    net = Net().double()
    optimizer, found = sgd(net), []
    for (pair,) in batches(world):
        sums: dict[str, float] = {}
        hooks = [
            m.register_forward_hook(lambda m, a, out, to=sums, path=n: to.__setitem__(path, float(out.sum())))
            for n, m in net.named_modules()
        ]
        loss_of(net, (pair[0].double(), pair[1].double())).backward()
        for hook in hooks:
            hook.remove()
        found.append({"grads": {n: p.grad.clone() for n, p in net.named_parameters()}, "outputs": sums})
        optimizer.step()
        optimizer.zero_grad()
    return found


def numbers_are_those_of_the_whole(wrap: Any) -> Any:
    def case(rank: int, world: int, folder: Path) -> None:
        every = [SquaredNorm(), StepCosine(), SumOfOutputs()]
        watch, _ = train(wrap(Net(), world), rank, world, every, histograms_every=None, on_error="raise")
        expected = reference(world)
        assert len(watch.history) == len(expected)
        for step, (record, want) in enumerate(zip(watch.history, expected, strict=True)):
            for path, grad in want["grads"].items():
                np.testing.assert_allclose(record["squared_norm", path], float(grad.square().sum()), rtol=1e-4)
                np.testing.assert_allclose(record["largest_entry", path], float(grad.abs().max()), rtol=1e-4)
            for path in ("first", "body.0", "last"):
                np.testing.assert_allclose(record["sum_of_outputs", path], want["outputs"][path], rtol=1e-3, atol=1e-3)
            if step:
                before = torch.cat([g.flatten() for g in expected[step - 1]["grads"].values()])
                now = torch.cat([g.flatten() for g in want["grads"].values()])
                cosine = float(torch.cosine_similarity(before, now, dim=0))
                np.testing.assert_allclose(record.scalars["step_cosine"], cosine, rtol=1e-4)
            else:
                assert "step_cosine" not in record.scalars
        equal_on_all_ranks([sorted(r.scalars) for r in watch.history])

    return case


def one_exchange_a_step(wrap: Any) -> Any:
    def case(rank: int, world: int, folder: Path) -> None:
        options = {"histograms_every": None, "updates_every": None}
        _, bare = train(wrap(Net(), world), rank, world, (), **options)
        _, made = train(wrap(Net(), world), rank, world, [StepCosine(), SumOfOutputs()], **options)
        assert made[1:] == bare[1:] == [["SUM"]] * (len(made) - 1), (made, bare)

    return case


def a_failure_of_one_rank(wrap: Any) -> Any:
    def case(rank: int, world: int, folder: Path) -> None:
        watch, _ = train(wrap(Net(), world), rank, world, [Breaking(), StepCosine()], histograms_every=2)
        held = ["breaking" in r.columns for r in watch.history]
        assert held == [True, True] + [False] * (len(held) - 2)
        assert all("step_cosine" in r.scalars for r in watch.history[1:])
        assert any("breaking" in note for note in watch.session.notes) == (rank == 1)

    return case


def of_whole_weights_alone(wrap: Any) -> Any:
    """A spectral norm does not add up from pieces: it is the exact one, or nan."""

    def case(rank: int, world: int, folder: Path) -> None:
        net = Net()
        exact = {
            n: torch.linalg.svdvals(p.detach().double())[0].item() for n, p in net.named_parameters() if p.dim() == 2
        }
        watch, _ = train(wrap(net, world), rank, world, [WeightSpectra()], histograms_every=None, on_error="raise")
        record = watch.history[0]
        assert exact
        for path, norm in exact.items():
            expected = norm if wrap is ddp else np.nan
            np.testing.assert_allclose(record["spectral_norm", path], expected, rtol=0.01)
            np.testing.assert_equal(record["spectral_norm", path] == record["spectral_norm", path], wrap is ddp)

    return case


class Shares(Statistic):
    """How much of the ranks' own gradient entries lies on each, and at which rank most."""

    kind, num_sums, scale = "scalar", 0, "share"

    @classmethod
    def columns(cls):
        (one,) = super().columns()
        return one, type(one)(name="largest_rank", kind="scalar", meaning="The rank that holds most.")

    def tables(self, ranks):
        return {"entries": (ranks.num, 2)}

    def measure(self, view, tables):
        if view.rank == 1 and view.step == 2:
            raise RuntimeError("a bug of one rank")
        tables["entries"][view.rank] = torch.tensor([float(sum(g.numel() for g in view.grads)), 1.0 + view.rank])
        return {"steps": view.step}

    def conclude(self, found):
        held = found["entries"]
        if not held[:, 1].all():
            return {}
        return {"shares": held[0, 0] / held[:, 0].sum(), "largest_rank": held[:, 1].argmax() + 0 * found["steps"]}


def a_row_for_each_rank(wrap: Any) -> Any:
    """It travels in the step's exchange; on a rank where it fails it is off, and its row is zero from there on."""

    def case(rank: int, world: int, folder: Path) -> None:
        options = {"histograms_every": None, "updates_every": None}
        watch, made = train(wrap(Net(), world), rank, world, [Shares()], **options)
        assert made[1:] == [["SUM"]] * (len(made) - 1), made
        for record in watch.history:
            known = ["largest_rank", "shares"] if record.step < 2 else []
            assert sorted(record.scalars.keys() & {"largest_rank", "shares"}) == known
            if known:
                np.testing.assert_allclose(record.scalars["shares"], 1 / world, atol=0.1)
                assert record.scalars["largest_rank"] == world - 1
        assert any("shares" in note for note in watch.session.notes) == (rank == 1)

    return case


def a_rank_that_fails_at_the_first_step(wrap: Any) -> Any:
    """It takes part in all that ranks meet for: also where they compare the rows of weights in pieces."""

    def case(rank: int, world: int, folder: Path) -> None:
        calls, real = itertools.count(), Measuring._take_gradients

        def broken(*args: Any) -> Any:
            if next(calls) == 0 and rank == 1:
                raise MemoryError("a fault on this rank")
            return real(*args)

        with patch.object(Measuring, "_take_gradients", broken):
            watch, _ = train(wrap(Net(), world), rank, world, (), treatments=[ClipByGlobalNorm(1e6)])
        assert len([r for r in watch.history if r.step]) == len(batches(world)) - 1
        equal_on_all_ranks([(r.step, r.global_norm) for r in watch.history if r.step])

    return case


class MoveOverLength(Statistic):
    """Norm of the update and of the parameter before it, as squares; fails on the second rank at step 3."""

    needs = frozenset({"updates"})
    num_sums, num_maxima = 2, 1

    @classmethod
    def columns(cls):
        (one,) = super().columns()
        return one, type(one)(name="largest_step", kind="parameter", meaning="Largest change of an element.")

    def sums(self, view):
        if view.step == 3 and dist.get_rank() == 1:
            raise RuntimeError("a bug of one rank")
        moved = [(a - b).square().sum() for a, b in zip(view.params, view.before, strict=True)]
        return view.rows(moved, [b.square().sum() for b in view.before])

    def maxima(self, view):
        moved = [(a - b).abs() for a, b in zip(view.params, view.before, strict=True)]
        return view.rows([m.max() if m.numel() else m.new_zeros(()) for m in moved])

    def finish(self, sums, maxima):
        return {"move_over_length": np.sqrt(sums[:, 0] / sums[:, 1]), "largest_step": maxima[:, 0]}


def what_a_step_does(wrap: Any) -> Any:
    """It is that of whole parameters, and where these are in pieces what one rank can't say nobody does."""

    def case(rank: int, world: int, folder: Path) -> None:
        options = {"histograms_every": None, "updates_every": 1}
        watch, _ = train(wrap(Net(), world), rank, world, [MoveOverLength()], **options)
        for record in watch.history[:3]:
            known = record.measured("update_ratio")
            ratio = record.columns["update_norm"][known] / record.columns["param_norm"][known]
            np.testing.assert_allclose(record.columns["move_over_length"][known], ratio, rtol=1e-4)
            largest = record.columns["largest_step"][known]
            assert (largest > 0).all()
            assert (largest <= record.columns["update_norm"][known] * 1.0001).all()
        equal_on_all_ranks([r.columns["largest_step"].tolist().__repr__() for r in watch.history[:3]])
        later = ["move_over_length" in r.columns for r in watch.history[3:]]
        assert later
        assert any(later) == (wrap is ddp and rank == 0), later
        assert all("update_norm" in r.columns for r in watch.history)
        assert any("move_over_length" in note for note in watch.session.notes) == (rank == 1)

    return case


def the_noise_scale_of_all_ranks(rank: int, world: int, folder: Path) -> None:
    """It is of the samples of all ranks, and travels with the rest; where one can't tell them apart nobody says it."""
    real = _noise_scale.noise_sums

    def told(*args: Any) -> Any:
        if rank == 1 and next(calls) == 2:  # at steps 0, 1, 2, 4, ...
            raise ValueError("not on this rank")
        return real(*args)

    calls, options = itertools.count(), {"noise_scale": True, "histograms_every": None, "updates_every": None}
    with patch.object(_noise_scale, "noise_sums", told):
        watch, made = train(ddp(Net(), world), rank, world, (), **options)
    assert made[1:] == [["SUM"]] * (len(made) - 1), made
    said = {r.step: r.scalars for r in watch.history if "noise_scale" in r.scalars}
    assert list(said) == [step for step in (0, 1, 4) if step < len(watch.history)]
    assert all(scalars["noise_batch_size"] == world * ROWS for scalars in said.values())
    equal_on_all_ranks([[str(scalars[name]) for name in NoiseScale.gives] for scalars in said.values()])


CASES = {
    "the-noise-scale-of-all-ranks": the_noise_scale_of_all_ranks,
}
CASES |= {
    f"{law.__name__}_{wrap.__name__}".replace("_", "-"): law(wrap)
    for law in (
        numbers_are_those_of_the_whole,
        one_exchange_a_step,
        a_failure_of_one_rank,
        of_whole_weights_alone,
        a_row_for_each_rank,
        a_rank_that_fails_at_the_first_step,
        what_a_step_does,
    )
    for wrap in (ddp, fsdp)
}

if __name__ == "__main__":
    main(CASES)
