"""Small trainings, each run watched and then bare in this process, which is a fresh one: `python -m ... NAME ARM`.

Watched comes first: what gradwatch does only once in a process then happens in it.
"""

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from gradwatch import Watch

EVERYTHING = {
    "activations_every": 1,
    "updates_every": 1,
    "histograms_every": 1,
    "autopsy": True,
    "local_norms": True,
    "conflicts_every": 1,
}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": EVERYTHING,
    "full": {**EVERYTHING, "backward": "full"},
}


class Block(nn.Module):
    """A Linear on sequences, whose output is a view, changed in place; dropout draws."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.act, self.drop = nn.Linear(width, 16), nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.down, self.norm = nn.Linear(16, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.drop(self.act(self.up(x)))))


class Net(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.run = nn.Embedding(20, 8), run
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.run(self, self.embed(ids)))


def each(model: Any, x: Tensor, **how: Any) -> Tensor:
    for block in model.blocks:
        x = checkpoint(block, x, **how) if how else block(x)
    return x


def nested(model: Any, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(model.blocks[1], model.blocks[0](x), use_reentrant=False)

    return checkpoint(inner, model.blocks[2](x), use_reentrant=False)


def late(model: Any, x: Tensor) -> Tensor:
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return each(model, x, use_reentrant=False)


RUNS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": each,
    "non-reentrant": lambda m, x: each(m, x, use_reentrant=False),
    "reentrant": lambda m, x: each(m, x, use_reentrant=True),
    "nested": nested,
    "no early stop": late,
    "sequential": lambda m, x: checkpoint_sequential(list(m.blocks), 2, x, use_reentrant=False),
    "no random state": lambda m, x: each(m, x, use_reentrant=False, preserve_rng_state=False),
}


def plain(run: str, options: dict[str, Any] | None, *, split: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Net(RUNS[run])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch = None if options is None else Watch(model, optimizer, on_error="raise", **options)
    for number in range(8):
        ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(number))
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        (loss / 2).backward()
        if watch is not None and number % 2 == 0:
            watch.micro_batch(loss)
        elif watch is not None:
            watch.step(loss=loss)
        elif number % 2:
            optimizer.step()
        if number % 2:
            optimizer.zero_grad()
    if watch is not None:
        watch.close()
        assert len(watch.history) == 4
    return model


def hugging_face(kind: str, options: dict[str, Any] | None) -> nn.Module:
    import tempfile

    import transformers as hf

    from gradwatch.callbacks.transformers import GradWatchCallback

    small = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, **small))
    elif kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **small))
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **small))
    rows = [(torch.arange(12) + i) % 47 + 3 for i in range(32)]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    options = None if options is None else {k: v for k, v in options.items() if k not in ("autopsy", "conflicts_every")}
    with tempfile.TemporaryDirectory() as folder:
        args = hf.TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        callbacks = [] if options is None else [GradWatchCallback(on_error="raise", verbose=False, **options)]
        hf.Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
        assert options is None or len(callbacks[0].history) == 3
    return model


def lightning(kind: str, options: dict[str, Any] | None) -> nn.Module:
    import lightning.pytorch as pl

    from gradwatch.callbacks import GradWatch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Net(RUNS["non-reentrant"]), kind == "automatic"

        def training_step(self, ids: Tensor, number: int) -> Tensor:
            loss = F.cross_entropy(self.net(ids).flatten(0, 1), ids.flatten())
            if not self.automatic_optimization:
                optimizer: Any = self.optimizers()
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    torch.manual_seed(0)
    module = Module()
    data: Any = [torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [] if options is None else [GradWatch(on_error="raise", verbose=False, run_dir=False, **options)]
    pl.Trainer(max_epochs=1, enable_checkpointing=False, callbacks=callbacks, **quiet).fit(
        module, torch.utils.data.DataLoader(data, batch_size=None)
    )
    assert options is None or len(callbacks[0].history) == 6
    return module


def fabric(kind: str, options: dict[str, Any] | None) -> nn.Module:
    from lightning.fabric import Fabric

    from gradwatch.callbacks.fabric import GradWatch

    options = None if options is None else {k: v for k, v in options.items() if k != "conflicts_every"}
    callbacks = [] if options is None else [GradWatch(on_error="raise", verbose=False, **options)]
    runner = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
    torch.manual_seed(0)
    model = Net(RUNS[kind])
    wrapped, optimizer = runner.setup(model, torch.optim.AdamW(model.parameters(), 1e-2))
    for number in range(4):
        ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(number))
        runner.backward(F.cross_entropy(wrapped(ids).flatten(0, 1), ids.flatten()))
        optimizer.step()
        optimizer.zero_grad()
    runner.call("on_train_end")
    assert options is None or len(callbacks[0].history) == 4
    return model


PROGRAMS: dict[str, Callable[..., nn.Module]] = {
    **{f"plain, {name}": lambda options, name=name: plain(name, options) for name in RUNS},
    **{f"hf, {name}": lambda options, name=name: hugging_face(name, options) for name in ("gpt2", "llama", "t5")},
    **{f"lightning, {name}": lambda options, name=name: lightning(name, options) for name in ("automatic", "manual")},
    "fabric": lambda options: fabric("non-reentrant", options),
}


def seen(program: Callable[..., nn.Module], options: dict[str, Any] | None, *, saves: bool) -> dict[str, Any]:
    """Return what a run gave, and what autograd saved in it."""
    saved: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append([list(tensor.shape), str(tensor.dtype)])
        return tensor

    counter = FlopCounterMode(display=False)
    with saved_tensors_hooks(pack, lambda tensor: tensor) if saves else nullcontext(), counter:
        model = program(options)
    weights = [p.detach().double().sum().item() for p in model.parameters()]
    return {
        "weights": weights,
        "bits": [p.detach().numpy().tobytes().hex()[:64] for p in model.parameters()],
        "random": torch.get_rng_state().sum().item(),
        "saved": saved,
        "flops": counter.get_total_flops(),
    }


def main(name: str, arm: str) -> None:
    warnings.simplefilter("ignore")
    watched = seen(PROGRAMS[name], ARMS[arm], saves=True)
    bare = seen(PROGRAMS[name], None, saves=True)
    print(json.dumps({key: (watched[key], bare[key]) for key in bare if watched[key] != bare[key]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
