"""Stable-Baselines3's A2C and PPO: one encoder shared by actor and critic, as a features extractor.

CustomEnv's batch is stepped by its own vectorised Gymnasium environment, behind the `VecEnv` interface that
Stable-Baselines3 documents for that. Gymnasium's vectorised CartPole cannot reset in the step that ends an episode, as
Stable-Baselines3 needs, so CartPole runs in a `DummyVecEnv`, which its documentation advises for cheap environments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
)


def build(order: Order) -> Train:
    """The agent and its environments."""
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp

    class Encoder(BaseFeaturesExtractor):
        def __init__(self, observation_space: Any) -> None:
            super().__init__(observation_space, HIDDEN[-1])
            sizes = observation_space.shape[0], -1, list(HIDDEN)
            self.layers = torch.nn.Sequential(*create_mlp(*sizes, ACTIVATIONS[order.activation]))

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return self.layers(observations)

    env = (
        vectorised(order)
        if order.task == "customenv"
        else make_vec_env(GYMNASIUM_IDS[order.task], order.num_envs, seed=order.seed)
    )
    common: dict[str, Any] = {
        "n_steps": order.steps,
        "gamma": GAMMA,
        "gae_lambda": LAMBDA,
        "learning_rate": LEARNING_RATE,
        "ent_coef": ENTROPY_COEFF,
        "vf_coef": CRITIC_COEFF,
        "max_grad_norm": MAX_GRAD_NORM,
        "policy_kwargs": {"features_extractor_class": Encoder, "net_arch": []},
        "seed": order.seed,
        "device": "cpu",
    }
    if order.algo == "a2c":
        agent: Any = A2C("MlpPolicy", env, use_rms_prop=False, **common)
    else:
        batch_size = order.rollout // order.minibatches
        agent = PPO(
            "MlpPolicy", env, batch_size=batch_size, n_epochs=order.epochs, clip_range=CLIP_EPSILON, **common
        )  # fmt: skip

    def optimizer_steps() -> int:
        # PPO counts epochs, A2C updates.
        return agent._n_updates * (order.minibatches if order.algo == "ppo" else 1)

    def train(frames: int) -> Trained:
        before = agent.num_timesteps, optimizer_steps()
        agent.learn(frames, reset_num_timesteps=before[0] == 0)
        return Trained(agent.num_timesteps - before[0], optimizer_steps() - before[1])

    return train


def vectorised(order: Order) -> Any:
    """CustomEnv's own batch as a `VecEnv`."""
    import gymnasium
    import numpy as np
    from stable_baselines3.common.vec_env import VecEnv

    class Batch(VecEnv):
        def __init__(self) -> None:
            self.env = gymnasium.make_vec(
                GYMNASIUM_IDS[order.task],
                order.num_envs,
                vectorization_mode="vector_entry_point",
                autoreset_mode="SameStep",
            )
            super().__init__(order.num_envs, self.env.single_observation_space, self.env.single_action_space)

        def reset(self) -> np.ndarray:
            return self.env.reset(seed=order.seed)[0]

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            observation, reward, terminated, truncated, info = self.env.step(self.actions)
            done = terminated | truncated
            infos: list[dict[str, Any]] = [{} for _ in range(order.num_envs)]
            for index in np.flatnonzero(done).tolist():
                cut = bool(truncated[index] and not terminated[index])
                infos[index] = {"terminal_observation": info["final_obs"][index], "TimeLimit.truncated": cut}
            return observation, reward, done, infos

        def close(self) -> None:
            self.env.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self.env, attr_name, None)] * order.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError("not needed to train; VecEnv asks for it")

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError("not needed to train; VecEnv asks for it")

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Sequence[bool]:
            return [False] * order.num_envs

    return Batch()


if __name__ == "__main__":
    sys.exit(main(build, packages=("stable_baselines3", "gymnasium", "numpy")))
