"""Soft actor-critic: an entropy bonus of learned weight, twin critics, replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchrl.objectives import DiscreteSACLoss, SACLoss

from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.recipes.off_policy import PENDULUM, OffPolicyConfig
from fp8rl_torchrl.recipes.wiring import ACTIVATIONS, make_optimizer, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class SACConfig(OffPolicyConfig):
    """Options of soft actor-critic, for continuous and for discrete actions.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CartPole-v1": {
            "total_frames": 40_000,
            "num_envs": 16,
            "frames_per_collection": 128,
            "updates_per_collection": 32,
            "min_replay": 512,
            "hidden": (64, 64),
            "lr": 2e-3,
            "target_rate": 0.1,
            "alpha": 0.02,
            "reward_scale": 0.02,
            "precision": "fp32",
            "eval_every": 2048,
            "target_return": 500.0,
        },
        "Pendulum-v1": {**PENDULUM, "total_frames": 12_000, "updates_per_collection": 16, "alpha": 0.1},
        "MountainCarContinuous-v0": {
            "total_frames": 12_288,
            "num_envs": 4,
            "frames_per_collection": 128,
            "updates_per_collection": 32,
            # Until the goal is in the buffer, all there is to learn is that acting costs.
            "min_replay": 4096,
            "hidden": (64, 64),
            # Without biases yet, tanh features are odd: half of their random functions push the car as it moves.
            "activation": "tanh",
            "state_dependent_noise": True,
            "n_step": 8,
            "lr": 1e-3,
            "gamma": 0.999,
            "target_rate": 0.02,
            # Over an episode, a larger bonus is worth more than the goal.
            "alpha": 0.005,
            "reward_scale": 0.1,
            "normalize_observation": True,
            "precision": "fp32",
            "eval_every": 1024,
        },
    }
    """Tuned options by task."""
    SQUARED_ERRORS: ClassVar[bool] = False
    """Both losses write the magnitude."""

    algo: Literal["sac"] = "sac"
    """The recipe."""
    alpha: float = 1.0
    """Weight of the entropy at the start."""
    target_entropy: float | None = None
    """The entropy that the weight is learned to keep, in nats; by default minus the number of components of a
    continuous action, or a part of the largest entropy of a discrete one."""
    target_entropy_share: float = 0.5
    """That part."""
    state_dependent_noise: bool = False
    """Whether a continuous action explores with noise that is a function of the state, another one in each collection,
    instead of noise that is drawn at every step."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0; got {self.alpha}")
        if not 0 < self.target_entropy_share < 1:
            raise ValueError(f"target_entropy_share must lie in (0, 1); got {self.target_entropy_share}")


def build_sac(config: SACConfig) -> Pipeline:
    """Compose the pipeline: environment, actor and critics, collector, replay buffer, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    activation, normalize = ACTIVATIONS[config.activation], config.normalize_observation
    noise = config.state_dependent_noise
    parts = make_parts(
        config,
        lambda env: ActorQ.for_env(env, config.hidden, activation, normalize, state_dependent_noise=noise),
    )
    action_spec: Any = parts.env.action_spec_unbatched
    options: dict[str, Any] = {
        "alpha_init": config.alpha,
        "target_entropy": "auto" if config.target_entropy is None else config.target_entropy,
    }
    if action_spec.shape == ():
        loss: Any = DiscreteSACLoss(
            parts.agent.actor,
            parts.agent.qvalue,
            action_space=action_spec,
            num_actions=action_spec.n,
            target_entropy_weight=config.target_entropy_share,
            **options,
        )
    else:
        loss = SACLoss(parts.agent.actor, parts.agent.qvalue, action_spec=action_spec, **options)
    loss.make_value_estimator(gamma=config.gamma)
    optimizers = {
        "loss_actor": make_optimizer(config, loss.actor_network_params.parameters()),
        "loss_qvalue": make_optimizer(config, loss.qvalue_network_params.parameters()),
        "loss_alpha": make_optimizer(config, [loss.log_alpha]),
    }
    step = make_step(config, loss, optimizer=optimizers, target_updater=config.target_updater(loss))
    return make_pipeline(config, parts, loss, step, config.make_replay(), **config.learned_from(loss))
