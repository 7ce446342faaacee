"""Train faulty programs under a watch, and show what its first incident says: the cause, and how many others?

```
python benchmarks/advice.py                  thirty programs, seed 0
python benchmarks/advice.py --only loop_     those whose names begin so
```

The first incident is the one that leads in the order of causes. Its text is its rule's name, its message and its
advice. Each cause has an expression that finds it in a text; a text is to the point where the program's own cause is
found in it, and at most two others.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from fault_programs import PROGRAMS, run

from gradwatch import Watch
from gradwatch.records import SEVERITIES, Incident, rank_incidents

CAUSES = {
    "learning rate too high": r"learning rate[^.]*(too high|at the edge)|lower the (learning )?rate",
    "learning rate too low": r"learning rate[^.]*too low|raise the learning rate",
    "inputs not normalised": r"normalise (the )?inputs|subtract the mean|inputs have mean|largest input",
    "targets not scaled": r"scale (the )?targets|targets[^.]*scale",
    "last activation": r"last activation|last module is|outputs? (end|begin)s? at",
    "labels": r"labels[^.]*(shuffled|match|lost)|targets of the batch are alike",
    "shapes": r"same shape|different shapes|broadcast",
    "loss on logits": r"logits, not|takes logits|softmax is (applied twice|taken over)|dim=-1",
    "sum for mean": r"summed|instead of summing",
    "sign": r"sign",
    "softmax over one unit": r"softmax over one unit",
    "initialisation": r"initialis|start(s|ing)? too (small|large)|constants|all rows",
    "saturation": r"saturat|sigmoid, tanh",
    "regularisation": r"weight decay[^.]*too|regularis",
    "gradients kept": r"zero_grad|not reset",
    "optimizer's parameters": r"optimizer does not hold|in no optimizer|frozen|requires_grad",
    "cut graph": r"detach|no_grad|cuts",
    "bad numbers": r"log (or sqrt )?of|NaN|division by",
}

FAULTS = {
    "so59325381_labels_div255": "labels",
    "so45442843_softmax1_mae": "inputs not normalised",
    "so33969059_reg_softmax": "last activation",
    "ips15_linreg_diverge": "learning rate too high",
    "so58609115_multilabel_softmax": "loss on logits",
    "so31880720_softmax1_bce": "softmax over one unit",
    "so34311586_softmax1": "softmax over one unit",
    "so48251943_reg_relu_out": "last activation",
    "so48221692_reg_sigmoid_out": "last activation",
    "so48385830_linear_lr3": "learning rate too high",
    "so55328966_unnorm_sigmoid_cce": "inputs not normalised",
    "so52800582_x4_unscaled": "inputs not normalised",
    "so48934338_lr0.1": "learning rate too high",
    "at_blob_lr1_adagradlike": "learning rate too high",
    "tdc_img_softmax_hidden": "saturation",
    "tdc_img_const_init": "initialisation",
    "tdc_img_over_reg": "regularisation",
    "tdc_img_miss_norm": "inputs not normalised",
    "tdc_img_double_softmax": "loss on logits",
    "tdc_img_flip_sign": "sign",
    "tdc_img_softmax_axis0": "loss on logits",
    "tdc_img_low_lr": "learning rate too low",
    "tdc_img_high_lr": "learning rate too high",
    "tdc_img_wrong_labels": "labels",
    "tdc_img_sum_reduction": "sum for mean",
    "tdc_regr_low_lr": "learning rate too low",
    "tdc_regr_flip_sign": "sign",
    "loop_missing_zero_grad": "gradients kept",
    "loop_frozen_params": "optimizer's parameters",
    "loop_stale_optimizer": "optimizer's parameters",
}
"""Program -> what is wrong with it."""

MOST_OTHERS = 2


def text_of(incident: Incident) -> str:
    return f"{incident.rule.replace('_', ' ')}: {incident.message}. {incident.advice}"


def held(text: str) -> set[str]:
    """Return the causes that a text holds."""
    return {cause for cause, pattern in CAUSES.items() if re.search(pattern, text, re.IGNORECASE)}


def first_text(name: str) -> str:
    """Return what leads of the incidents of one training; "" where there is none."""
    torch.set_num_threads(1)
    kept: list[Watch] = []

    def watch(*given: object) -> Watch:
        kept.append(Watch(*given))  # type: ignore[arg-type]
        return kept[-1]

    run(PROGRAMS[name], 0, faulty=True, make_watch=watch)
    loud = [i for w in kept for i in w.incidents if i.severity != SEVERITIES[0]]
    return text_of(rank_incidents(loud)[0].incident) if loud else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show what first incidents say, and whether they hold the cause.")
    parser.add_argument("--only", nargs="+", default=("",), metavar="PREFIX", help="programs whose names begin so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; all cores unless given")
    options = parser.parse_args(arguments)
    names = [name for name in FAULTS if name.startswith(tuple(options.only))]
    if not names:
        sys.exit(f"no program begins so. Known: {', '.join(FAULTS)}")
    found = holds = to_the_point = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for name, text in zip(names, pool.map(first_text, names), strict=True):
            causes, own = held(text), FAULTS[name]
            others = sorted(causes - {own})
            good = own in causes and len(others) <= MOST_OTHERS
            found, holds, to_the_point = found + bool(text), holds + (own in causes), to_the_point + good
            verdict = "to the point" if good else "MISSED" if not text else "too much" if own in causes else "NOT HELD"
            print(f"{name}: {own}: {verdict}{'; also ' + ', '.join(others) if others else ''}")
            print(textwrap.indent(textwrap.fill(text or "(no incident)", 110), "    "), flush=True)
    print(f"\n{len(names)} faults: {found} found, {holds} first texts hold the cause, {to_the_point} are to the point")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
