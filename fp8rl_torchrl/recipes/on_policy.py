"""What the recipes that learn from fresh collections share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from fp8rl_torchrl.recipes.wiring import RecipeConfig

Config = TypeVar("Config", bound="OnPolicyConfig")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(RecipeConfig):
    """The options that on-policy recipes have in common.

    Raises:
        ValueError: If an option is out of range.
    """

    updates_per_collection: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Follows from the other options; not to be set."""
    min_replay: int = 1
    """Not used: every collection is learned from."""
    lmbda: float = 0.95
    """Trace parameter of the advantages; 1 gives n-step returns."""
    critic_coeff: float = 0.5
    """Weight of the critic's loss."""
    entropy_coeff: float = 0.01
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Whether a batch's advantages are shifted and scaled to mean 0 and standard deviation 1."""
    lr_decay_updates: int | None = None
    """The learning rate falls linearly over this many updates, by default the whole run's, ..."""
    lr_final: float = 0.05
    """... to this fraction of lr, and stays there."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        super().__post_init__()
        if self.updates_per_collection not in (None, self._updates()) or self.min_replay != 1:
            raise ValueError(
                "updates_per_collection and min_replay are not options of this recipe, which learns from each "
                "collection as it comes: leave them out"
            )
        if self.lr_decay_updates is not None and self.lr_decay_updates < 1:
            raise ValueError(f"lr_decay_updates must be >= 1; got {self.lr_decay_updates}")
        for name in ("lmbda", "lr_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
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

    def resolved(self: Config) -> Config:
        """See `RecipeConfig.resolved`; the length of the decay is that of the run as it was started."""
        updates = self._updates()
        decay = self.lr_decay_updates or updates * self._collections()
        return replace(super().resolved(), updates_per_collection=updates, lr_decay_updates=decay)
