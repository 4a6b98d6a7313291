"""`ActorQ`: an actor and a network of action values, each with an encoder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import AdditiveGaussianModule, TanhModule, ValueOperator

from fp8rl_torchrl.models.exploration import StateDependentNoise
from fp8rl_torchrl.models.heads import ActorHead, bounds_of, in_words, observation_of
from fp8rl_torchrl.models.networks import Float32Head, mlp_encoder
from fp8rl_torchrl.models.normalize import Normalize, RunningStatistics


class StateActionValue(nn.Module):
    """The value of an observation and an action, concatenated.

    Args:
        encoder: Maps ``[..., obs + d]`` to features ``[..., num_features]``.
        num_features: Size of the features.
        statistics: The observation is normalised by these; None takes it as it is.
    """

    def __init__(self, encoder: nn.Module, num_features: int, statistics: RunningStatistics | None) -> None:
        super().__init__()
        self.normalize = nn.Identity() if statistics is None else Normalize(statistics)
        self.encoder = encoder
        self.head = Float32Head(num_features, 1)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Map an observation ``[..., obs]`` and an action ``[..., d]`` to float32 ``[..., 1]``."""
        return self.head(self.encoder(torch.cat((self.normalize(observation), action), -1)))


class ActorQ(nn.Module):
    """An actor and a network of action values, which share nothing: what SAC, DDPG and TD3 learn.

    | part | reads | writes |
    |---|---|---|
    | ``actor`` | ``observation`` | ``action`` and, if stochastic, what `fp8rl_torchrl.ActorCritic`'s policy writes |
    | ``policy`` | ``observation`` | the same; with ``exploration``, its ``action`` and what leads to it |
    | ``qvalue`` | ``observation`` | of a categorical action: ``action_value``, float32 ``[..., n]`` |
    | ``qvalue`` | ``observation``, ``action`` | of a continuous one: ``state_action_value``, float32 ``[..., 1]`` |

    TorchRL's losses make as many copies of ``qvalue`` as they need. The Gaussian noise on a deterministic actor's
    action has the standard deviation ``exploration.sigma`` times half the width of the action's interval. There is no
    noise under ``set_exploration_type(ExplorationType.DETERMINISTIC)``.

    Args:
        actor: The actor.
        qvalue: The action values.
        exploration: Adds noise to the action of an actor that is deterministic, or takes the place of a stochastic
            actor's sampling (see `fp8rl_torchrl.models.exploration`).
        statistics: What the observations are normalised by, if they are.
        followed: The part of the actor that ``exploration`` follows; by default all of it.
    """

    policy: TensorDictModuleBase

    def __init__(
        self,
        actor: TensorDictModuleBase,
        qvalue: TensorDictModuleBase,
        exploration: TensorDictModuleBase | None = None,
        statistics: RunningStatistics | None = None,
        followed: TensorDictModuleBase | None = None,
    ) -> None:
        super().__init__()
        self.statistics = statistics  # before the layers that refer to it
        self.actor, self.qvalue, self.exploration = actor, qvalue, exploration
        policy: Any = actor
        if exploration is not None:
            kind = TensorDictSequential if followed is None else ProbabilisticTensorDictSequential
            parts: Any = [actor if followed is None else followed, exploration]
            policy = kind(*parts)
        # A view of the same modules: kept out of the module tree, in which every parameter has one name.
        self.__dict__["policy"] = policy

    @classmethod
    def for_env(
        cls,
        env: EnvBase,
        hidden: Sequence[int] = (256, 256),
        activation: type[nn.Module] = nn.ReLU,
        normalize: bool = False,
        noise: float | None = None,
        state_dependent_noise: bool = False,
    ) -> ActorQ:
        """Build both networks to fit an environment's specs, on its device.

        Args:
            env: The environment; its specs are read, it is not stepped.
            hidden: Widths of each encoder's layers.
            activation: The nonlinearity after each layer.
            normalize: Whether observations are normalised by ``agent.statistics``, which the training loop updates.
            noise: Gives a deterministic actor, whose policy explores with this ``exploration.sigma``. None gives a
                stochastic one.
            state_dependent_noise: Whether the policy of a stochastic actor explores with `StateDependentNoise`. Call
                ``agent.exploration.resample()`` after each collection, as the recipe does.

        Raises:
            ValueError: If the observation or action space is not supported, naming it and what to do, ``noise`` is
                negative, or both kinds of noise are asked for.

        Example:
            >>> from fp8rl_torchrl.envs import PendulumEnv
            >>> env = PendulumEnv(num_envs=4, seed=0)
            >>> agent = ActorQ.for_env(env, noise=0.1)
            >>> agent.qvalue(agent.policy(env.reset()))["state_action_value"].shape
            torch.Size([4, 1])
        """
        if noise is not None and not noise >= 0:
            raise ValueError(f"noise is a standard deviation, >= 0; got {noise}")
        if noise is not None and state_dependent_noise:
            raise ValueError("state_dependent_noise is for a stochastic actor: leave out noise")
        key, spec = observation_of(env, None)
        action_spec, size = env.action_spec_unbatched, spec.shape[-1]
        bounds = bounds_of(action_spec)
        statistics = RunningStatistics(size) if normalize else None
        encoder = TensorDictModule(mlp_encoder(size, hidden, activation, statistics), [key], ["_hidden"])
        exploration: TensorDictModuleBase | None = None
        followed: TensorDictModuleBase | None = None
        if noise is not None:
            if bounds is None:
                raise ValueError(
                    f"a deterministic actor needs a bounded continuous action, but it is {in_words(action_spec)}: for "
                    "a discrete one use dqn, sac or ppo"
                )
            actor = _deterministic_actor(encoder, hidden[-1], action_spec)
            exploration = gaussian = AdditiveGaussianModule(action_spec, sigma_init=float(noise), sigma_end=0.0)
            gaussian.std = (bounds["high"] - bounds["low"]) / 2
        else:
            head = ActorHead.for_spec(hidden[-1], action_spec)
            parts: Any = [encoder, TensorDictModule(head.module, ["_hidden"], head.parameters)]
            actor = head.actor(action_spec, *parts)
            if state_dependent_noise:
                exploration = StateDependentNoise(env.batch_size.numel(), hidden[-1], action_spec)
                followed = TensorDictSequential(*parts)
        qvalue = _qvalue(key, size, action_spec, hidden, activation, statistics)
        return cls(actor, qvalue, exploration, statistics, followed).to(env.device)


def _deterministic_actor(encoder: TensorDictModule, num_features: int, action_spec: TensorSpec) -> TensorDictSequential:
    head = TensorDictModule(Float32Head(num_features, action_spec.shape[-1], 0.01), ["_hidden"], ["action"])
    parts: Any = [encoder, head, TanhModule(in_keys=["action"], spec=action_spec)]
    return TensorDictSequential(*parts)


def _qvalue(
    key: str,
    size: int,
    action_spec: TensorSpec,
    hidden: Sequence[int],
    activation: type[nn.Module],
    statistics: RunningStatistics | None,
) -> TensorDictModuleBase:
    if action_spec.shape == ():
        encoder = mlp_encoder(size, hidden, activation, statistics)
        encoder.append(Float32Head(hidden[-1], action_spec.n))  # pyright: ignore[reportAttributeAccessIssue]
        return TensorDictModule(encoder, [key], ["action_value"])
    encoder = mlp_encoder(size + action_spec.shape[-1], hidden, activation)
    return ValueOperator(StateActionValue(encoder, hidden[-1], statistics), in_keys=[key, "action"])
