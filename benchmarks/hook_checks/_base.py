"""What the checks share: how one is noted down, and small models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import nn

FEATURES: list[tuple[str, str, object]] = []
BEHAVIOURS: list[tuple[str, str, object]] = []


def feature(source: str, name: str):
    """Note a feature that a description of a hook system names."""
    return lambda check: FEATURES.append((source, name, check)) or check


def behaviour(peer: str, name: str):
    """Note a behaviour that a peer's tests or pages ask for."""
    return lambda check: BEHAVIOURS.append((peer, name, check)) or check


class Missing(Exception):
    """What a check raises where there is no way to write it: the text is the reason."""


def raises(kind, fn, *args, **kwargs):
    """Return the error of this kind that a call raises; anything else fails the check."""
    try:
        fn(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"no {getattr(kind, '__name__', kind)} was raised")


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.ReLU(inplace=True), nn.Linear(16, width))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net()


def x():
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


def mlp():
    torch.manual_seed(0)
    return Mlp()


def row():
    return torch.linspace(-1, 1, 12).reshape(3, 4)


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 4),
    )


def image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def words():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def ids(n=6, batch=1):
    return torch.arange(n * batch).reshape(batch, n) % 50


def gpt2(attention="eager", **settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=32,
        vocab_size=50,
        n_positions=32,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
        **settings,
    )
    return GPT2LMHeadModel(config).eval()


def llama(attention="eager"):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def bert(attention="eager"):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    return BertModel(config).eval()


def by_hand(model, path, run, change=None, *, input=False):  # noqa: A002
    """Return (output, what was at a module) of a run with a hook written by hand; `change` replaces it."""
    module, seen = model.get_submodule(path), []

    def hook(module, args, output=None):
        tree = args if input else output
        tensor = tree[0] if isinstance(tree, (tuple, list)) else tree
        seen.append(tensor.detach().clone())
        if change is None:
            return None
        new = change(tensor)
        return (new, *tree[1:]) if isinstance(tree, tuple) else new

    register = module.register_forward_pre_hook if input else module.register_forward_hook
    handle = register(hook)
    try:
        return run(), seen[0]
    finally:
        handle.remove()


def grads(model, loss):
    """Return the parameters' gradients of a loss, by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
