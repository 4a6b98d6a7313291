"""What the losses need of a model, and the entropy of its distribution."""

from __future__ import annotations

from typing import Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch.distributions import Distribution


class JointModel(Protocol):
    """What a loss needs of a model; `fp8rl_torchrl.ActorCritic` offers it."""

    @property
    def value(self) -> TensorDictModuleBase:
        """The critic; its ``in_keys`` are what the model observes."""
        ...

    def distribution_and_value(self, tensordict: TensorDictBase) -> tuple[Distribution, torch.Tensor]:
        """The action distribution ``[...]`` and the state value ``[..., 1]`` of the observation in a TensorDict."""
        ...

    def state_value(self, tensordict: TensorDictBase) -> torch.Tensor:
        """The state value ``[..., 1]`` alone."""
        ...


def entropy_of(distribution: Distribution) -> torch.Tensor:
    """The entropy per element, by one reparametrised sample where there is no formula (the tanh-Normal)."""
    try:
        return distribution.entropy().float()
    except NotImplementedError:
        return -distribution.log_prob(distribution.rsample()).float()
