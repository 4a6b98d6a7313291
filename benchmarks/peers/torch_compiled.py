"""A plain PyTorch loop without TorchRL: the whole rollout is one compiled function, the gradient with its GAE another.

What an experienced user would write by hand for one task: environments as functions of tensors, time-major rollouts, a
Bernoulli draw for two actions, one encoder pass for actor and critic, fused Adam. An episode that its step limit ends
is bootstrapped from its true last observation; those few rows are valued between the two compiled functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from plain_tasks import TASKS, Task
from protocol import (
    ACTIVATIONS,
    CLIP_EPSILON,
    CRITIC_COEFF,
    ENTROPY_COEFF,
    GAMMA,
    HIDDEN,
    LAMBDA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Order,
    Train,
    Trained,
    main,
    rollouts_in,
)
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import logsigmoid, softplus


class Network(nn.Module):
    """An encoder, and a layer on it in float32 for both the log-odds of action 1 and the state value.

    It is one layer, since the compiler turns products of width 1 into sums that recompute the encoder's last layer.

    Args:
        inputs: Size of the observation.
        activation: The nonlinearity after every layer.
        bf16: Whether the encoder runs under BF16 autocast.
    """

    def __init__(self, inputs: int, activation: type[nn.Module] = nn.Tanh, bf16: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((inputs, *HIDDEN), HIDDEN, strict=False):
            layers += [nn.Linear(before, after), activation()]
        self.encoder = nn.Sequential(*layers)
        self.heads = nn.Linear(HIDDEN[-1], 2)
        self.bf16 = bf16

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds and the value, each ``[...]``, of observations ``[..., S]``."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            features = self.encoder(observation)
        log_odds, value = self.heads(features.to(self.heads.weight.dtype)).unbind(-1)
        return log_odds, value


Policy = Callable[[Tensor], tuple[Tensor, Tensor]]
"""What a `Network` is to a loss."""


class Rollout(NamedTuple):
    """A rollout, time first: each ``[T, N]``, observations ``[T, N, S]``."""

    observation: Tensor
    action: Tensor
    """1.0 or 0.0."""
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_observation: Tensor
    """The true one, also where an episode ends."""
    last: Tensor
    """``[N, S]``: where the next rollout starts."""


def collect(
    network: Network, task: Task, state: Tensor, count: Tensor, draws: Tensor, starts: Tensor
) -> tuple[Rollout, Tensor]:
    """Step all environments as often as there are draws.

    Args:
        network: The policy.
        task: The dynamics.
        state: ``[N, S]``, which is what the policy observes.
        count: int64 ``[N]``, steps of the running episodes.
        draws: ``[T, N]``, uniform in [0, 1), one for each action.
        starts: ``[T, N, S]``, uniform in [0, 1), for the start states of new episodes.

    Returns:
        The rollout, and the steps of the episodes that run after it.
    """
    steps = []
    for time in range(draws.shape[0]):
        action = (draws[time] < network(state)[0].sigmoid()).to(state.dtype)
        following, reward, terminated = task.step(state, action)
        count = count + 1
        truncated = (count >= task.max_steps) & ~terminated
        done = terminated | truncated
        steps.append((state, action, reward, terminated, truncated, following))
        state = torch.where(done.unsqueeze(-1), task.start(starts[time]), following)
        count = count.masked_fill(done, 0)
    return Rollout(*(torch.stack(column) for column in zip(*steps, strict=True)), last=state), count


def advantages(value: Tensor, last_value: Tensor, reward: Tensor, done: Tensor) -> Tensor:
    """Generalised advantage estimates ``[T, N]``; the reward of a truncated step holds its discounted bootstrap."""
    following, advantage, estimates = last_value, torch.zeros_like(last_value), []
    for time in reversed(range(value.shape[0])):
        going_on = (~done[time]).to(value.dtype)
        delta = reward[time] + GAMMA * going_on * following - value[time]
        advantage = delta + GAMMA * LAMBDA * going_on * advantage
        following = value[time]
        estimates.append(advantage)
    return torch.stack(estimates[::-1])


def entropy_of(log_odds: Tensor) -> Tensor:
    """The entropy of a Bernoulli distribution, in nats."""
    return softplus(log_odds) - log_odds * log_odds.sigmoid()


def a2c_loss(network: Policy, rollout: Rollout, reward: Tensor) -> Tensor:
    """Policy gradient, value error and entropy bonus of a whole rollout.

    Args:
        network: What is trained.
        rollout: ``[T, N]``.
        reward: ``[T, N]``, with the bootstrap of truncated steps.
    """
    log_odds, value = network(rollout.observation)
    with torch.no_grad():
        last_value = network(rollout.last)[1]
        done = rollout.terminated | rollout.truncated
        advantage = advantages(value.detach(), last_value, reward, done)
        target = advantage + value.detach()
    log_prob = logsigmoid(torch.where(rollout.action > 0, log_odds, -log_odds))
    actor = -(log_prob * advantage).mean()
    critic = (target - value).square().mean()
    return actor + CRITIC_COEFF * critic - ENTROPY_COEFF * entropy_of(log_odds).mean()


def ppo_targets(network: Policy, rollout: Rollout, reward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under the collecting policy, advantages and value targets, each ``[T, N]``."""
    log_odds, value = network(rollout.observation)
    last_value = network(rollout.last)[1]
    advantage = advantages(value, last_value, reward, rollout.terminated | rollout.truncated)
    return logsigmoid(torch.where(rollout.action > 0, log_odds, -log_odds)), advantage, advantage + value


def ppo_loss(
    network: Policy, observation: Tensor, action: Tensor, old_log_prob: Tensor, advantage: Tensor, target: Tensor
) -> Tensor:
    """The clipped objective on a minibatch ``[B]``, with its advantages normalised."""
    log_odds, value = network(observation)
    ratio = (logsigmoid(torch.where(action > 0, log_odds, -log_odds)) - old_log_prob).exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    actor = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_EPSILON, 1 + CLIP_EPSILON) * advantage).mean()
    critic = (target - value).square().mean()
    return actor + CRITIC_COEFF * critic - ENTROPY_COEFF * entropy_of(log_odds).mean()


def gradients(
    loss: Callable[..., Tensor], network: Network, parameters: dict[str, Tensor], *batch: object
) -> dict[str, Tensor]:
    """The gradient of a loss by each parameter.

    Compiled, it is one graph. Split into a forward and a backward graph, the compiler would carry a mask of every ReLU
    from one to the other, which costs it more than all the rest.
    """

    def of(values: dict[str, Tensor]) -> Tensor:
        return loss(lambda observation: functional_call(network, values, (observation,)), *batch)

    return grad(of)(parameters)


def bootstrapped(network: Network, rollout: Rollout) -> Tensor:
    """Rewards ``[T, N]``, to which truncated steps add the discounted value of the state that they reached."""
    if not rollout.truncated.any():
        return rollout.reward
    value = network(rollout.next_observation[rollout.truncated])[1]
    return rollout.reward.masked_scatter(
        rollout.truncated, rollout.reward[rollout.truncated] + GAMMA * value
    )  # fmt: skip


def build(order: Order) -> Train:
    """The network, the first states, and the loop."""
    task = TASKS[order.task]
    network = Network(task.size, ACTIVATIONS[order.activation], order.precision == "bf16")
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    compiled_collect = torch.compile(collect, fullgraph=True, dynamic=False)
    learn = learner(network, order, optimizer)
    state = task.start(torch.rand(order.num_envs, task.size))
    count = torch.zeros(order.num_envs, dtype=torch.int64)

    def train(frames: int) -> Trained:
        nonlocal state, count
        rollouts, updates = rollouts_in(frames, order), 0
        for _ in range(rollouts):
            with torch.no_grad():
                draws = torch.rand(order.steps, order.num_envs)
                starts = torch.rand(order.steps, order.num_envs, task.size)
                rollout, count = compiled_collect(network, task, state, count, draws, starts)
                state = rollout.last
                reward = bootstrapped(network, rollout)
            updates += learn(rollout, reward)
        return Trained(rollouts * order.rollout, updates)

    return train


def learner(network: Network, order: Order, optimizer: torch.optim.Optimizer) -> Callable[[Rollout, Tensor], int]:
    """What learns from a rollout and its rewards, and returns the number of updates."""
    parameters = dict(network.named_parameters())
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    compiled_gradients = torch.compile(gradients, fullgraph=True, dynamic=False)

    def step(loss: Callable[..., Tensor], *batch: object) -> None:
        with torch.no_grad():
            for name, gradient in compiled_gradients(loss, network, values, *batch).items():
                parameters[name].grad = gradient
        nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        optimizer.step()

    if order.algo == "a2c":

        def learn_once(rollout: Rollout, reward: Tensor) -> int:
            step(a2c_loss, rollout, reward)
            return 1

        return learn_once

    compiled_targets = torch.compile(ppo_targets, fullgraph=True, dynamic=False)
    size = order.rollout // order.minibatches

    def learn(rollout: Rollout, reward: Tensor) -> int:
        with torch.no_grad():
            targets = compiled_targets(network, rollout, reward)
        columns = [column.flatten(0, 1) for column in (rollout.observation, rollout.action, *targets)]
        for _ in range(order.epochs):
            for rows in torch.randperm(order.rollout)[: size * order.minibatches].split(size):
                step(ppo_loss, *(column[rows] for column in columns))
        return order.epochs * order.minibatches

    return learn


if __name__ == "__main__":
    sys.exit(main(build, packages=("numpy",), precisions=("fp32", "bf16"), compiles=True))
