"""`QNetwork`: the value of each discrete action, and the policy that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import EGreedyModule, QValueActor

from fp8rl_torchrl.models.heads import in_words, observation_of
from fp8rl_torchrl.models.networks import Float32Head, mlp_encoder
from fp8rl_torchrl.models.normalize import RunningStatistics


class DuelingHead(nn.Module):
    r"""Action values put together from the state's value and each action's advantage (Wang et al., 2016, equation 9).

    .. math:: Q(s, a) = V(s) + A(s, a) - \frac1n \sum_{a'} A(s, a')

    Args:
        num_features: Size of the features.
        num_actions: The number of actions ``n``.
    """

    def __init__(self, num_features: int, num_actions: int) -> None:
        super().__init__()
        self.value = Float32Head(num_features, 1)
        self.advantage = Float32Head(num_features, num_actions)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features ``[..., num_features]`` of any floating dtype to float32 ``[..., n]``."""
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(-1, keepdim=True)


class _EpsilonGreedy(EGreedyModule):
    """TorchRL's, with the same draws, but without an expanded spec, which PyTorch 2.11 cannot compile."""

    eps: torch.Tensor

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replace some actions by random ones."""
        if exploration_type() not in (ExplorationType.RANDOM, None):
            return tensordict
        action: Any = tensordict.get("action")
        spec: Any = self.spec
        explores = torch.rand(action.shape, device=action.device) < self.eps
        return tensordict.set("action", torch.where(explores, torch.randint_like(action, spec["action"].n), action))


class QNetwork(nn.Module):
    """Action values of a discrete action.

    | part | reads | writes |
    |---|---|---|
    | ``values`` | ``observation`` | ``action_value`` (float32 ``[..., n]``), ``chosen_action_value``, ``action`` |
    | ``policy`` | ``observation`` | the same, and explores |

    ``values`` takes the best action. ``policy`` takes a random one with probability ``exploration.eps``, a tensor that
    the training loop writes, and the best one under ``set_exploration_type(ExplorationType.DETERMINISTIC)``.

    Args:
        encoder: Maps the observation to features ``[..., num_features]``.
        num_features: Size of the features.
        action_spec: The (unbatched) spec of the action.
        dueling: Whether the head is a `DuelingHead`.
        epsilon: The probability of a random action at the start.
        observation_key: The entry that the encoder reads.
        statistics: What the encoder normalises observations by, if it does.

    Raises:
        ValueError: If the action is not categorical, or ``epsilon`` is no probability.
    """

    values: QValueActor
    policy: TensorDictSequential
    statistics: RunningStatistics | None

    def __init__(
        self,
        encoder: nn.Module,
        num_features: int,
        action_spec: Any,
        dueling: bool = False,
        epsilon: float = 1.0,
        observation_key: str = "observation",
        statistics: RunningStatistics | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon is a probability, in [0, 1]; got {epsilon}")
        self.statistics = statistics  # before the layers that refer to it
        if type(action_spec) is not CategoricalSpec or action_spec.shape != ():
            raise ValueError(
                f"a QNetwork has one value for each discrete action, but the action is {in_words(action_spec)}: for a "
                "continuous one use sac, td3 or ppo"
            )
        head = (DuelingHead if dueling else Float32Head)(num_features, action_spec.n)
        self.values = QValueActor(nn.Sequential(encoder, head), in_keys=[observation_key], spec=action_spec)
        self.exploration = _EpsilonGreedy(action_spec, float(epsilon), 0.0)
        # A view of the same modules: kept out of the module tree, in which every parameter has one name.
        parts: Any = [self.values, self.exploration]
        self.__dict__["policy"] = TensorDictSequential(*parts)

    @classmethod
    def for_env(
        cls,
        env: EnvBase,
        hidden: Sequence[int] = (64, 64),
        encoder: nn.Module | None = None,
        activation: type[nn.Module] = nn.ReLU,
        normalize: bool = False,
        dueling: bool = False,
        epsilon: float = 1.0,
    ) -> QNetwork:
        """Build a Q-network that fits an environment's specs, on its device.

        Args:
            env: The environment; its specs are read, it is not stepped.
            hidden: Widths of the encoder's layers. Not used if ``encoder`` is given.
            encoder: Any module that maps the observation to features ``[..., num_features]``; needed for pixels.
            activation: The nonlinearity of the encoder that is built here.
            normalize: Whether the encoder that is built here normalises observations by ``agent.statistics``.
            dueling: As above.
            epsilon: As above.

        Raises:
            ValueError: If the observation or action space is not supported, naming it and what to do, or ``epsilon``
                is no probability.

        Example:
            >>> from fp8rl_torchrl.envs import CartPoleEnv
            >>> env = CartPoleEnv(num_envs=4, seed=0)
            >>> QNetwork.for_env(env).policy(env.reset())["action_value"].shape
            torch.Size([4, 2])
        """
        key, spec = observation_of(env, encoder)
        statistics = None
        if encoder is None:
            statistics = RunningStatistics(spec.shape[-1]).to(env.device) if normalize else None
            encoder = mlp_encoder(spec.shape[-1], hidden, activation, statistics)
        elif normalize:
            raise ValueError("normalize is for the encoder that is built here; leave it out, or leave out encoder")
        with torch.no_grad():
            num_features = encoder.to(env.device)(spec.zero().unsqueeze(0)).shape[-1]
        agent = cls(encoder, num_features, env.action_spec_unbatched, dueling, epsilon, key, statistics)
        return agent.to(env.device)
