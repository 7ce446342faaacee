"""Reinforcement learning: REINFORCE, PPO, DQN with a target network, on toys that can be solved."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from .street import Street, program


class Corridor:
    """Walk right to the end of a corridor of seven places; each step costs."""

    def reset(self) -> Tensor:
        self.place, self.time = 0, 0
        return self._seen()

    def step(self, action: int) -> tuple[Tensor, float, bool]:
        self.place = max(0, self.place + (1 if action == 1 else -1))
        self.time += 1
        done = self.place == 6 or self.time == 30
        return self._seen(), 1.0 if self.place == 6 else -0.05, done

    def _seen(self) -> Tensor:
        return F.one_hot(torch.tensor(self.place), 7).float()


@program()
def reinforce(street: Street):
    """One episode a step; log-probabilities kept in a list on the module; standardised returns; a `del` after."""
    policy = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    policy.saved_log_probs = []
    world, eps = Corridor(), float(np.finfo(np.float32).eps)
    with street.watch(policy, optimizer) as watch:
        for _ in range(street.steps):
            seen, rewards, done = world.reset(), [], False
            while not done:
                choice = Categorical(logits=policy(seen[None]))
                action = choice.sample()
                policy.saved_log_probs.append(choice.log_prob(action))
                seen, reward, done = world.step(int(action))
                rewards.append(reward)
            returns: deque[float] = deque()
            for reward in reversed(rewards):
                returns.appendleft(reward + 0.98 * (returns[0] if returns else 0.0))
            target = torch.tensor(returns)
            target = (target - target.mean()) / (target.std() + eps)
            loss = torch.cat([-p * r for p, r in zip(policy.saved_log_probs, target, strict=True)]).sum()
            optimizer.zero_grad()
            loss.backward()
            watch.step(loss=loss)
            del policy.saved_log_probs[:]
            street.note(loss)
    return policy, optimizer


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        self.log_std = nn.Parameter(torch.zeros(1))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        nn.init.orthogonal_(self.actor[2].weight, 0.01)

    def forward(self, seen: Tensor) -> tuple[Normal, Tensor]:
        return Normal(self.actor(seen), self.log_std.exp()), self.critic(seen).squeeze(-1)


@dataclass
class Rollout:
    seen: Tensor
    actions: Tensor
    log_probs: Tensor
    returns: Tensor
    advantages: Tensor


def roll(model: ActorCritic, length: int = 16, worlds: int = 8) -> Rollout:
    """Push a point towards the origin; its generalised advantages."""
    seen = torch.randn(worlds, 2)
    rows: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for _ in range(length):
            choice, value = model(seen)
            action = choice.sample()
            after = seen + 0.1 * torch.stack([seen[:, 1], action.squeeze(-1).clamp(-2, 2)], -1)
            rows.append((seen, action, choice.log_prob(action).sum(-1), -after.square().sum(-1), value))
            seen = after
        value, advantage, advantages = model(seen)[1], torch.zeros(worlds), []
        for _, _, _, reward, here in reversed(rows):
            advantage = reward + 0.9 * value - here + 0.9 * 0.95 * advantage
            advantages.append(advantage)
            value = here
    states, actions, log_probs, _, values = (torch.cat(column) for column in zip(*rows, strict=True))
    gained = torch.cat(advantages[::-1])
    return Rollout(states, actions, log_probs, gained + values, gained)


@program(steps=20, long=80)
def ppo(street: Street):
    """Two epochs of two minibatches for each rollout; clipped surrogate, clip, learning rate annealed by hand."""
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5)
    with street.watch(model, optimizer) as watch:
        for i in range(street.steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / street.steps)
            data = roll(model)
            for rows in (part for _ in range(2) for part in torch.randperm(len(data.seen)).chunk(2)):
                choice, value = model(data.seen[rows])
                ratio = (choice.log_prob(data.actions[rows]).sum(-1) - data.log_probs[rows]).exp()
                gained = data.advantages[rows]
                gained = (gained - gained.mean()) / (gained.std() + 1e-8)
                policy_loss = -torch.min(ratio * gained, ratio.clamp(0.8, 1.2) * gained).mean()
                value_loss = 0.5 * (value - data.returns[rows]).square().mean()
                loss = policy_loss + 0.5 * value_loss - 0.01 * choice.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                watch.step(loss=loss, batch=data)
            street.note(loss)
    return model, optimizer


class QNet(nn.Module):
    """Dueling heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(7, 32), nn.ReLU())
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, 2)

    def forward(self, seen: Tensor) -> Tensor:
        hidden = self.trunk(seen)
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)


@program(steps=55)
def dqn(street: Street):
    """A replay memory of tuples, epsilon greedy, Huber loss, gradients clamped by value, a soft target network."""
    net, target = QNet(), QNet()
    target.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, amsgrad=True)
    memory: deque[tuple[Tensor, int, Tensor, float, bool]] = deque(maxlen=1000)
    world = Corridor()
    seen, dice = world.reset(), random.Random(0)

    def play(greedy: float) -> None:
        nonlocal seen
        with torch.no_grad():
            action = int(net(seen[None]).argmax()) if dice.random() < greedy else dice.randrange(2)
        after, reward, done = world.step(action)
        memory.append((seen, action, after, reward, done))
        seen = world.reset() if done else after

    with street.watch(net, optimizer) as watch:
        for _ in range(64):
            play(0.0)
        for i in range(street.steps):
            for _ in range(4):
                play(min(0.9, i / 100))
            states, actions, afters, rewards, dones = zip(*random.sample(memory, 32), strict=True)
            taken = net(torch.stack(states)).gather(1, torch.tensor(actions)[:, None]).squeeze(1)
            with torch.no_grad():
                best = target(torch.stack(afters)).max(1).values * (1 - torch.tensor(dones).float())
            loss = F.smooth_l1_loss(taken, torch.tensor(rewards) + 0.95 * best)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(net.parameters(), 100)
            watch.step(loss=loss)
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), net.parameters(), strict=True):
                    slow.mul_(0.99).add_(fast, alpha=0.01)
            street.note(loss)
    return net, target, optimizer
