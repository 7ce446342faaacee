"""What gradwatch would cost on models and numbers of ranks that are not at hand, from slopes that are measured here.

    python benchmarks/scale_paper.py [--steps 100] [--write docs/scale.md]

Everything gradwatch does is linear in the number of tensors and of modules, but for reading the gradients once. Two
sizes are measured of each cost, and a straight line laid through both: CPU time, memory, disk and TensorBoard of one
process that trains small tensors; the bytes that ranks exchange under FSDP2, and the CPU time of a rank, in torch's own
process group without a network (`backend="fake"`), in which this process is one of so many ranks that all say what it
says. The lines are then read at the sizes of models.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from scale import mixture
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.tensorboard import SummaryWriter

from gradwatch import Watch
from gradwatch.sinks import TensorBoardSink

BEGIN, END = "<!-- made: begin -->", "<!-- made: end -->"
NEVER = dict.fromkeys(("activations_every", "updates_every", "histograms_every"))


class Model(NamedTuple):
    """A model, as far as it matters here: parameters in how many tensors, and how many modules."""

    name: str
    elements: float
    tensors: int
    modules: int


MODELS = (
    Model("7 B (32 layers)", 6.7e9, 291, 421),
    Model("70 B (80 layers)", 69e9, 723, 1045),
    Model("11,520 expert tensors (60 layers of 64)", 47e9, 11_520, 3_900),
)
RANKS = (8, 64, 1000)


class Line(NamedTuple):
    """A cost: so much, and so much more for each thing."""

    fixed: float
    each: float

    def at(self, count: float) -> float:
        return self.fixed + self.each * count


def line(counts: Sequence[int], costs: Sequence[float]) -> Line:
    each = (costs[1] - costs[0]) / (counts[1] - counts[0])
    return Line(costs[0] - each * counts[0], each)


class Kept(NamedTuple):
    """What a run of one process took.

    Attributes:
        tensors: of the model.
        milliseconds: of CPU that watching adds to a step at which norms alone are due.
        record_bytes: of a record in memory.
        files: bytes of the run folder.
        board: bytes of TensorBoard's event file.
    """

    tensors: int
    milliseconds: float
    record_bytes: float
    files: int
    board: int


def run(layers: int, steps: int, folder: Path) -> Kept:
    """Train a mixture of small experts under a `Watch` at its defaults, which writes a run folder and TensorBoard."""
    model, optimizer, backward = mixture(layers)
    writer = SummaryWriter(str(folder / "board"))
    added: list[float] = []
    with Watch(model, optimizer, run_dir=folder / "run", sinks=[TensorBoardSink(writer)], log_every=50) as watch:
        for step in range(steps):
            loss = backward()
            start = time.process_time()
            watch.after_backward(loss)
            between = time.process_time()
            optimizer.step()
            stepped = time.process_time()
            watch.after_step()
            if step > 16 and step % 50:
                added.append((between - start + time.process_time() - stepped) * 1e3)
        records = list(watch.history)
    writer.close()
    columns = [sum(c.nbytes for c in (*r.columns.values(), *r.masks.values())) for r in records]
    tensors = len(list(model.parameters()))
    found = [_size(folder / name) for name in ("run", "board")]
    return Kept(tensors, statistics.median(added), statistics.median(columns), found[0], found[1])


def _places(count: int) -> Iterator[str]:
    for _ in range(count):
        with tempfile.TemporaryDirectory() as place:
            yield place


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def alone(steps: int) -> dict[str, Line]:
    """Return the lines of one process, over tensors: CPU, memory of a record, bytes a step in files of both kinds."""
    found: dict[str, list[float]] = {"ms": [], "record": [], "disk": [], "board": []}
    counts: list[int] = []
    for layers in (1, 4):
        with tempfile.TemporaryDirectory() as short, tempfile.TemporaryDirectory() as long:
            # The difference of two runs: the steps at the beginning, where more is measured, fall out.
            one, two = run(layers, 20, Path(short)), run(layers, 20 + steps, Path(long))
        again = [run(layers, 20 + steps, Path(place)).milliseconds for place in _places(4)]
        counts.append(two.tensors)
        found["ms"].append(statistics.median([two.milliseconds, *again]))
        found["record"].append(two.record_bytes)
        found["disk"].append((two.files - one.files) / steps)
        found["board"].append((two.board - one.board) / steps)
    return {name: line(counts, costs) for name, costs in found.items()}


@contextlib.contextmanager
def ranks(world: int) -> Iterator[list[int]]:
    """Be one of so many ranks, of which the others say the same; note the bytes of every all-reduce."""
    sent: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **more: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        if op == dist.ReduceOp.SUM:
            tensor.mul_(dist.get_world_size(group))

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    dist.all_reduce = all_reduce  # type: ignore[assignment]
    try:
        yield sent
    finally:
        dist.all_reduce = original
        dist.destroy_process_group()


def sharded_step(layers: int, world: int, sent: list[int], **options: Any) -> tuple[int, float]:
    """Return the bytes that a step sends under FSDP2, and the milliseconds of CPU that watching takes in it."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(layers)])
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    spent, found = [], []
    with Watch(net, optimizer, rules="observe", **{**NEVER, **options}) as watch:
        for _ in range(12):
            net(torch.ones(2, 4)).square().mean().backward()
            for p in net.parameters():
                # What nobody has sent is whatever lay there.
                p.grad.to_local().fill_(1e-3)  # type: ignore[union-attr]
            sent.clear()
            start = time.process_time()
            watch.after_backward(0.5)
            between = time.process_time()
            optimizer.step()
            stepped = time.process_time()
            watch.after_step()
            spent.append((between - start + time.process_time() - stepped) * 1e3)
            found.append(sum(sent))
            optimizer.zero_grad()
    return found[-1], statistics.median(spent[4:])


class Exchanged(NamedTuple):
    """Bytes that a rank sends in a step, and the CPU time of it.

    Attributes:
        norms: of norms alone; over tensors.
        each_rank: more for each rank there is.
        histograms, updates: more where these are due; over tensors.
        modules: more where modules are sampled; over modules.
        ms: CPU milliseconds of a step with norms alone; over tensors.
    """

    norms: Line
    each_rank: float
    histograms: Line
    updates: Line
    modules: Line
    ms: Line


def together() -> Exchanged:
    counts, few, many = (8, 64), 8, 1000
    ways: Mapping[str, dict[str, Any]] = {
        "norms": {},
        "histograms": {"histograms_every": 1},
        "updates": {"updates_every": 1},
        "modules": {"activations_every": 1},
    }
    sizes: dict[str, list[float]] = {name: [] for name in ways}
    spent: list[float] = []
    with ranks(few) as sent:
        for layers in counts:
            for name, options in ways.items():
                again = [sharded_step(layers, few, sent, **options) for _ in range(5 if name == "norms" else 1)]
                sizes[name].append(again[0][0] - (sizes["norms"][-1] if name != "norms" else 0))
                if name == "norms":
                    spent.append(statistics.median(milliseconds for _, milliseconds in again))
    with ranks(many) as sent:
        more, _ = sharded_step(counts[0], many, sent)
    lines = {name: line(counts, found) for name, found in sizes.items()}
    each_rank = (more - sizes["norms"][0]) / (many - few)
    norms = Line(lines["norms"].fixed - each_rank * few, lines["norms"].each)
    return Exchanged(norms, each_rank, lines["histograms"], lines["updates"], lines["modules"], line(counts, spent))


def slopes_table(single: Mapping[str, Line], sent: Exchanged) -> Iterator[str]:
    yield "| cost | fixed | each tensor | each module | each rank |"
    yield "|---|---|---|---|---|"
    norms, more = sent.norms, "bytes reduced besides, where"
    yield f"| bytes reduced, a step with norms alone | {_n(norms.fixed)} | {_n(norms.each)} | | {_n(sent.each_rank)} |"
    yield f"| {more} histograms are due | {_n(sent.histograms.fixed)} | {_n(sent.histograms.each)} | | |"
    yield f"| {more} updates are due | {_n(sent.updates.fixed)} | {_n(sent.updates.each)} | | |"
    yield f"| {more} modules are sampled | {_n(sent.modules.fixed)} | | {_n(sent.modules.each)} | |"
    ms, shard = single["ms"], sent.ms
    yield f"| CPU of a step, us, whole tensors | {ms.fixed * 1e3:,.0f} | {ms.each * 1e3:.1f} | | |"
    yield f"| CPU of a step, us, FSDP2 | {shard.fixed * 1e3:,.0f} | {shard.each * 1e3:.1f} | | |"
    yield f"| memory of a record, bytes | {_n(single['record'].fixed)} | {_n(single['record'].each)} | | |"
    yield f"| run folder, bytes a step | {_n(single['disk'].fixed)} | {_n(single['disk'].each)} | | |"
    yield f"| TensorBoard, bytes a step | {_n(single['board'].fixed)} | {_n(single['board'].each)} | | |"


def models_table(single: Mapping[str, Line], sent: Exchanged) -> Iterator[str]:
    yield (
        "| model | ranks | bytes reduced: norms alone | mean of a step | at most | CPU ms a step | copies for updates |"
        " records held | disk, KB a step | TensorBoard, KB a step |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        for count in RANKS:
            norms = sent.norms.at(model.tensors) + sent.each_rank * count
            histograms, updates = sent.histograms.at(model.tensors), sent.updates.at(model.tensors)
            modules = sent.modules.at(model.modules)
            mean = norms + histograms / 100 + updates / 50 + modules / 50
            copies = min(4 * model.elements / count, 128 * 2**20)
            record = single["record"].at(model.tensors)
            cells = [
                model.name,
                f"{count:,}",
                _kb(norms),
                _kb(mean),
                _kb(norms + histograms + updates + modules),
                f"{sent.ms.at(model.tensors):.1f}",
                f"{copies / 2**20:.0f} MiB" + (" (samples)" if copies < 4 * model.elements / count else ""),
                f"{min(1000, 64 * 2**20 / record):.0f}",
                f"{single['disk'].at(model.tensors) / 1e3:.1f}",
                f"{single['board'].at(model.tensors) / 1e3:.1f}",
            ]
            yield f"| {' | '.join(cells)} |"


def _n(number: float) -> str:
    return f"{number:,.0f}"


def _kb(number: float) -> str:
    return f"{number / 1e3:,.1f} KB"


def measured(steps: int) -> str:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    single, sent = alone(steps), together()
    parts: list[Callable[..., Iterator[str]]] = [slopes_table, models_table]
    return "\n\n".join("\n".join(part(single, sent)) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="over which sizes of files are taken")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    options = parser.parse_args()
    tables = measured(options.steps)
    print(tables)
    if options.write is not None:
        head, rest = options.write.read_text(encoding="utf-8").split(BEGIN)
        page = f"{head}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
