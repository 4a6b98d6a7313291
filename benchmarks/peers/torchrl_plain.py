"""Plain TorchRL, as its own examples are written: Collector, GAE or TD(0), A2CLoss or ClipPPOLoss, Adam, all eager.

The environments are this package's, native where it has one. `ActorValueOperator` shares the encoder; TorchRL's losses
compute it twice, once for the actor and once for the critic. ``--algo replay`` is an actor-critic on a replay buffer:
Collector, `TensorDictReplayBuffer` on a `LazyTensorStorage`, A2CLoss with one-step targets on 64 transitions.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
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
    NATIVE_IDS,
    REPLAY_BATCH,
    REPLAY_SIZE,
    UPDATES_PER_COLLECTION,
    Order,
    Train,
    Trained,
    main,
    rollouts_in,
)

Learn = Callable[[Any], int]
"""Learns from a rollout ``[N, T]`` and returns the number of updates."""


def build(order: Order) -> Train:
    """The collector and what learns from it."""
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    from torchrl.collectors import Collector

    from fp8rl_torchrl.envs import make

    env = make(NATIVE_IDS[order.task], num_envs=order.num_envs, seed=order.seed)
    model = shared_model(env, order)
    collector = Collector(
        env,
        model.get_policy_operator(),
        frames_per_batch=order.rollout,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    rollouts = iter(collector)
    learn = {"a2c": a2c, "ppo": ppo, "replay": replay}[order.algo](model, order)

    def train(frames: int) -> Trained:
        count = rollouts_in(frames, order)
        return Trained(count * order.rollout, sum(learn(next(rollouts)) for _ in range(count)))

    return train


def shared_model(env: Any, order: Order) -> Any:
    """Encoder, categorical policy and state value, as an `ActorValueOperator`."""
    from tensordict.nn import TensorDictModule
    from torch.distributions import Categorical
    from torchrl.modules import MLP, ActorValueOperator, ProbabilisticActor, ValueOperator

    size = env.observation_spec["observation"].shape[-1]
    activation = ACTIVATIONS[order.activation]
    encoder = torch.nn.Sequential(
        MLP(size, HIDDEN[-1], num_cells=list(HIDDEN[:-1]), activation_class=activation), activation()
    )
    policy = ProbabilisticActor(
        TensorDictModule(torch.nn.Linear(HIDDEN[-1], env.action_spec.space.n), ["hidden"], ["logits"]),
        in_keys=["logits"],
        spec=env.action_spec,
        distribution_class=Categorical,
        return_log_prob=order.algo == "ppo",
    )
    return ActorValueOperator(
        TensorDictModule(encoder, ["observation"], ["hidden"]),
        policy,
        ValueOperator(torch.nn.Linear(HIDDEN[-1], 1), in_keys=["hidden"]),
    )


def updater(loss: Any) -> Callable[[Any], None]:
    """One optimizer step on a batch."""
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def update(batch: Any) -> None:
        losses = loss(batch)
        total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return update


def a2c(model: Any, order: Order) -> Learn:
    """One update on the whole rollout."""
    from torchrl.objectives import A2CLoss
    from torchrl.objectives.value import GAE

    policy, value = model.get_policy_operator(), model.get_value_operator()
    advantages = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=value)
    update = updater(
        A2CLoss(policy, value, loss_critic_type="l2", entropy_coeff=ENTROPY_COEFF, critic_coeff=CRITIC_COEFF)
    )

    def learn(rollout: Any) -> int:
        with torch.no_grad():
            rollout = advantages(rollout)
        update(rollout.reshape(-1))
        return 1

    return learn


def ppo(model: Any, order: Order) -> Learn:
    """Epochs over minibatches of the rollout, drawn without replacement."""
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    policy, value = model.get_policy_operator(), model.get_value_operator()
    advantages = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=value)
    update = updater(
        ClipPPOLoss(
            policy,
            value,
            clip_epsilon=CLIP_EPSILON,
            loss_critic_type="l2",
            entropy_coeff=ENTROPY_COEFF,
            critic_coeff=CRITIC_COEFF,
            normalize_advantage=True,
        )
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(order.rollout),
        sampler=SamplerWithoutReplacement(),
        batch_size=order.rollout // order.minibatches,
    )

    def learn(rollout: Any) -> int:
        for _ in range(order.epochs):
            with torch.no_grad():
                rollout = advantages(rollout)
            buffer.extend(rollout.reshape(-1))
            for _ in range(order.minibatches):
                update(buffer.sample())
        return order.epochs * order.minibatches

    return learn


def replay(model: Any, order: Order) -> Learn:
    """Updates on samples of a replay buffer; the importance of older samples is not corrected for."""
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.objectives import A2CLoss, ValueEstimators

    loss = A2CLoss(
        model.get_policy_operator(),
        model.get_value_operator(),
        loss_critic_type="l2",
        entropy_coeff=ENTROPY_COEFF,
        critic_coeff=CRITIC_COEFF,
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    update = updater(loss)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(REPLAY_SIZE), batch_size=REPLAY_BATCH)

    def learn(rollout: Any) -> int:
        buffer.extend(rollout.reshape(-1))
        for _ in range(UPDATES_PER_COLLECTION):
            update(buffer.sample())
        return UPDATES_PER_COLLECTION

    return learn


if __name__ == "__main__":
    sys.exit(
        main(
            build,
            packages=("torchrl", "tensordict"),
            algorithms=("a2c", "ppo", "replay"),
            notes=("computes the shared encoder twice, once for the actor and once for the critic",),
        )
    )
