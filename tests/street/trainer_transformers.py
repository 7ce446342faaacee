"""Hugging Face: the Trainer on a causal language model, with activation checkpointing, with LoRA; Accelerate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .data import digits, generator, text
from .street import Street, program


class Letters(Dataset):
    """Pieces of the text, as a data collator takes them."""

    def __init__(self, length: int = 24) -> None:
        data, _ = text()
        self.rows = data[: len(data) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Noted(TrainerCallback):
    """Hands the state of the last loss to the street."""

    def __init__(self, street: Street) -> None:
        self.street = street

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        # The Trainer keeps its loss to itself until it logs: a weight stands in for it, and losses come with the logs.
        self.street.note(next(p for p in model.parameters() if p.requires_grad).detach().abs().sum())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.street.losses.append(repr({k: v for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate")}))


def fit(street: Street, model: nn.Module, **options):
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=street.steps,
        per_device_train_batch_size=4,
        learning_rate=options.pop("learning_rate", 3e-3),
        warmup_steps=5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Letters(), callbacks=[*street.transformers(), Noted(street)])
    trainer.train()
    return model, trainer.optimizer.optimizer


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=text()[1], n_positions=32, n_embd=32, n_layer=2, n_head=4))


@program(steps=12)
def hf_causal_lm(street: Street):
    """GPT-2 in little, accumulation of two, bf16 autocast, label smoothing off, the Trainer's clip."""
    return fit(street, gpt2(), gradient_accumulation_steps=2, bf16=True)


@program(steps=12)
def hf_checkpointing(street: Street):
    """LLaMA in little with `gradient_checkpointing=True`."""
    config = LlamaConfig(
        vocab_size=text()[1],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return fit(street, LlamaForCausalLM(config), gradient_checkpointing=True)


@program(steps=12)
def lora(street: Street):
    """Low-rank adapters by peft around frozen attention; B begins at zero."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "c_proj"], lora_dropout=0.05, fan_in_fan_out=True)
    return fit(street, get_peft_model(gpt2(), config), learning_rate=1e-2)


@program(steps=40)
def accelerate(street: Street):
    """A prepared model, optimizer, loader and schedule; `accumulate`, and a clip where gradients are synchronised."""
    images, labels = digits()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True, generator=generator(), drop_last=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    done = 0
    with street.watch(prepared, optimizer) as watch:
        while done < street.steps:
            for x, y in loader:
                with accelerator.accumulate(prepared):
                    loss = F.cross_entropy(prepared(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prepared.parameters(), 2.0)
                    watch.step(loss=loss, batch=(x, y))
                    schedule.step()
                    optimizer.zero_grad()
                done += accelerator.sync_gradients
                street.note(loss)
                if done == street.steps:
                    break
    return model, optimizer.optimizer
