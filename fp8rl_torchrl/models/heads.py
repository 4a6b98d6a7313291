"""What an agent observes, and the heads of actors: from an environment's specs to distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict.nn import AddStateIndependentNormalScale, InteractionType, TensorDictSequential
from torch import nn
from torch.distributions import Distribution
from torchrl.data import Bounded, TensorSpec
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import EnvBase
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from fp8rl_torchrl.models.categorical import Categorical
from fp8rl_torchrl.models.networks import Float32Head


def observation_of(env: EnvBase, encoder: nn.Module | None) -> tuple[str, TensorSpec]:
    """The key and the unbatched spec of the entry that the agent observes."""
    if not hasattr(env, "observation_spec_unbatched"):
        raise TypeError(
            f"an agent is built for an environment, such as fp8rl_torchrl.envs.make('CartPole-v1', num_envs=8); got "
            f"{env!r}"
        )
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


@dataclass(frozen=True, kw_only=True)
class ActorHead:
    """The last layer of a stochastic actor, and the distribution that its output parametrises."""

    module: nn.Module
    """Maps features to the parameters, float32."""
    parameters: list[Any]
    """What these are called, such as ``logits``."""
    distribution: type[Distribution]
    """The distribution of the action."""
    options: dict[str, Any]
    """Its other arguments."""

    @classmethod
    def for_spec(cls, num_features: int, action_spec: TensorSpec, scale_of_observation: bool = True) -> ActorHead:
        """The head for an (unbatched) action: logits of a categorical one, a tanh-Normal of a bounded vector.

        Args:
            num_features: Size of the features.
            action_spec: What the action must be.
            scale_of_observation: Whether the Normal's scale is computed from the features, or is a parameter of its
                own, the same for all observations.

        Raises:
            ValueError: If the action is neither.
        """
        if type(action_spec) is CategoricalSpec and action_spec.shape == ():
            return cls(
                module=Float32Head(num_features, action_spec.n, 0.01),
                parameters=["logits"],
                distribution=Categorical,
                # Arguments are not validated, since that reads the logits on the host at every construction.
                options={"validate_args": False},
            )
        bounds = bounds_of(action_spec)
        if bounds is None:
            raise ValueError(
                f"unsupported action space {in_words(action_spec)}: the actor has a head for a categorical action (one "
                "integer) and for a bounded continuous vector"
            )
        size = action_spec.shape[-1]
        scale = NormalParamExtractor() if scale_of_observation else AddStateIndependentNormalScale(size)
        return cls(
            module=nn.Sequential(Float32Head(num_features, (1 + scale_of_observation) * size, 0.01), scale),
            parameters=["loc", "scale"],
            distribution=TanhNormal,
            options={**bounds, "tanh_loc": False},
        )

    def actor(self, action_spec: TensorSpec, *parts: Any) -> ProbabilisticActor:
        """The actor made of TensorDict modules, the last of which writes the parameters; it samples by default."""
        return ProbabilisticActor(
            TensorDictSequential(*parts),
            in_keys=self.parameters,
            out_keys=["action"],
            spec=action_spec,
            distribution_class=self.distribution,
            distribution_kwargs=self.options,
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,  # TorchRL's own default is the mode
        )


def bounds_of(action_spec: TensorSpec) -> dict[str, torch.Tensor] | None:
    """The interval ``low`` to ``high`` (each ``[d]``) of a continuous action; None if it is no bounded vector.

    Raises:
        ValueError: If a bound is infinite.
    """
    if not isinstance(action_spec, Bounded) or not action_spec.dtype.is_floating_point or len(action_spec.shape) != 1:
        return None
    space: Any = action_spec.space
    bounds = {"low": space.low, "high": space.high}
    if not all(bound.isfinite().all() for bound in bounds.values()):
        raise ValueError(f"the action space is unbounded ({action_spec}); a tanh-Normal policy needs finite bounds")
    return bounds


def in_words(action_spec: TensorSpec) -> str:
    """An action in a few words, for messages."""
    kind = "one of several integers" if type(action_spec) is CategoricalSpec else type(action_spec).__name__
    if isinstance(action_spec, Bounded) and action_spec.dtype.is_floating_point:
        kind = "bounded and continuous"
    return f"{kind} of shape {tuple(action_spec.shape)}"
