"""skrl's A2C and PPO: one model that is policy and value, and computes its encoder once for both.

The environments are Gymnasium's vectorised ones. Not called ``skrl.py``, which would hide the library from itself.
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
    """The agent, its memory and its environments."""
    import gymnasium
    from skrl import logger
    from skrl.agents.torch.a2c import A2C
    from skrl.agents.torch.ppo import PPO
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
    from skrl.trainers.torch import SequentialTrainer
    from skrl.utils import set_seed

    logger.setLevel("WARNING")
    set_seed(order.seed)

    class Shared(CategoricalMixin, DeterministicMixin, Model):
        def __init__(self, observation_space: Any, action_space: Any, device: Any) -> None:
            Model.__init__(self, observation_space=observation_space, action_space=action_space, device=device)
            CategoricalMixin.__init__(self, unnormalized_log_prob=True, role="policy")
            DeterministicMixin.__init__(self, role="value")
            layers: list[torch.nn.Module] = []
            for before, after in zip((self.num_observations, *HIDDEN), HIDDEN, strict=False):
                layers += [torch.nn.Linear(before, after), ACTIVATIONS[order.activation]()]
            self.encoder = torch.nn.Sequential(*layers)
            self.logits = torch.nn.Linear(HIDDEN[-1], self.num_actions)
            self.state_value = torch.nn.Linear(HIDDEN[-1], 1)
            self._features: torch.Tensor | None = None

        def act(self, inputs: dict[str, Any], *, role: str = "") -> Any:
            mixin = CategoricalMixin if role == "policy" else DeterministicMixin
            return mixin.act(self, inputs, role=role)

        def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
            # skrl's own pattern for shared models: the value that follows a policy is of the same observations.
            if role == "policy":
                self._features = self.encoder(inputs["observations"])
                return self.logits(self._features), {}
            features = self.encoder(inputs["observations"]) if self._features is None else self._features
            self._features = None
            return self.state_value(features), {}

    env = wrap_env(
        gymnasium.make_vec(GYMNASIUM_IDS[order.task], order.num_envs, vectorization_mode="vector_entry_point"),
        verbose=False,
    )
    model = Shared(env.observation_space, env.action_space, env.device)
    options: dict[str, Any] = {
        "rollouts": order.steps,
        "discount_factor": GAMMA,
        "gae_lambda": LAMBDA,
        "learning_rate": LEARNING_RATE,
        "grad_norm_clip": MAX_GRAD_NORM,
        "entropy_loss_scale": ENTROPY_COEFF,
        "time_limit_bootstrap": True,
        "experiment": {"write_interval": 0, "checkpoint_interval": 0},
    }
    updates = 1
    if order.algo == "ppo":
        updates = order.epochs * order.minibatches
        options |= {
            "learning_epochs": order.epochs,
            "mini_batches": order.minibatches,
            "ratio_clip": CLIP_EPSILON,
            "value_loss_scale": CRITIC_COEFF,
        }
    agent = (A2C if order.algo == "a2c" else PPO)(
        models={"policy": model, "value": model},
        memory=RandomMemory(memory_size=order.steps, num_envs=env.num_envs, device=env.device),
        observation_space=env.observation_space,
        action_space=env.action_space,
        device=env.device,
        cfg=options,
    )
    quiet = {"headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
    trainer = SequentialTrainer(env=env, agents=agent, cfg=quiet)

    def train(frames: int) -> Trained:
        rollouts = rollouts_in(frames, order)
        trainer.cfg.timesteps = rollouts * order.steps
        trainer.train()
        return Trained(rollouts * order.rollout, rollouts * updates)

    return train


if __name__ == "__main__":
    sys.exit(
        main(
            build,
            packages=("skrl", "gymnasium", "numpy"),
            notes=("counts the steps in which Gymnasium resets, one an episode, as frames",),
        )
    )
