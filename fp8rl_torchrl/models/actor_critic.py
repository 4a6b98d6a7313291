"""`ActorCritic`: an actor and a critic as TensorDictModules, with one encoder for both or one for each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Distribution
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ActorCriticWrapper, ActorValueOperator, ValueOperator

from fp8rl_torchrl.models.exploration import StateDependentNoise
from fp8rl_torchrl.models.heads import ActorHead, observation_of
from fp8rl_torchrl.models.networks import Float32Head, mlp_encoder
from fp8rl_torchrl.models.normalize import RunningStatistics


class ActorCritic(nn.Module):
    """An actor and a critic over one observation, sharing an encoder or not.

    | part | reads | writes |
    |---|---|---|
    | ``policy`` | ``observation`` | the distribution's parameters, ``action``, ``action_log_prob`` |
    | ``value`` | ``observation`` | ``state_value`` (float32 ``[..., 1]``) |
    | ``joint`` | ``observation`` | all of the above; a shared encoder runs once |

    ``policy`` samples, or takes the mode under ``set_exploration_type(ExplorationType.DETERMINISTIC)``. With
    ``exploration``, it explores by that instead; ``joint`` always samples. The heads return FP32 whatever the encoder
    ran in. A categorical action has ``logits`` (float32 ``[..., n]``); a bounded continuous one has ``loc`` and
    ``scale`` of a tanh-Normal scaled to the bounds.

    Args:
        encoder: Maps the observation to features ``[..., num_features]``.
        critic_encoder: The critic's own encoder; None shares the actor's.
        num_features: Size of the features.
        action_spec: The (unbatched) spec of the action.
        observation_key: The entry that the encoder reads.
        statistics: What the encoders normalise observations by, if they do.
        exploration: How ``policy`` chooses actions by the features (``_hidden``) and the distribution's parameters;
            None samples.

    Raises:
        ValueError: If the action space is neither categorical nor bounded and continuous.
    """

    policy: ProbabilisticTensorDictSequential
    value: TensorDictModule
    statistics: RunningStatistics | None
    _parts: tuple[TensorDictModule, TensorDictModule, TensorDictModule, TensorDictModule]

    def __init__(
        self,
        encoder: nn.Module,
        critic_encoder: nn.Module | None,
        num_features: int,
        action_spec: TensorSpec,
        observation_key: str = "observation",
        statistics: RunningStatistics | None = None,
        exploration: StateDependentNoise | None = None,
    ) -> None:
        super().__init__()
        self.statistics = statistics  # before the layers that refer to it
        # On-policy methods explore by the scale alone: one that depends on the observation narrows where the policy
        # has been, and that widens the steps of the next updates there until they undo what was learned.
        head = ActorHead.for_spec(num_features, action_spec, scale_of_observation=False)
        critic_head = Float32Head(num_features, 1)
        self.shared = critic_encoder is None
        # Collectors drop what starts with an underscore, so the features are not stored with the experience.
        actor_encoder = TensorDictModule(encoder, [observation_key], ["_hidden"])
        actor_head = TensorDictModule(head.module, ["_hidden"], head.parameters)
        if critic_encoder is None:
            critic, critic_head = actor_encoder, ValueOperator(critic_head, ["_hidden"])
            self.joint = ActorValueOperator(actor_encoder, head.actor(action_spec, actor_head), critic_head)
        else:
            critic = TensorDictModule(critic_encoder, [observation_key], ["_critic_hidden"])
            critic_head = ValueOperator(critic_head, ["_critic_hidden"])
            value: Any = [critic, critic_head]
            actor = head.actor(action_spec, actor_encoder, actor_head)
            self.joint = ActorCriticWrapper(actor, TensorDictSequential(*value))
        self.exploration = exploration
        policy = self.joint.get_policy_operator()
        if exploration is not None:
            parts: Any = [actor_encoder, actor_head, exploration]
            policy = ProbabilisticTensorDictSequential(*parts)
        # Views of the same modules: kept out of the module tree, in which every parameter has one name.
        self.__dict__.update(policy=policy, value=self.joint.get_value_operator())
        self.__dict__["_parts"] = (actor_encoder, actor_head, critic, critic_head)
        self._observation_key = observation_key
        self._make_distribution = functools.partial(head.distribution, **head.options)
        self._parameter_names = head.parameters

    @classmethod
    def for_env(
        cls,
        env: EnvBase,
        hidden: Sequence[int] = (64, 64),
        shared: bool = True,
        encoder: nn.Module | None = None,
        activation: type[nn.Module] = nn.Tanh,
        normalize: bool = False,
        state_dependent_noise: bool = False,
    ) -> ActorCritic:
        """Build an actor-critic that fits an environment's specs, on its device.

        Args:
            env: The environment; its specs are read, it is not stepped.
            hidden: Widths of the encoder's layers. Not used if ``encoder`` is given.
            shared: Whether the critic uses the actor's encoder. If not, a given ``encoder`` is copied.
            encoder: Any module that maps the observation to features ``[..., num_features]``; needed for pixels.
            activation: The nonlinearity of the encoder that is built here.
            normalize: Whether the encoder that is built here normalises observations by ``agent.statistics``, which the
                training loop updates.
            state_dependent_noise: Whether the policy explores with `StateDependentNoise`, for which the action must be
                a bounded vector. Call ``agent.exploration.resample()`` after each collection, as the recipes do: until
                then every environment explores in one way.

        Raises:
            ValueError: If the observation or action space is not supported, naming it and what to do.

        Example:
            >>> from fp8rl_torchrl.envs import CustomEnv
            >>> env = CustomEnv(num_envs=4, seed=0)
            >>> agent = ActorCritic.for_env(env, hidden=(64, 64))
            >>> agent.policy(env.reset())["action"].shape
            torch.Size([4])
        """
        key, spec = observation_of(env, encoder)
        statistics = None
        if encoder is not None:
            if normalize:
                raise ValueError("normalize is for the encoder that is built here; leave it out, or leave out encoder")
            encoders = [encoder, encoder if shared else copy.deepcopy(encoder)]
        else:
            statistics = RunningStatistics(spec.shape[-1]).to(env.device) if normalize else None
            encoders = [mlp_encoder(spec.shape[-1], hidden, activation, statistics) for _ in range(1 if shared else 2)]
        encoder, critic_encoder = encoders[0].to(env.device), None if shared else encoders[-1]
        with torch.no_grad():
            num_features = encoder(spec.zero().unsqueeze(0)).shape[-1]
        action_spec, exploration = env.action_spec_unbatched, None
        if state_dependent_noise:
            exploration = StateDependentNoise(env.batch_size.numel(), num_features, action_spec)
        agent = cls(encoder, critic_encoder, num_features, action_spec, key, statistics, exploration)
        return agent.to(env.device)

    def distribution_and_value(self, tensordict: TensorDictBase) -> tuple[Distribution, torch.Tensor]:
        """The action distribution and the state value, without sampling; a shared encoder runs once.

        Args:
            tensordict: Holds the observation ``[..., obs]``; it is not changed.

        Returns:
            The distribution of batch shape ``[...]`` and the value, float32 ``[..., 1]``.
        """
        observation = tensordict[self._observation_key]
        # The layers are called directly: a TensorDictModule costs more than a small layer does.
        encoder, head, _, _ = self._parts
        features = encoder.module(observation)
        parameters = head.module(features)
        parameters = parameters if isinstance(parameters, tuple) else (parameters,)
        distribution = self._make_distribution(**dict(zip(self._parameter_names, parameters, strict=True)))
        return distribution, self.state_value(tensordict, features if self.shared else None)

    def state_value(self, tensordict: TensorDictBase, features: torch.Tensor | None = None) -> torch.Tensor:
        """The state value alone.

        Args:
            tensordict: Holds the observation ``[..., obs]``; it is not changed.
            features: The critic's features, where they are known already.

        Returns:
            float32 ``[..., 1]``.
        """
        _, _, encoder, head = self._parts
        if features is None:
            features = encoder.module(tensordict[self._observation_key])
        return head.module(features)
