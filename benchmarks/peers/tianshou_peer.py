"""Tianshou's A2C and PPO: actor and critic own the same encoder, which each of them computes anew.

The environments are single ones of Gymnasium in a `DummyVectorEnv`: Tianshou takes no vectorised ones but EnvPool's.
Not called ``tianshou.py``, which would hide the library from itself.
"""

# It may be installed for another interpreter.
# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from typing import Any

import torch
from protocol import (
    ACTIVATIONS,
    CLIP_EPSILON,
    CRITIC_COEFF,
    ENTROPY_COEFF,
    GAMMA,
    GYMNASIUM_IDS,
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


def build(order: Order) -> Train:
    """The algorithm, its collector and its environments."""
    import gymnasium
    from tianshou.algorithm import A2C, PPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
    from tianshou.utils.torch_utils import policy_within_training_step

    env = DummyVectorEnv([lambda: gymnasium.make(GYMNASIUM_IDS[order.task])] * order.num_envs)
    env.seed(order.seed)
    observation_space, action_space = env.observation_space[0], env.action_space[0]
    encoder = Net(
        state_shape=observation_space.shape, hidden_sizes=HIDDEN, activation=ACTIVATIONS[order.activation]
    )  # fmt: skip
    actor = DiscreteActor(preprocess_net=encoder, action_shape=action_space.n, softmax_output=False)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda logits: torch.distributions.Categorical(logits=logits),
        action_space=action_space,
        action_scaling=False,
        action_bound_method=None,
    )
    common: dict[str, Any] = {
        "policy": policy,
        "critic": DiscreteCritic(preprocess_net=encoder),
        "optim": AdamOptimizerFactory(lr=LEARNING_RATE),
        "vf_coef": CRITIC_COEFF,
        "ent_coef": ENTROPY_COEFF,
        "max_grad_norm": MAX_GRAD_NORM,
        "gae_lambda": LAMBDA,
        "gamma": GAMMA,
        "max_batchsize": order.rollout,
    }
    algorithm = A2C(**common) if order.algo == "a2c" else PPO(eps_clip=CLIP_EPSILON, **common)
    collector = Collector(algorithm, env, VectorReplayBuffer(order.rollout, order.num_envs))
    collector.reset()
    batch_size, passes = (None, 1) if order.algo == "a2c" else (order.rollout // order.minibatches, order.epochs)

    def train(frames: int) -> Trained:
        rollouts, updates = rollouts_in(frames, order), 0
        for _ in range(rollouts):
            with policy_within_training_step(policy):
                collector.collect(n_step=order.rollout)
                updates += algorithm.update(collector.buffer, batch_size=batch_size, repeat=passes).gradient_steps
            collector.reset_buffer(keep_statistics=True)
        return Trained(rollouts * order.rollout, updates)

    return train


if __name__ == "__main__":
    sys.exit(
        main(
            build,
            packages=("tianshou", "gymnasium", "numpy"),
            notes=("computes the shared encoder twice, once for the actor and once for the critic",),
        )
    )
