"""What watching costs in a plain loop: bare, floor and watched steps of one model, taken in turns.

    python benchmarks/step.py

Every round takes one step of each kind, so that a shared machine's noise falls on all alike; CPU time, medians of
in-round ratios. These are the steps between the sampled ones; `overhead.py` pays for those too.
"""

from __future__ import annotations

import statistics
import time

import torch
from _models import GPT

from gradwatch import Watch


def main(rounds: int = 14, start: int = 51) -> dict[str, float]:
    """Print and return the medians of the ratios to a bare step."""
    torch.set_num_threads(1)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    watch = Watch(model, optimizer)
    watch.load_state_dict({**watch.state_dict(), "step": start})
    seconds: dict[str, list[float]] = {"bare": [], "floor": [], "gradwatch": []}
    for _ in range(rounds):
        for kind, times in seconds.items():
            begun = time.process_time()
            loss = model.loss(torch.randint(0, 1500, (1, 129)))
            loss.backward()
            if kind == "floor":
                torch.stack(torch._foreach_norm([p.grad for p in model.parameters()])).tolist()
            if kind == "gradwatch":
                watch.step(loss=loss)
            else:
                optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - begun)
    watch.close()
    bare = seconds["bare"]
    ratios = {k: statistics.median(t / b for t, b in zip(v, bare, strict=True)) for k, v in seconds.items()}
    print(f"bare step {statistics.median(bare) * 1e3:.0f} ms")
    for kind, ratio in ratios.items():
        print(f"{kind:<10} {ratio:.3f}")
    return ratios


if __name__ == "__main__":
    main()
