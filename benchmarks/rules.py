"""What the rules cost, and how often the spike rules speak without cause. Run: python benchmarks/rules.py

Cost: every rule of the catalogue judges records of 10,000 paths (parameters, and as many modules on sampled steps);
CPU time a step, median. False alarms: 100,000 clean synthetic steps (loss with sigma .04, log norm with sigma .2).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import numpy as np

from gradwatch import load_rules
from gradwatch.records import MODULE, PARAMETER, Index, StepRecord
from gradwatch.rules import RULES, Exploding, LossSpike, RuleBook, RuleEngine

BLOOM_LOSS = [2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805]
BLOOM_NORM = [0.242, 0.947, 2.390, 15.886, 145.1, 960.4, 353.2, 379.3, 650.2]
MODULE_COLUMNS = ("output_rms", "output_std", "output_nonfinite", "input_nonfinite", "silent_fraction")
UPDATE_COLUMNS = ("param_norm", "update_norm", "update_ratio")


def make_index(num_paths: int, num_modules: int) -> Index:
    paths = [f"layer.{i}.weight" for i in range(num_paths)] + [f"layer.{i}" for i in range(num_modules)]
    return Index(
        paths=tuple(paths),
        kinds=(PARAMETER,) * num_paths + (MODULE,) * num_modules,
        numel=np.full(len(paths), 100),
        shapes=((10, 10),) * num_paths + ((),) * num_modules,
        depth=np.concatenate([np.arange(num_paths), np.arange(num_modules)]),
    )


def make_records(index: Index, num: int, trouble: bool) -> list[StepRecord]:
    """Records with norms at every step; with updates and activations at every 50th. `trouble`: a stuck loss, and a
    thousand vanishing weights, so that rules fire."""
    rng = np.random.default_rng(0)
    parameters, modules = index.is_parameter, index.is_module
    records = []
    for s in range(num):
        norms = np.exp(0.2 * rng.normal(size=len(index)))
        if trouble:
            norms[:1000] *= 1e-6
        columns, masks = {"grad_norm": norms}, {"grad_norm": parameters}
        if s % 50 == 0:
            columns |= dict.fromkeys(UPDATE_COLUMNS, norms * 0.001)
            masks |= dict.fromkeys(UPDATE_COLUMNS, parameters)
            columns |= {name: np.zeros(len(index)) for name in MODULE_COLUMNS}
            masks |= dict.fromkeys(MODULE_COLUMNS, modules)
        loss = 2.3 + 0.02 * rng.normal() if trouble else 2.3 * 0.99**s + 0.1 + 0.01 * rng.normal()
        norm = float(np.sqrt(np.square(norms[parameters]).sum()))
        scalars = {"num_trainable": 1.0, "seconds": 0.1}
        records.append(
            StepRecord(
                step=s, index=index, loss=loss, lr=1e-3, global_norm=norm, columns=columns, masks=masks, scalars=scalars
            )
        )
    return records


def milliseconds(book: RuleBook, records: list[StepRecord], after: int) -> list[float]:
    engine = RuleEngine(book, on_error="raise")
    spent = []
    for record in records:
        begin = time.process_time()
        engine.judge(record)
        if record.step >= after:
            spent.append(1e3 * (time.process_time() - begin))
    return spent


def cost(num_paths: int, num_steps: int) -> None:
    catalogue = RuleBook([cls() for name, cls in RULES.items() if name != "expression"])
    print(f"{'CPU time a step, ms':58} median   p95")
    cases = [("parameters", 0, False), ("parameters and modules", num_paths, False), ("1,000 firing", 0, True)]
    for name, num_modules, trouble in cases:
        records = make_records(make_index(num_paths, num_modules), num_steps, trouble)
        spent = milliseconds(catalogue, records, after=num_steps // 2)
        line = f"{len(catalogue)} rules, {num_paths:,} paths, {name}"
        print(f"{line:58} {statistics.median(spent):6.2f} {np.quantile(spent, 0.95):6.2f}")
    records = make_records(make_index(100, 100), num_steps, False)
    spent = milliseconds(load_rules("default"), records, after=num_steps // 2)
    print(f"{'preset default, 100 paths':58} {statistics.median(spent):6.2f} {np.quantile(spent, 0.95):6.2f}")


def noise(kind: str, num: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "gaussian":
        return rng.normal(size=num)
    if kind == "t4":
        return rng.standard_t(4, size=num)
    shocks, series = rng.normal(size=num) * math.sqrt(1 - 0.7**2), np.zeros(num)
    for i in range(1, num):
        series[i] = 0.7 * series[i - 1] + shocks[i]
    return series


def hits(rule: Exploding | LossSpike, values: np.ndarray, field: str) -> list[int]:
    """Return the steps at which a rule speaks."""
    index, state, found = make_index(1, 0), rule.init(), []
    for step, value in enumerate(values):
        findings, state = rule.judge(StepRecord(step=step, index=index, **{field: float(value)}), state)
        if len(findings):
            found.append(step)
    return found


def false_alarms(num: int) -> None:
    print(f"\n{f'false alarms in 10,000 of {num:,} clean steps':58} gauss     t4 AR(.7)")
    rows = [
        ("exploding (norm)", Exploding(), "global_norm"),
        ("loss_spike (loss, 3 of 10)", LossSpike(), "loss"),
        ("loss_spike with spikes=1", LossSpike(spikes=1), "loss"),
    ]
    for name, rule, field in rows:
        rates = []
        for kind in ("gaussian", "t4", "ar"):
            z = noise(kind, num)
            values = np.exp(0.2 * z) if field == "global_norm" else 2.2 + 0.04 * z
            rates.append(1e4 * len(hits(rule, values, field)) / num)
        print(f"{name:58} " + " ".join(f"{rate:6.2f}" for rate in rates))


def bloom(num: int) -> None:
    """The published steps of BLOOM-176B, behind 256 steps of noise around their first norm."""
    explodes, first = BLOOM_LOSS.index(max(BLOOM_LOSS)), []
    for seed in range(num):
        quiet = 0.242 * np.exp(0.2 * np.random.default_rng(seed).normal(size=256))
        found = [s - 256 for s in hits(Exploding(), np.array([*quiet, *BLOOM_NORM]), "global_norm")]
        first.append(found[0] if found else 99)
    early = sum(explodes - f >= 3 for f in first)
    print(
        f"\nBLOOM-176B: the norm is flagged three steps or more before the loss explodes in {early} of {num} baselines"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    quick = parser.parse_args().quick
    cost(10_000, 220 if quick else 500)
    false_alarms(5_000 if quick else 100_000)
    bloom(10 if quick else 60)


if __name__ == "__main__":
    main()
