"""Which program stands in which file: known without importing any of their libraries."""

from __future__ import annotations

__all__ = ["STREET"]

_FILES = {
    "vision": ("cnn", "vit", "frozen_backbone", "linear_probe", "unet_amp"),
    "sequence": ("lstm_packed", "gpt", "seq2seq", "ctc"),
    "generative": ("vae", "ddpm", "gan", "wgan_gp", "flow"),
    "rl": ("reinforce", "ppo", "dqn"),
    "representation": ("contrastive", "distillation", "byol"),
    "nested": ("maml", "pinn", "deq", "vmap_grad"),
    "sparse": ("gnn", "moe_top1", "sparse_embeddings", "multi_task"),
    "wrapped": ("weight_and_spectral_norm", "qat", "lbfgs", "swa", "onecycle_accumulated"),
    "recomputed": ("checkpoint_reentrant", "checkpoint_not_reentrant", "compiled"),
    "odd_modules": (
        "many_outputs",
        "in_place",
        "recursive_and_shared",
        "custom_functions",
        "complex_weights",
        "nested_tensors",
        "parameter_lists",
        "scripted",
        "data_parallel",
        "users_hooks",
    ),
    "odd_loops": (
        "optimizer_for_each_layer",
        "gradient_penalty",
        "sharpness_aware",
        "steps_by_halves",
        "frozen_by_turns",
        "saved_and_resumed",
        "ensemble",
        "optimizer_of_ones_own",
        "step_in_backward",
        "watches_in_a_row",
    ),
    "odd_modes": (
        "anomaly_detected",
        "double_by_default",
        "counted_operations",
        "stepped_under_no_grad",
        "loader_with_workers",
        "wayward_model",
    ),
    "trainer_lightning": ("lightning_automatic", "lightning_manual", "fabric"),
    "trainer_transformers": ("hf_causal_lm", "hf_checkpointing", "lora", "accelerate"),
}
STREET = {name: file for file, names in _FILES.items() for name in names}
