"""`StateDependentNoise`: exploration by a random function of the state instead of one that is drawn at every step."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule
from torch.distributions import Distribution
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import TanhNormal

from fp8rl_torchrl.models.heads import bounds_of, in_words


class StateDependentNoise(ProbabilisticTensorDictModule):
    r"""Turns a Normal's ``loc`` and ``scale`` into an action that explores in the same way for many steps.

    The action is :math:`\operatorname{squash}(\mu(s) + \sigma(s)\, u(s))` with
    :math:`u(s) = W^\top \phi(s) / |\phi(s)|` of the actor's features :math:`\phi` and weights :math:`W` drawn from a
    standard Normal by `resample`, for each environment its own. Each :math:`u` is then a standard Normal itself, as in
    a policy that draws it at every step, but between two calls of `resample` it is a function of the state, so that the
    agent moves with a purpose where noise that is drawn anew averages out. After "Smooth exploration for robotic
    reinforcement learning" (Raffin et al., 2021), where the scale is another one.

    | entry | | dtype | |
    |---|---|---|---|
    | ``features`` | read | any floating one | ``[N, F]`` |
    | ``loc``, ``scale`` | read | float32 | ``[N, d]`` |
    | ``action`` | written | float32 | ``[N, d]``, within the bounds |
    | ``action_log_prob`` | written | float32 | ``[N]``, under the squashed Normal, in nats |

    It is the last module of a policy, in the place of one that samples. Since :math:`u` is a standard Normal, the
    log-probability is the one that a sampling policy gives this action, and on-policy losses can learn from it: that
    neighbouring steps share their noise shows in no term of a loss that takes each step for itself. It explores unless
    it is told otherwise: under ``set_exploration_type(ExplorationType.DETERMINISTIC)`` there is no noise, and ``N`` may
    be any.

    Args:
        num_envs: Environments that are stepped side by side, ``N``.
        num_features: Size of the features, ``F``.
        action_spec: The (unbatched) spec of the action, a bounded vector.
        features: The entry of the features.

    Raises:
        ValueError: If the action is no bounded vector.
    """

    weights: torch.Tensor

    def __init__(self, num_envs: int, num_features: int, action_spec: TensorSpec, features: str = "_hidden") -> None:
        bounds = bounds_of(action_spec)
        if bounds is None:
            raise ValueError(
                f"state-dependent noise needs a bounded continuous action, but it is {in_words(action_spec)}: explore "
                "with noise that is independent of the state"
            )
        super().__init__(
            [features, "loc", "scale"],
            ["action"],
            distribution_class=TanhNormal,
            distribution_kwargs={**bounds, "tanh_loc": False},
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,  # pyright: ignore[reportArgumentType]
        )
        # Saved with the agent, so that a stopped run goes on as if it had not stopped.
        self.register_buffer("weights", torch.randn(num_envs, num_features, action_spec.shape[-1]))

    @torch.no_grad()
    def resample(self) -> None:
        """Draw another function for each environment."""
        self.weights.normal_()

    def get_dist(self, tensordict: TensorDictBase) -> Distribution:
        """The squashed Normal that each action is drawn from, seen by itself."""
        return TanhNormal(tensordict["loc"], tensordict["scale"], **self.distribution_kwargs)

    def forward(self, tensordict: TensorDictBase, **_: Any) -> TensorDictBase:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the action and its log-probability.

        Raises:
            ValueError: If there are other environments than it was made for, and it is to explore.
        """
        before = loc = tensordict["loc"]
        if exploration_type() in (None, ExplorationType.RANDOM):  # like an actor, which samples unless told otherwise
            features = tensordict[self.in_keys[0]].float()
            if features.shape[:-1] != self.weights.shape[:1]:
                raise ValueError(
                    f"this noise was made for {len(self.weights)} environments side by side; got a batch of "
                    f"{tuple(features.shape[:-1])}: build the agent for an environment of that size, or act without "
                    "noise, under set_exploration_type(ExplorationType.DETERMINISTIC)"
                )
            direction = torch.nn.functional.normalize(features, dim=-1)
            before = loc + tensordict["scale"] * torch.einsum("nf,nfd->nd", direction, self.weights)
        distribution: Any = self.get_dist(tensordict)
        action = distribution.transforms[0](before)
        return tensordict.set("action", action).set("action_log_prob", distribution.log_prob(action))
