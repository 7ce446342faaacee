"""Whether a skipped step leaves everything as it was: every optimizer, 20 steps, a NaN in the eighth batch.

    pip install "gradwatch[optimizers]"      # the libraries' optimizers; those that are missing are left out
    python benchmarks/vetoes.py              # about three minutes
    python benchmarks/vetoes.py -k Adam
    python benchmarks/vetoes.py --cost       # and what a vetoed step of a GPT costs, beside a plain one

Weights, and all that the optimizer remembers, are compared bit for bit with a run that never saw that batch.

    clean     the optimizer moved nothing without gradients, as checksums show
    undone    it moved something, which was put back
    told      something could not be put back: the incident says what, and why
    WRONG     none of these: a fault
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from _models import GPT
from _optimizers import Case, cases
from torch import Tensor, nn

from gradwatch import Watch
from gradwatch.rules import NonFinite
from gradwatch.treatments import SkipStep
from gradwatch.watch import Inventory

STEPS, BAD = 20, 7


class Outcome(NamedTuple):
    """What came of one trial: one of the four words above, or "-" where the bare loop does not run; and why."""

    word: str
    why: str = ""


def trial(case: Case, device: torch.device, *, bad: int = BAD, **options: Any) -> Outcome:
    """Train twice, with a bad batch that is skipped and without that batch at all; compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = _bits(*_train(case, device, None, [i for i in range(STEPS) if i != bad]))
        except Exception as error:
            return Outcome("-", f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}")
        options = {"rules": [NonFinite(then=SkipStep())], "on_error": "raise", **options}
        with _quiet():
            model, optimizer, watch = _train(case, device, options, range(STEPS), bad=bad)
    own = {i.rule: i for i in watch.incidents if i.rule.startswith("veto_")}
    if "veto_unproven" in own:
        return Outcome("told", own["veto_unproven"].message)
    found = _bits(model, optimizer, watch)
    unlike = [name for (name, a), (_, b) in zip(found, expected, strict=False) if a != b]
    if unlike or len(found) != len(expected) or sum(r.skipped for r in watch.history) != 1:
        return Outcome("WRONG", f"differ: {', '.join(unlike[:4])}; {len(found)} and {len(expected)} entries")
    return Outcome("undone", own["veto_undone"].message) if own else Outcome("clean")


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _train(case: Case, device: torch.device, options: Any, batches: Any, bad: int = -1) -> Any:
    torch.manual_seed(0)
    model = (nn.Embedding(30, 6, sparse=True) if case.embedding else _net()).to(device)
    optimizer = case.make(model)
    data = torch.Generator().manual_seed(1)
    inputs = [
        torch.randint(0, 30, (16,), generator=data) if case.embedding else torch.randn(16, 8, generator=data)
        for _ in range(STEPS)
    ]
    watch = None if options is None else Watch(model, optimizer, **options)
    for i in batches:
        _step(case.how, model, optimizer, watch, inputs[i].to(device), math.nan if i == bad else 1.0)
    if watch is not None:
        watch.close()
    return model, optimizer, watch


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def _step(how: str, model: nn.Module, optimizer: Any, watch: Watch | None, x: Tensor, factor: float) -> None:
    """Take one step as the loops do that are written for such an optimizer."""

    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 0.5).square().mean() * factor
        loss.backward()
        return loss

    def measured() -> Tensor:
        loss = backward()
        if watch is not None:
            watch.after_backward(loss)
        return loss

    if how == "step" and watch is not None:
        watch.step(loss=backward())
        return
    if how == "step":
        backward()
        optimizer.step()
    elif how == "closure":
        optimizer.step(measured)
    elif how == "second closure":
        measured()
        optimizer.step(backward)
    else:
        measured()
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step()
    if watch is not None:
        watch.after_step()


def _bits(model: nn.Module, optimizer: Any, watch: Watch | None) -> list[tuple[str, Any]]:
    """Return all that a run has come to: weights, and what the optimizer holds, by name."""
    paths = {id(p): path for path, p in model.named_parameters()}
    held = Inventory([optimizer], lambda tensor: paths.get(id(tensor)))
    return held.contents()


def table(device: torch.device, word: str) -> int:
    """Print the table; return how many trials went wrong."""
    counts: dict[str, int] = {}
    for case in cases(device):
        if word.lower() not in case.name.lower():
            continue
        outcome = trial(case, device)
        counts[outcome.word] = counts.get(outcome.word, 0) + 1
        print(f"| {case.name} | {outcome.word} | {outcome.why[:160]} |", flush=True)
    print("\n" + ", ".join(f"{n} {w}" for w, n in sorted(counts.items())))
    return counts.get("WRONG", 0)


def cost(rounds: int) -> None:
    """Print what a vetoed step of the GPT costs beside a plain one, watched alike; CPU time, medians over rounds."""
    torch.manual_seed(0)
    model = GPT()
    codes = torch.randint(0, 1500, (8, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ratios = []
    with Watch(
        model,
        optimizer,
        rules=[NonFinite(then=SkipStep(None))],
        activations_every=None,
        histograms_every=None,
        updates_every=None,
    ) as watch:
        for _ in range(rounds + 2):
            times = []
            for factor in (1.0, math.nan):
                optimizer.zero_grad()
                begun = time.process_time()
                loss = model.loss(codes) * factor
                loss.backward()
                watch.step(loss=loss)
                times.append(time.process_time() - begun)
            ratios.append(times[1] / times[0])
    print(f"a vetoed step of the GPT (AdamW): {statistics.median(ratios[2:]):.2f} of a plain one")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="only optimizers with this word in their name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    wrong = table(torch.device(args.device), args.k)
    if args.cost:
        cost(args.rounds)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
