"""Stable-Baselines3 with the hyperparameters that rl-baselines3-zoo has tuned for a task, judged as ours are.

The settings are those of https://github.com/DLR-RM/rl-baselines3-zoo, ``hyperparams/<algorithm>.yml``, at commit
22e3ff2450fd92033f7f032915e1f64894a09584 (April 2026), in the words of those files. Run as a program, this trains what
its argument describes and prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from judged_run import Exam, Examiner, tell
from tensordict import TensorDictBase

_WIDE = {"net_arch": [256, 256]}
_DQN_ACROBOT: dict[str, Any] = {
    "n_timesteps": 100_000, "learning_rate": 6.3e-4, "batch_size": 128, "buffer_size": 50_000, "learning_starts": 0,
    "gamma": 0.99, "target_update_interval": 250, "train_freq": 4, "gradient_steps": -1, "exploration_fraction": 0.12,
    "exploration_final_eps": 0.1, "policy_kwargs": _WIDE,
}  # fmt: skip

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "n_envs": 8, "n_timesteps": 100_000, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
        "n_epochs": 20, "ent_coef": 0.0, "learning_rate": "lin_0.001", "clip_range": "lin_0.2",
    },
    ("a2c", "CartPole-v1"): {"n_envs": 8, "n_timesteps": 500_000, "ent_coef": 0.0},
    ("dqn", "CartPole-v1"): {
        "n_timesteps": 50_000, "learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000,
        "learning_starts": 1000, "gamma": 0.99, "target_update_interval": 10, "train_freq": 256, "gradient_steps": 128,
        "exploration_fraction": 0.16, "exploration_final_eps": 0.04, "policy_kwargs": _WIDE,
    },
    ("ppo", "Acrobot-v1"): {
        "normalize": True, "n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99,
        "n_epochs": 4, "ent_coef": 0.0,
    },
    ("dqn", "Acrobot-v1"): _DQN_ACROBOT,
    ("ppo", "Pendulum-v1"): {
        "n_envs": 4, "n_timesteps": 100_000, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10,
        "ent_coef": 0.0, "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4,
    },
    ("sac", "Pendulum-v1"): {"n_timesteps": 20_000, "learning_rate": 1e-3},
    ("td3", "Pendulum-v1"): {
        "n_timesteps": 20_000, "gamma": 0.98, "buffer_size": 200_000, "learning_starts": 10_000,
        "noise_type": "normal", "noise_std": 0.1, "gradient_steps": 1, "train_freq": 1, "learning_rate": 1e-3,
        "policy_kwargs": {"net_arch": [400, 300]},
    },
    ("ppo", "MountainCarContinuous-v0"): {
        "normalize": True, "n_envs": 1, "n_timesteps": 20_000, "batch_size": 256, "n_steps": 8, "gamma": 0.9999,
        "learning_rate": 7.77e-5, "ent_coef": 0.00429, "clip_range": 0.1, "n_epochs": 10, "gae_lambda": 0.9,
        "max_grad_norm": 5, "vf_coef": 0.19, "use_sde": True,
        "policy_kwargs": {"log_std_init": -3.29, "ortho_init": False},
    },
    ("sac", "MountainCarContinuous-v0"): {
        "n_timesteps": 50_000, "learning_rate": 3e-4, "buffer_size": 50_000, "batch_size": 512, "ent_coef": 0.1,
        "train_freq": 32, "gradient_steps": 32, "gamma": 0.9999, "tau": 0.01, "learning_starts": 0, "use_sde": True,
        "policy_kwargs": {"log_std_init": -3.67, "net_arch": [64, 64]},
    },
    ("ppo", "LunarLander-v3"): {
        "n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999,
        "n_epochs": 4, "ent_coef": 0.01,
    },
    ("dqn", "LunarLander-v3"): _DQN_ACROBOT,
}  # fmt: skip
"""By recipe and task; what is not named is Stable-Baselines3's default."""


def build(recipe: str, task: str, settings: dict[str, Any], seed: int) -> Any:
    """The agent with its environments.

    Args:
        recipe: The algorithm.
        task: A Gymnasium id.
        settings: In the words of rl-baselines3-zoo.
        seed: Of everything random.
    """
    import stable_baselines3 as sb3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecNormalize

    options = {name: _schedule(value) for name, value in settings.items()}
    options.pop("n_timesteps")
    env: Any = make_vec_env(task, options.pop("n_envs", 1), seed=seed)
    if options.pop("normalize", False):
        env = VecNormalize(env, gamma=options.get("gamma", 0.99))
    if options.pop("noise_type", None) == "normal":
        size, std = env.action_space.shape[0], options.pop("noise_std")
        options["action_noise"] = NormalActionNoise(np.zeros(size), std * np.ones(size))
    return getattr(sb3, recipe.upper())("MlpPolicy", env, seed=seed, device="cpu", **options)


def _schedule(value: Any) -> Any:
    """``lin_0.001`` is a number that falls to 0 in the course of training."""
    if not (isinstance(value, str) and value.startswith("lin_")):
        return value
    start = float(value.removeprefix("lin_"))
    return lambda remaining: remaining * start


def policy_of(agent: Any) -> Any:
    """The agent's deterministic policy on TensorDicts, with its normalisation as it stands."""
    normalizer = agent.get_vec_normalize_env()

    def policy(tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict["observation"].numpy()
        if normalizer is not None:
            observation = normalizer.normalize_obs(observation)
        actions, _ = agent.predict(observation, deterministic=True)
        return tensordict.set("action", torch.as_tensor(actions))

    return policy


def train(recipe: str, task: str, settings: dict[str, Any], seed: int, exam: Exam) -> dict[str, Any]:
    """Train until the settings' budget is spent or the threshold is reached.

    Returns:
        What `Examiner.results` returned, and what training took, in processor time without evaluations.
    """
    from stable_baselines3.common.callbacks import BaseCallback

    agent = build(recipe, task, settings, seed)
    examiner = Examiner(task, policy_of(agent), exam)

    class Watch(BaseCallback):
        seconds = 0.0

        def start(self) -> None:
            self.started = time.process_time()

        def stop(self) -> None:
            self.seconds += time.process_time() - self.started

        def _on_step(self) -> bool:
            self.stop()
            passed = examiner.look(self.num_timesteps, self.seconds)
            self.start()
            return not passed

    watch = Watch()
    watch.start()
    agent.learn(settings["n_timesteps"], callback=watch)
    watch.stop()
    return {
        **examiner.results(),
        "stopped_by": "threshold" if examiner.passed else "budget",
        "frames": agent.num_timesteps,
        "seconds": watch.seconds,
        "compile_seconds": 0.0,
        "skipped_steps": 0,
    }


def main(argv: list[str]) -> int:
    """Train what the argument describes, and print the result."""
    job = json.loads(argv[0])
    return tell(lambda: train(**{**job, "exam": Exam(**job["exam"])}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
