"""What the recipes that learn from replayed transitions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tensordict import TensorDictBase
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import HardUpdate, SoftUpdate

from fp8rl_torchrl.data.multi_step import n_step
from fp8rl_torchrl.data.replay import prioritized_replay_buffer, replay_buffer
from fp8rl_torchrl.recipes.config import RecipeConfig

PENDULUM: dict[str, Any] = {
    "total_frames": 15_000,
    "num_envs": 8,
    "frames_per_collection": 32,
    "updates_per_collection": 8,
    "min_replay": 500,
    "hidden": (64, 64),
    "lr": 2e-3,
    "gamma": 0.98,
    "target_rate": 0.02,
    "reward_scale": 0.1,
    "precision": "fp32",
    "eval_every": 2000,
}
"""What is tuned alike for Pendulum-v1, whatever learns from replay."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(RecipeConfig):
    """The options of a recipe with a replay buffer.

    Raises:
        ValueError: If an option is out of range.
    """

    replay_size: int = 10_000
    """Transitions kept for replay; 0 learns from each collection as it comes, once."""
    batch_size: int = 64
    """Transitions in the batch of one update."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {self.batch_size}")
        if self.replay_size < 0:
            raise ValueError(f"replay_size must be >= 0; got {self.replay_size}")
        if self.replay_size == 0:
            return
        if not self.min_replay <= self.replay_size:
            raise ValueError(f"min_replay {self.min_replay} would never be stored in replay_size {self.replay_size}")
        if self.batch_size > self.replay_size:
            raise ValueError(f"batch_size {self.batch_size} is more than replay_size {self.replay_size} holds")
        if self.replay_size < self.frames_per_collection:
            raise ValueError(f"replay_size must hold a collection, {self.frames_per_collection} transitions")

    def _updates(self) -> int:
        return self.updates_per_collection if self.replay_size else 1

    def make_replay(self) -> TensorDictReplayBuffer | None:
        """The replay buffer, if there is one."""
        return replay_buffer(self.replay_size, self.batch_size, self.device) if self.replay_size else None


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(ReplayConfig):
    """The options of a recipe that learns action values from replayed transitions.

    Raises:
        ValueError: If an option is out of range.
    """

    SQUARED_ERRORS: ClassVar[bool] = True
    """Whether TorchRL's loss writes the square of each error as ``td_error``, and not its magnitude."""

    total_frames: int | None = 100_000
    """Train for this many environment steps; None counts episodes instead."""
    num_envs: int = 8
    """Environments stepped side by side."""
    frames_per_collection: int = 8
    """Environment steps between two phases of updates, over all environments."""
    updates_per_collection: int = 8
    """Optimizer steps after each collection."""
    activation: Literal["tanh", "relu"] = "relu"
    """The nonlinearity after each layer."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls."""
    max_grad_norm: float | None = 10.0
    """Gradients are clipped to this 2-norm; None does not clip."""
    replay_size: int = 100_000
    """Transitions kept for replay; 0 learns from each collection as it comes, once."""
    batch_size: int = 256
    """Transitions in the batch of one update."""
    n_step: int = 1
    """Rewards are summed over up to this many steps of a collection before a value is added."""
    prioritized: bool = False
    """Whether transitions with a large error are drawn more often (Schaul et al., 2016)."""
    priority_exponent: float = 0.6
    """How much more often: by this power of the error's magnitude; 0 is uniform."""
    importance_exponent: float = 0.4
    """How far weights on the loss correct for that; 1 does fully."""
    target_update: Literal["soft", "hard"] = "soft"
    """Whether the target network follows a little after each update, or is copied now and then."""
    target_rate: float = 0.005
    """Soft: the part of the way that it goes."""
    target_every: int = 100
    """Hard: it is copied after this many updates."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        for name in ("n_step", "target_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        for name in ("priority_exponent", "importance_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"target_rate must lie in (0, 1]; got {self.target_rate}")
        if self.prioritized and not self.replay_size:
            raise ValueError("prioritized needs a replay buffer: give replay_size")
        if self.n_step > self.frames_per_collection // self.num_envs:
            raise ValueError(
                f"n_step {self.n_step} needs collections of as many steps; frames_per_collection / num_envs is "
                f"{self.frames_per_collection // self.num_envs}"
            )

    def make_replay(self) -> TensorDictReplayBuffer | None:
        """The replay buffer, if there is one.

        Raises:
            ValueError: If it is to be prioritized, and TorchRL's extension does not load here.
        """
        if not self.prioritized:
            return super().make_replay()
        alpha, beta = self.priority_exponent, self.importance_exponent
        if self.SQUARED_ERRORS:
            alpha /= 2
        return prioritized_replay_buffer(self.replay_size, self.batch_size, alpha, beta, self.device)

    def target_updater(self, loss: Any) -> SoftUpdate | HardUpdate:
        """How the target networks of a loss follow."""
        if self.target_update == "soft":
            return SoftUpdate(loss, tau=self.target_rate)
        return HardUpdate(loss, value_network_update_interval=self.target_every)

    def learned_from(self, loss: Any) -> dict[str, Any]:
        """What a pipeline needs to know of transitions over several steps, and without a buffer: its options."""
        keys: Sequence[Any] = loss.in_keys if self.n_step == 1 else [*loss.in_keys, "steps_to_next_obs"]
        return {"prepare": self._transitions, "keys": keys}

    def _transitions(self, rollout: TensorDictBase) -> TensorDictBase:
        if self.n_step > 1:
            rollout = n_step(rollout, self.n_step, self.gamma)
        return rollout.reshape(-1)
