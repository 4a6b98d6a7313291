"""`ActorCritic`: an actor and a critic as TensorDictModules, with one encoder for both or one for each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Distribution
from torchrl.data import Bounded, TensorSpec
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import EnvBase
from torchrl.modules import (
    ActorCriticWrapper,
    ActorValueOperator,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)

from fp8rl_torchrl.models.categorical import Categorical
from fp8rl_torchrl.models.networks import Float32Head, mlp_encoder


class ActorCritic(nn.Module):
    """An actor and a critic over one observation, sharing an encoder or not.

    | part | reads | writes |
    |---|---|---|
    | ``policy`` | ``observation`` | the distribution's parameters, ``action``, ``action_log_prob`` |
    | ``value`` | ``observation`` | ``state_value`` (float32 ``[..., 1]``) |
    | ``joint`` | ``observation`` | all of the above; a shared encoder runs once |

    ``policy`` samples, or takes the mode under ``set_exploration_type(ExplorationType.DETERMINISTIC)``. The heads
    return FP32 whatever the encoder ran in. A categorical action has ``logits`` (float32 ``[..., n]``); a bounded
    continuous one has ``loc`` and ``scale`` of a tanh-Normal scaled to the bounds.

    Args:
        encoder: Maps the observation to features ``[..., num_features]``.
        critic_encoder: The critic's own encoder; None shares the actor's.
        num_features: Size of the features.
        action_spec: The (unbatched) spec of the action.
        observation_key: The entry that the encoder reads.

    Raises:
        ValueError: If the action space is neither categorical nor bounded and continuous.
    """

    policy: ProbabilisticActor
    value: TensorDictModule
    _parts: tuple[TensorDictModule, TensorDictModule, TensorDictModule, TensorDictModule]

    def __init__(
        self,
        encoder: nn.Module,
        critic_encoder: nn.Module | None,
        num_features: int,
        action_spec: TensorSpec,
        observation_key: str = "observation",
    ) -> None:
        super().__init__()
        head, parameters, distribution, options = _actor_head(num_features, action_spec)
        critic_head = Float32Head(num_features, 1)
        self.shared = critic_encoder is None
        # Collectors drop what starts with an underscore, so the features are not stored with the experience.
        actor_out = "_hidden" if self.shared else "_actor_hidden"
        actor_encoder = TensorDictModule(encoder, [observation_key], [actor_out])
        actor_head = TensorDictModule(head, [actor_out], parameters)

        def actor(*parts: Any) -> ProbabilisticActor:
            return ProbabilisticActor(
                TensorDictSequential(*parts),
                in_keys=parameters,
                out_keys=["action"],
                spec=action_spec,
                distribution_class=distribution,
                distribution_kwargs=options,
                return_log_prob=True,
                default_interaction_type=InteractionType.RANDOM,  # TorchRL's own default is the mode
            )

        if critic_encoder is None:
            critic, critic_head = actor_encoder, ValueOperator(critic_head, ["_hidden"])
            self.joint = ActorValueOperator(actor_encoder, actor(actor_head), critic_head)
        else:
            critic = TensorDictModule(critic_encoder, [observation_key], ["_critic_hidden"])
            critic_head = ValueOperator(critic_head, ["_critic_hidden"])
            value: Any = [critic, critic_head]
            self.joint = ActorCriticWrapper(actor(actor_encoder, actor_head), TensorDictSequential(*value))
        # Views of the same modules: kept out of the module tree, in which every parameter has one name.
        self.__dict__.update(policy=self.joint.get_policy_operator(), value=self.joint.get_value_operator())
        self.__dict__["_parts"] = (actor_encoder, actor_head, critic, critic_head)
        self._observation_key = observation_key
        self._make_distribution = functools.partial(distribution, **options)
        self._parameter_names = parameters

    @classmethod
    def for_env(
        cls,
        env: EnvBase,
        hidden: Sequence[int] = (64, 64),
        shared: bool = True,
        encoder: nn.Module | None = None,
        activation: type[nn.Module] = nn.Tanh,
    ) -> ActorCritic:
        """Build an actor-critic that fits an environment's specs, on its device.

        Args:
            env: The environment; its specs are read, it is not stepped.
            hidden: Widths of the encoder's layers. Not used if ``encoder`` is given.
            shared: Whether the critic uses the actor's encoder. If not, a given ``encoder`` is copied.
            encoder: Any module that maps the observation to features ``[..., num_features]``; needed for pixels.
            activation: The nonlinearity of the encoder that is built here.

        Raises:
            ValueError: If the observation or action space is not supported, naming it and what to do.

        Example:
            >>> from fp8rl_torchrl.envs import CustomEnv
            >>> env = CustomEnv(num_envs=4, seed=0)
            >>> agent = ActorCritic.for_env(env, hidden=(64, 64))
            >>> agent.policy(env.reset())["action"].shape
            torch.Size([4])
        """
        key, spec = _observation(env, encoder)
        if encoder is not None:
            encoders = [encoder, encoder if shared else copy.deepcopy(encoder)]
        else:
            encoders = [mlp_encoder(spec.shape[-1], hidden, activation) for _ in range(1 if shared else 2)]
        encoder, critic_encoder = encoders[0].to(env.device), None if shared else encoders[-1]
        with torch.no_grad():
            num_features = encoder(spec.zero().unsqueeze(0)).shape[-1]
        return cls(encoder, critic_encoder, num_features, env.action_spec_unbatched, key).to(env.device)

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


def _observation(env: EnvBase, encoder: nn.Module | None) -> tuple[str, TensorSpec]:
    """The key and the unbatched spec of the entry that the agent observes."""
    specs = env.observation_spec_unbatched
    key = next((name for name in ("observation", "pixels") if name in specs.keys()), None)
    if key is None:
        raise ValueError(
            f"the environment has no entry 'observation' (nor 'pixels'), only {sorted(map(str, specs.keys()))}; "
            "gather what the agent should see with torchrl.envs.CatTensors(in_keys=[...], out_key='observation')"
        )
    spec = specs[key]
    if encoder is None:
        if len(spec.shape) != 1:
            raise ValueError(
                f"{key!r} has shape {tuple(spec.shape)}, not that of a vector: for pixels (and other arrays) pass "
                "encoder=, a module that maps a batch of them to feature vectors"
            )
        if not spec.dtype.is_floating_point:
            raise ValueError(
                f"{key!r} holds {spec.dtype} numbers: pass encoder= (such as torch.nn.Embedding) or a transform that "
                "makes it a floating-point vector"
            )
    return key, spec


def _actor_head(
    num_features: int, action_spec: TensorSpec
) -> tuple[nn.Module, list[Any], type[Distribution], dict[str, object]]:
    """The head, the names of what it writes, and the distribution that these parametrise."""
    if type(action_spec) is CategoricalSpec and action_spec.shape == ():
        # Arguments are not validated, since that reads the logits on the host at every construction.
        return Float32Head(num_features, action_spec.n, 0.01), ["logits"], Categorical, {"validate_args": False}
    if isinstance(action_spec, Bounded) and action_spec.dtype.is_floating_point and len(action_spec.shape) == 1:
        head = nn.Sequential(Float32Head(num_features, 2 * action_spec.shape[-1], 0.01), NormalParamExtractor())
        space: Any = action_spec.space
        bounds = {"low": space.low, "high": space.high}
        if not all(bound.isfinite().all() for bound in bounds.values()):
            raise ValueError(f"the action space is unbounded ({action_spec}); a tanh-Normal policy needs finite bounds")
        return head, ["loc", "scale"], TanhNormal, {**bounds, "tanh_loc": False}
    raise ValueError(
        f"unsupported action space {action_spec}: the actor has a head for a categorical action (one integer) and for "
        "a bounded continuous vector"
    )
