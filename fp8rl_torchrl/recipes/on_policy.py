"""What the recipes that learn from fresh collections share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torchrl.envs import EnvBase

from fp8rl_torchrl.recipes.config import RecipeConfig

Config = TypeVar("Config", bound="FreshConfig")


@dataclass(frozen=True, kw_only=True)
class FreshConfig(RecipeConfig):
    """The options of recipes that learn from each collection as it comes.

    Raises:
        ValueError: If an option is out of range.
    """

    updates_per_collection: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Follows from the other options; not to be set."""
    min_replay: int = 1
    """Not used: every collection is learned from."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if self.updates_per_collection not in (None, self._updates()) or self.min_replay != 1:
            raise ValueError(
                "updates_per_collection and min_replay are not options of this recipe, which learns from each "
                "collection as it comes: leave them out"
            )

    def _updates(self) -> int:
        return 1

    def resolved(self: Config) -> Config:
        """See `RecipeConfig.resolved`."""
        return replace(super().resolved(), updates_per_collection=self._updates())


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(FreshConfig):
    """The options that recipes with advantages have in common.

    Raises:
        ValueError: If an option is out of range.
    """

    shared: bool = True
    """Whether actor and critic share the encoder."""
    lmbda: float = 0.95
    """Trace parameter of the advantages; 1 gives n-step returns."""
    critic_coeff: float = 0.5
    """Weight of the critic's loss."""
    entropy_coeff: float = 0.01
    """Weight of the entropy bonus."""
    state_dependent_noise: bool = False
    """Whether a continuous action explores with noise that is a function of the state, another one in each collection,
    instead of noise that is drawn at every step."""
    normalize_advantage: bool = True
    """Whether a batch's advantages are shifted and scaled to mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda must lie in [0, 1]; got {self.lmbda}")
        for name in ("critic_coeff", "entropy_coeff"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")
        together = self.frames_per_collection // self._updates_an_epoch()
        if self.normalize_advantage and together < 2:
            raise ValueError(
                "an update on a single transition has no advantages to normalize: set normalize_advantage=False, or "
                "make the batches larger"
            )

    def _updates_an_epoch(self) -> int:
        """Batches that a collection is divided into."""
        return 1

    def _updates(self) -> int:
        return self._updates_an_epoch()

    def episode_ends(self, env: EnvBase) -> int | None:
        """How often one environment can be truncated within a collection; None if that is not known."""
        dynamics: Any = getattr(env, "dynamics", None)
        steps = self.frames_per_collection // self.num_envs
        return None if dynamics is None else 1 + (steps - 1) // dynamics.limits.max_steps
