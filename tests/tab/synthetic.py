"""Made-up runs with a known story, written by the real sinks: a spike, its clip, a dead layer, one step of nan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradwatch.protocols import RunMeta
from gradwatch.records import MODULE, NUM_BINS, PARAMETER, Histogram, Incident, Index, StepRecord, TreatmentReport
from gradwatch.sinks import RunFolder, TensorBoardSink

META = RunMeta(model="GPT", started=1.7e9, versions={"gradwatch": "0.0", "torch": "0.0"}, options={"rules": "default"})
PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def make_index(blocks: int = 6) -> Index:
    """An index like a small GPT's: `wte`, blocks of four weights with biases, `lm_head`; then their modules."""
    modules = ["wte", *(f"h.{b}.{p}" for b in range(blocks) for p in PARTS), "ln_f", "lm_head"]
    parameters = [
        p for m in modules for p in ([f"{m}.weight"] if m in ("wte", "lm_head") else [f"{m}.weight", f"{m}.bias"])
    ]
    flat = [p.endswith("bias") or p.startswith("ln_f") for p in parameters]
    order = {m: i for i, m in enumerate(modules)}
    owner = [p.rpartition(".")[0] for p in parameters]
    return Index(
        paths=(*parameters, *modules),
        kinds=(PARAMETER,) * len(parameters) + (MODULE,) * len(modules),
        numel=np.array([64 if f else 4096 for f in flat] + [0] * len(modules)),
        shapes=(*((64,) if f else (64, 64) for f in flat), *((),) * len(modules)),
        depth=np.array([2 * order[m] + 1 for m in owner] + [2 * order[m] for m in modules]),
        types=tuple("Linear" for _ in range(len(parameters) + len(modules))),
    )


def make_records(
    *,
    blocks: int = 6,
    steps: int = 400,
    every: int = 1,
    spike: int | None = 240,
    seed: int = 0,
    tasks: bool = True,
    ill: bool = True,
    sampled_every: int = 10,
) -> Iterator[StepRecord]:
    """Yield records: a spike in h.2 (clipped), from step 300 on nothing reaches h.0, one nan in h.4 at 330."""
    index, rng = make_index(blocks), np.random.default_rng(seed)
    n, is_parameter = len(index), index.is_parameter
    base = 10.0 ** (-2.2 + 0.6 * np.sin(np.arange(n) / 3.0) - 0.002 * index.depth)
    for step in range(0, steps, every):
        grad = base * np.exp(0.25 * rng.standard_normal(n)) * (1 + 2.0 * math.exp(-step / 60))
        if ill and spike is not None and 0 <= step - spike < 4 * every:
            grad[index.select("h.2.*")] *= 3000.0 / (1 + step - spike)
        if ill and step >= 300:
            grad[index.select("h.0.*") & is_parameter] = 0.0
        if ill and step == 330:
            grad[index.select("h.4.mlp.c_fc.weight")] = np.nan
        norm = float(np.sqrt(np.sum(grad[is_parameter] ** 2)))
        limit = 0.5
        clipped = norm > limit
        columns, masks = {"grad_norm": grad}, {"grad_norm": is_parameter}
        sampled = step % (sampled_every * every) == 0
        if sampled:
            columns |= {
                "update_ratio": 1e-3 * np.exp(0.3 * rng.standard_normal(n)),
                "param_norm": 3.0 + 0.002 * step + rng.random(n),
                "zero_fraction": np.where(grad == 0, 1.0, 0.02 * rng.random(n)),
                "output_rms": 0.8 + 0.2 * rng.random(n),
                "output_mean": 0.1 * rng.standard_normal(n),
                "grad_output_norm": 0.3 * base * np.exp(0.3 * rng.standard_normal(n)),
                "output_zero_fraction": 0.5 + 0.1 * rng.standard_normal(n),
            }
            over_modules = ("output_rms", "output_mean", "grad_output_norm", "output_zero_fraction")
            masks |= {c: index.is_module if c in over_modules else is_parameter for c in columns}
        scalars = (
            {"seconds": 0.2, "task_cos/seg/depth": float(np.cos(step / 80)), "task_cos/seg/normal": 0.3}
            if tasks
            else {"seconds": 0.2}
        )
        yield StepRecord(
            step=step,
            index=index,
            time=1.7e9 + 0.2 * step,
            loss=4.0 * math.exp(-step / 200) + 1.0,
            lr=1e-3,
            global_norm=norm,
            global_norm_after=min(norm, limit) if math.isfinite(norm) else norm,
            columns=columns,
            masks=masks,
            scalars=scalars,
            histograms=make_histograms(index, grad, rng) if step % (2 * sampled_every * every) == 0 else {},
            treatments=(
                TreatmentReport(
                    name="clip_to_limit", rule="exploding", before=norm, after=min(norm, limit), values={"limit": limit}
                ),
            )
            if clipped
            else (),
            skipped=not math.isfinite(norm),
        )


def make_histograms(index: Index, grad: np.ndarray, rng: np.random.Generator) -> dict[str, Histogram]:
    found = {}
    for i in np.flatnonzero(index.is_parameter & (index.ndim > 1)).tolist():
        counts = np.zeros(NUM_BINS, np.int64)
        if grad[i] > 0:
            values = grad[i] / 64 * np.exp(1.2 * rng.standard_normal(4096))
            exponents = np.clip(np.frexp(values)[1] - 1 + 127, 1, 254)
            counts[:256] = np.bincount(exponents, minlength=256)
        else:
            counts[0] = 4096
        found[index.paths[i]] = Histogram(counts)
    return found


def make_incidents(spike: int = 240) -> list[Incident]:
    return [
        Incident(
            rule="exploding",
            id=1,
            first_step=spike,
            last_step=spike + 3,
            severity="critical",
            first_path="h.2.mlp.c_proj.weight",
            paths=tuple(f"h.2.{p}.weight" for p in PARTS),
            value=41.0,
            limit=0.5,
            count=4,
            resolved=True,
            resolved_step=spike + 10,
            treatments=("clip_to_limit",),
            message="the global norm is 82 times the median of the last 256 steps",
            advice="Usual causes: a learning rate too high for this stage, or one bad batch. Try: clip the gradients, "
            "lower the learning rate, look at the batch of this step.",
        ),
        Incident(
            rule="vanishing",
            id=2,
            first_step=300,
            last_step=399,
            severity="warning",
            first_path="h.0.attn.c_attn.weight",
            paths=tuple(f"h.0.{p}.weight" for p in PARTS),
            value=0.0,
            limit=1e-8,
            count=100,
            message="the gradient has been exactly zero for 20 steps",
            advice="Nothing flows back to this block: look for a detach(), a dead activation, or a branch "
            "that is no longer used.",
        ),
        Incident(
            rule="non_finite",
            id=3,
            first_step=330,
            last_step=330,
            severity="critical",
            first_path="h.4.mlp.c_fc.weight",
            paths=("h.4.mlp.c_fc.weight",),
            value=float("nan"),
            resolved=True,
            resolved_step=331,
            treatments=("skip_step",),
            message="1 entry of 4,096 is NaN",
            advice="Look at the input batch first, then for a division or logarithm of zero in the loss.",
        ),
    ]


def write_events(
    folder: Path, *, incidents: list[Incident] | None = None, name: str = "gradwatch", window: int = 1, **story: object
) -> Path:
    """Write a run's event file with the real sink; returns the folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), max_queue=1000, flush_secs=600)
    sink = TensorBoardSink(writer, name=name)
    sink.open(META)
    held: list[StepRecord] = []
    for record in make_records(**story):  # type: ignore[arg-type]
        held.append(record)
        if len(held) == window:
            sink.write(record, held)
            held = []
    for incident in make_incidents() if incidents is None else incidents:
        sink.incident(incident)
    sink.close()
    writer.close()
    return folder


def write_folder(folder: Path, *, incidents: list[Incident] | None = None, **story: object) -> Path:
    """Write a run folder with the real sink; returns it."""
    sink = RunFolder(folder)
    sink.open(META)
    for record in make_records(**story):  # type: ignore[arg-type]
        sink.write(record, [record])
    for incident in make_incidents() if incidents is None else incidents:
        sink.incident(incident)
    sink.close()
    return folder
