"""Deep Q-learning: action values from replayed transitions, with an ε-greedy policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tensordict import TensorDictBase
from torchrl.objectives import DQNLoss

from fp8rl_torchrl.models.q_network import QNetwork
from fp8rl_torchrl.recipes.off_policy import OffPolicyConfig
from fp8rl_torchrl.recipes.schedules import epsilon_at
from fp8rl_torchrl.recipes.wiring import ACTIVATIONS, make_parts, make_pipeline, make_step
from fp8rl_torchrl.training.loop import Pipeline, Report

_CONTROL: dict[str, Any] = {
    "num_envs": 16,
    "frames_per_collection": 512,
    "updates_per_collection": 24,
    "min_replay": 1000,
    "replay_size": 50_000,
    "batch_size": 512,
    "activation": "tanh",
    "lr": 2e-3,
    "lr_schedule": "linear",
    "lr_final": 0.1,
    "n_step": 8,
    "target_rate": 0.1,
    "double": True,
    "reward_scale": 0.02,
    "normalize_observation": True,
    "precision": "fp32",
    "collector": "fused",
    "eval_every": 2048,
}


@dataclass(frozen=True, kw_only=True)
class DQNConfig(OffPolicyConfig):
    """Options of deep Q-learning.

    Raises:
        ValueError: If an option is out of range.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "CartPole-v1": {
            **_CONTROL,
            "total_frames": 80_000,
            # A good policy soon sees nothing but balance, and forgets how to come back to it: old transitions are kept,
            # and one action in five stays random.
            "replay_size": 100_000,
            "epsilon_frames": 8000,
            "epsilon_final": 0.2,
            "gamma": 0.995,
            "lr_final": 0.02,
            "eval_episodes": 100,
            "target_return": 500.0,
        },
        "Acrobot-v1": {
            **_CONTROL,
            "total_frames": 60_000,
            "updates_per_collection": 48,
            "hidden": (128, 128),
            "activation": "relu",
            "lr": 1e-3,
            "lr_final": 0.02,
            "n_step": 4,
            "epsilon_frames": 10_000,
            "epsilon_final": 0.1,
            "target_return": -82.0,
        },
        "LunarLander-v3": {
            **_CONTROL,
            "total_frames": 200_000,
            "frames_per_collection": 256,
            "updates_per_collection": 128,
            "min_replay": 2000,
            "replay_size": 100_000,
            "batch_size": 128,
            "hidden": (256, 256),
            "activation": "relu",
            "lr": 6e-4,
            "n_step": 4,
            "target_rate": 0.01,
            "epsilon_frames": 20_000,
            "epsilon_final": 0.02,
            "collector": "torchrl",
            "eval_every": 10_000,
            "target_return": 240.0,
        },
    }
    """Tuned options by task."""
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "guide": {
            "num_envs": 1,
            "frames_per_collection": 1,
            "updates_per_collection": 1,
            "total_frames": None,
            "episodes": 500,
            "replay_size": 10_000,
            "batch_size": 64,
            "min_replay": 64,
            "lr": 1e-3,
            "gamma": 0.99,
            "epsilon_schedule": "exponential",
            "epsilon_final": 0.01,
            "target_update": "episodes",
            "target_every": 10,
        },
    }
    """Named sets of options for any task."""

    algo: Literal["dqn"] = "dqn"
    """The recipe."""
    target_update: Literal["soft", "hard", "episodes"] = "soft"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Whether the target network follows a little after each update, or is copied after so many updates or episodes."""
    target_every: int = 100
    """It is copied after this many updates (hard) or episodes."""
    double: bool = False
    """Whether the network chooses the action that the target network values (van Hasselt et al., 2016)."""
    dueling: bool = False
    """Whether values are put together from the state's and the actions' (Wang et al., 2016)."""
    loss: Literal["l2", "smooth_l1"] = "smooth_l1"
    """The distance of values from their targets."""
    epsilon: float = 1.0
    """Probability of a random action at the start."""
    epsilon_final: float = 0.05
    """The lowest probability of a random action."""
    epsilon_schedule: Literal["linear", "exponential"] = "linear"
    """How the probability falls: linearly over epsilon_frames, or by a factor for every episode."""
    epsilon_frames: int = 20_000
    """Linear: environment steps until epsilon_final."""
    epsilon_decay: float = 0.995
    """Exponential: the factor for every episode."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if not 0 <= self.epsilon_final <= self.epsilon <= 1:
            raise ValueError(
                f"0 <= epsilon_final <= epsilon <= 1 must hold; got {self.epsilon_final} and {self.epsilon}"
            )
        if self.epsilon_frames < 1:
            raise ValueError(f"epsilon_frames must be >= 1; got {self.epsilon_frames}")
        if not 0 < self.epsilon_decay <= 1:
            raise ValueError(f"epsilon_decay must lie in (0, 1]; got {self.epsilon_decay}")

    @classmethod
    def guide(cls, env: str = "CartPole-v1", **options: Any) -> DQNConfig:
        """The options of many a tutorial: one environment, an update every step, ε times 0.995 every episode.

        Args:
            env: The task.
            **options: Fields of this class to set otherwise.
        """
        return cls.variant("guide", env, **options)

    def epsilon_after(self, frames: int, episodes: int) -> float:
        """The probability of a random action after so many environment steps and episodes."""
        return epsilon_at(
            self.epsilon_schedule,
            self.epsilon,
            self.epsilon_final,
            decay=self.epsilon_decay,
            steps=self.epsilon_frames,
            frames=frames,
            episodes=episodes,
        )


def build_dqn(config: DQNConfig) -> Pipeline:
    """Compose the pipeline: environment, Q-network, collector, replay buffer, loss, step.

    Args:
        config: The options.

    Returns:
        The pipeline, not yet started.
    """
    config = config.resolved()
    parts = make_parts(
        config,
        lambda env: QNetwork.for_env(
            env,
            config.hidden,
            activation=ACTIVATIONS[config.activation],
            normalize=config.normalize_observation,
            dueling=config.dueling,
            epsilon=config.epsilon,
        ),
    )
    agent: QNetwork = parts.agent
    loss: Any = DQNLoss(agent.values, loss_function=config.loss, delay_value=True, double_dqn=config.double)
    loss.make_value_estimator(gamma=config.gamma)
    by_episodes = config.target_update == "episodes"
    updater = config.target_updater(loss)  # to be made in any case: TorchRL warns of targets that nothing will move
    step = make_step(config, loss, target_updater=None if by_episodes else updater)

    def explore_less(rollout: TensorDictBase, report: Report) -> None:
        agent.exploration.eps.fill_(config.epsilon_after(report.frames, report.episodes))
        before = report.episodes - len(report.episode_returns)
        if by_episodes and report.episodes // config.target_every > before // config.target_every:
            loss.target_value_network_params.data.update_(loss.value_network_params.data)

    return make_pipeline(
        config, parts, loss, step, config.make_replay(), after_collection=explore_less, **config.learned_from(loss)
    )
