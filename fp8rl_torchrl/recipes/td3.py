"""Twin delayed deep deterministic policy gradient; DDPG is a special case."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tensordict import TensorDictBase
from torchrl.objectives import TD3Loss

from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.recipes.off_policy import PENDULUM, OffPolicyConfig
from fp8rl_torchrl.recipes.schedules import linear
from fp8rl_torchrl.recipes.wiring import ACTIVATIONS, make_optimizer, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline, Report


@dataclass(frozen=True, kw_only=True)
class TD3Config(OffPolicyConfig):
    """Options of TD3, for continuous actions. All noise is in units of half the width of the action's interval.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # Before anything is known, actions are nearly random over the whole interval: critics that have seen the
        # middle of it alone take the actor to one of its ends, and from there no gradient leads back.
        "Pendulum-v1": {**PENDULUM, "noise": 2.0, "noise_final": 0.1, "noise_frames": 2000}
    }
    """Tuned options by task."""
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"ddpg": {"critics": 1, "actor_every": 1, "target_noise": 0.0}}
    """Named sets of options for any task."""

    algo: Literal["td3"] = "td3"
    """The recipe."""
    noise: float = 0.1
    """Standard deviation of the noise that the policy explores with at the start."""
    noise_final: float | None = None
    """It moves linearly to this, ...; None keeps it."""
    noise_frames: int = 10_000
    """... over so many environment steps."""
    target_noise: float = 0.2
    """Standard deviation of the noise on the target's action."""
    target_noise_clip: float = 0.5
    """It is clipped to plus or minus this."""
    actor_every: int = 2
    """The actor takes a step at every so many updates of the critics."""
    critics: int = 2
    """Critics, of whose targets the least counts."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        for name in ("noise", "noise_final", "target_noise", "target_noise_clip"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite; got {getattr(self, name)}")
        for name in ("noise_frames", "actor_every", "critics"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")

    def noise_after(self, frames: int) -> float:
        """The standard deviation of the policy's noise after so many environment steps."""
        final = self.noise if self.noise_final is None else self.noise_final
        return linear(self.noise, final, self.noise_frames, frames)


def build_td3(config: TD3Config) -> Pipeline:
    """Compose the pipeline: environment, actor and critics, collector, replay buffer, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    activation, normalize = ACTIVATIONS[config.activation], config.normalize_observation
    parts = make_parts(config, lambda env: ActorQ.for_env(env, config.hidden, activation, normalize, config.noise))
    action_spec: Any = parts.env.action_spec_unbatched
    unit = (action_spec.space.high - action_spec.space.low) / 2
    loss: Any = TD3Loss(
        parts.agent.actor,
        parts.agent.qvalue,
        action_spec=action_spec,
        num_qvalue_nets=config.critics,
        policy_noise=config.target_noise * unit,
        noise_clip=config.target_noise_clip * unit,
    )
    loss.make_value_estimator(gamma=config.gamma)
    optimizers = {
        "loss_actor": make_optimizer(config, loss.actor_network_params.parameters()),
        "loss_qvalue": make_optimizer(config, loss.qvalue_network_params.parameters()),
    }
    step = make_step(
        config,
        loss,
        optimizer=optimizers,
        target_updater=config.target_updater(loss),
        every={"loss_actor": config.actor_every},
    )

    def explore_less(rollout: TensorDictBase, report: Report) -> None:
        parts.agent.exploration.sigma.fill_(config.noise_after(report.frames))

    return make_pipeline(
        config, parts, loss, step, config.make_replay(), after_collection=explore_less, **config.learned_from(loss)
    )
