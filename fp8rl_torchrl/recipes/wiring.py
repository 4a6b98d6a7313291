"""The lines that every recipe begins and ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import EnvBase

from fp8rl_torchrl.data.collect import make_collector
from fp8rl_torchrl.data.fused import FusedCollector
from fp8rl_torchrl.models.actor_critic import ActorCritic
from fp8rl_torchrl.models.exploration import StateDependentNoise
from fp8rl_torchrl.precision.convert import ConversionReport, convert
from fp8rl_torchrl.precision.twin import twin
from fp8rl_torchrl.recipes.config import RecipeConfig
from fp8rl_torchrl.recipes.schedules import lr_factor
from fp8rl_torchrl.recipes.seeding import seed_everything
from fp8rl_torchrl.training.flat import FlatParameter
from fp8rl_torchrl.training.loop import Pipeline, Report
from fp8rl_torchrl.training.step import OptimStep

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Parts(NamedTuple):
    """What a recipe begins with: environment, networks, collector, and what was converted to FP8."""

    env: EnvBase
    agent: Any
    collector: BaseCollector
    conversion: ConversionReport | None


def convert_agent(config: RecipeConfig, agent: nn.Module) -> ConversionReport | None:
    """Replace the linear layers of the networks, in place, where the precision is an fp8 one.

    Raises:
        ConversionError: If no layer can be replaced.
    """
    precision = config.make_precision()
    return convert(agent, precision, config.fp8_skip) if precision.fp8_recipe else None


def rollout_policy(config: RecipeConfig, policy: Any) -> Any:
    """The policy that collects: the learner's own where that runs in FP32, else its twin."""
    precision = config.make_rollout_precision()
    learner_is_fp8 = config.make_precision().fp8_recipe is not None
    if precision.name == "fp32" and not learner_is_fp8:
        return policy
    converts = precision.fp8_recipe is not None and not learner_is_fp8
    return twin(policy, precision, config.fp8_skip if converts else ())


def make_parts(config: RecipeConfig, make_agent: Callable[[EnvBase], Any], **options: Any) -> Parts:
    """What every (resolved) recipe begins with, in this order, which decides about the random numbers.

    Args:
        config: The options.
        make_agent: Makes the networks for an environment.
        **options: Those of the collector.
    """
    seed_everything(config.seed, config.deterministic)
    env = config.make_env()
    agent = make_agent(env)
    conversion = convert_agent(config, agent)
    return Parts(env, agent, collector_for(config, env, agent.policy, **options), conversion)


def make_actor_critic(config: RecipeConfig, env: EnvBase, shared: bool = True, **options: Any) -> ActorCritic:
    """An actor-critic, not yet converted; other options are those of `ActorCritic.for_env`."""
    activation, normalize = ACTIVATIONS[config.activation], config.normalize_observation
    return ActorCritic.for_env(env, config.hidden, shared, activation=activation, normalize=normalize, **options)


def collector_for(config: RecipeConfig, env: EnvBase, policy: Any, **options: Any) -> BaseCollector:
    """The collector that the (resolved) configuration names, on a policy in the rollout's precision."""
    policy = rollout_policy(config, policy)
    if config.collector == "torchrl":
        return make_collector(env, policy, config.frames_per_collection, **options)
    return FusedCollector(
        env,
        policy,
        frames_per_batch=config.frames_per_collection,
        compile=config.compile == "on",
        cudagraph=config.cudagraph == "on",
        **options,
    )


def make_step(config: RecipeConfig, loss: nn.Module, **options: Any) -> OptimStep:
    """The update: Adam on all parameters of a loss as one, in the learner's precision.

    Args:
        config: The options.
        loss: The loss.
        **options: Those of `OptimStep`; ``optimizer`` may be given here instead.
    """
    optimizer = options.pop("optimizer", None) or make_optimizer(config, loss.parameters())
    return OptimStep(
        loss,
        optimizer,
        config.make_precision(),
        max_grad_norm=config.max_grad_norm,
        lr_schedule=lr_factor(config.lr_schedule, config.lr_decay_updates or 1, config.lr_final),
        compile=config.compile == "on",
        cudagraph=config.cudagraph == "on",
        **options,
    )


def make_optimizer(config: RecipeConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam on parameters as one."""
    return torch.optim.Adam([FlatParameter(parameters)], lr=config.initial_lr(), fused=True)


def make_pipeline(
    config: RecipeConfig,
    parts: Parts,
    loss: Any,
    step: OptimStep,
    replay: TensorDictReplayBuffer | None,
    **options: Any,
) -> Pipeline:
    """Put the parts together; what the configuration says of rewards, observations and exploration comes with it.

    Args:
        config: The options.
        parts: What `make_parts` returned.
        loss: The loss.
        step: The update.
        replay: The buffer, if there is one.
        **options: Those of `Pipeline`.
    """
    prepare: Any = options.pop("prepare", None)
    after: Any = options.pop("after_collection", None)
    statistics, exploration = (getattr(parts.agent, name, None) for name in ("statistics", "exploration"))

    def complete(rollout: TensorDictBase) -> TensorDictBase:
        rollout = _rescaled(config, rollout)
        return rollout if prepare is None else prepare(rollout)

    def finish(rollout: TensorDictBase, report: Report) -> None:
        if statistics is not None:  # only now: the updates saw the observations as the collecting policy did
            statistics.update(rollout["observation"])
        if isinstance(exploration, StateDependentNoise):
            exploration.resample()
        if after is not None:
            after(rollout, report)

    return Pipeline(
        parts.env,
        parts.agent,
        parts.collector,
        replay,
        loss,
        step,
        config,
        parts.conversion,
        prepare=complete,
        after_collection=finish,
        **options,
    )


def _rescaled(config: RecipeConfig, rollout: TensorDictBase) -> TensorDictBase:
    if config.reward_scale == 1 and config.reward_clip is None:
        return rollout
    reward = rollout["next", "reward"] * config.reward_scale
    if config.reward_clip is not None:
        reward = reward.clamp(-config.reward_clip, config.reward_clip)
    return rollout.copy().set(("next", "reward"), reward)
