"""Parts that are not always used: a graph network, a mixture of experts, sparse embeddings, several tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches, digits, generator
from .street import Street, program


class GCN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width, bias=False), nn.Linear(width, 3, bias=False)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = F.relu(torch.sparse.mm(edges, self.first(nodes)))
        return torch.sparse.mm(edges, self.second(F.dropout(hidden, 0.2, self.training)))


@program()
def gnn(street: Street):
    """Three groups of nodes, full batch, sparse adjacency, a mask of labelled nodes."""
    draw = generator()
    groups = torch.arange(90) % 3
    linked = torch.rand(90, 90, generator=draw) < torch.where(groups[:, None] == groups, 0.2, 0.02)
    linked = linked | linked.T | torch.eye(90, dtype=torch.bool)
    weights = linked.float() / linked.sum(1).sqrt()[:, None] / linked.sum(0).sqrt()
    edges = weights.to_sparse_coo().coalesce()
    nodes = torch.randn(90, 8, generator=draw) + 0.5 * F.one_hot(groups, 8)
    known = torch.rand(90, generator=draw) < 0.3
    model = GCN()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
    with street.watch(model, optimizer) as watch:
        for _ in range(street.steps):
            scores = model(nodes, edges)
            loss = F.cross_entropy(scores[known], groups[known])
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=(nodes, edges, known), outputs=scores[known], targets=groups[known])
            street.note(loss)
    return model, optimizer


class MoE(nn.Module):
    """Each row goes to one expert of four; an expert without rows is not called."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.enter, self.gate = nn.Linear(64, width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(experts)]
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.enter(x)
        shares = self.gate(hidden).softmax(-1)
        share, chosen = shares.max(-1)
        mixed = torch.zeros_like(hidden)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero(as_tuple=True)[0]
            if len(rows):
                mixed.index_add_(0, rows, share[rows, None] * expert(hidden[rows]))
        load = F.one_hot(chosen, len(self.experts)).float().mean(0)
        return self.head(hidden + mixed), len(self.experts) * (load * shares.mean(0)).sum()


@program()
def moe_top1(street: Street):
    """Experts that see no row at some steps have no gradient at all there."""
    images, labels = digits()
    model = MoE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with street.watch(model, optimizer) as watch:
        for x, y in batches(images.flatten(1), labels, size=8, steps=street.steps):
            scores, balance = model(x)
            loss = F.cross_entropy(scores, y) + 0.01 * balance
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, optimizer


class Recommender(nn.Module):
    def __init__(self, users: int = 200, items: int = 100, width: int = 8) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width, sparse=True)
        self.items = nn.EmbeddingBag(items, width, mode="mean", sparse=True)
        self.mlp = nn.Sequential(nn.Linear(2 * width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, user: Tensor, bag: Tensor, offsets: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.users(user), self.items(bag, offsets)], -1)).squeeze(-1)


@program()
def sparse_embeddings(street: Street):
    """SparseAdam for the tables and Adam for the rest, both in one step; bags of unequal size."""
    draw = generator()
    taste = torch.randn(200, 4, generator=draw), torch.randn(100, 4, generator=draw)
    model = Recommender()
    tables = torch.optim.SparseAdam([*model.users.parameters(), *model.items.parameters()], lr=2e-2)
    rest = torch.optim.Adam(model.mlp.parameters(), lr=5e-3)
    with street.watch(model, [tables, rest]) as watch:
        for _ in range(street.steps):
            user = torch.randint(200, (32,), generator=draw)
            sizes = torch.randint(1, 4, (32,), generator=draw)
            bag = torch.randint(100, (int(sizes.sum()),), generator=draw)
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]])
            liked = torch.stack([taste[1][part].mean(0) for part in bag.split(sizes.tolist())])
            target = ((taste[0][user] * liked).sum(-1) > 0).float()
            loss = F.binary_cross_entropy_with_logits(model(user, bag, offsets), target)
            for optimizer in (tables, rest):
                optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            street.note(loss)
    return model, tables, rest


class ManyHeads(nn.Module):
    """Heads in a dict, their uncertainties in another, a parameter and a part that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 32), nn.SELU(), nn.AlphaDropout(0.05))
        self.heads = nn.ModuleDict({"digit": nn.Linear(32, 10), "parity": nn.Linear(32, 1)})
        self.uncertainty = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.heads})
        self.register_parameter("unused", None)
        self.extra = None

    def forward(self, x: Tensor, name: str) -> Tensor:
        return self.heads[name](self.trunk(x))


@program()
def multi_task(street: Street):
    """Two heads, of which one is trained at every third step only; learnt weights of the losses."""
    images, labels = digits()
    model = ManyHeads()
    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3)
    with street.watch(model, optimizer) as watch:
        for i, (x, y) in enumerate(batches(images.flatten(1), labels, size=32, steps=street.steps)):
            losses = {"digit": F.cross_entropy(model(x, "digit"), y)}
            if i % 3 == 0:
                parity = model(x, name="parity").squeeze(1)
                losses["parity"] = F.binary_cross_entropy_with_logits(parity, (y % 2).float())
            weight = model.uncertainty
            loss = sum(torch.exp(-weight[name]) * each + weight[name] for name, each in losses.items())
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss, batch=(x, {"digit": y}))
            street.note(*losses.values())
    return model, optimizer
