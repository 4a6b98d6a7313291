"""Twin delayed deep deterministic policy gradient; DDPG is a special case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torchrl.objectives import TD3Loss

from fp8rl_torchrl.models.actor_q import ActorQ
from fp8rl_torchrl.recipes.off_policy import PENDULUM, OffPolicyConfig
from fp8rl_torchrl.recipes.wiring import ACTIVATIONS, make_optimizer, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline


@dataclass(frozen=True, kw_only=True)
class TD3Config(OffPolicyConfig):
    """Options of TD3, for continuous actions. All noise is in units of half the width of the action's interval.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"Pendulum-v1": PENDULUM}
    """Tuned options by task."""
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"ddpg": {"critics": 1, "actor_every": 1, "target_noise": 0.0}}
    """Named sets of options for any task."""

    algo: Literal["td3"] = "td3"
    """The recipe."""
    noise: float = 0.1
    """Standard deviation of the noise that the policy explores with."""
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
        for name in ("noise", "target_noise", "target_noise_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")
        for name in ("actor_every", "critics"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")


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
    return make_pipeline(config, parts, loss, step, config.make_replay(), **config.learned_from(loss))
