"""Evaluation of a policy on complete episodes, without updates and without touching the training run."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.checkpoint import GlobalRNGState
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

MAX_PARALLEL = 100


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The outcome of an evaluation, one entry an episode."""

    returns: tuple[float, ...]
    """Undiscounted sum of rewards of each episode."""
    lengths: tuple[int, ...]
    """Steps of each episode."""
    mean: float = field(init=False)
    """Mean return."""
    std: float = field(init=False)
    """Standard deviation of the returns over episodes (population)."""

    def __post_init__(self) -> None:
        """Compute the statistics."""
        mean = math.fsum(self.returns) / len(self.returns)
        variance = math.fsum((value - mean) ** 2 for value in self.returns) / len(self.returns)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", math.sqrt(variance))


def evaluate(
    policy: Callable[[TensorDictBase], TensorDictBase],
    env: EnvBase | Callable[[], EnvBase],
    episodes: int = 20,
    *,
    seed: int = 1_000_003,
    deterministic: bool = True,
    max_episode_steps: int = 100_000,
) -> EvalResult:
    """Run a policy for a number of complete episodes.

    Each parallel environment plays a quota of episodes that is fixed beforehand: were the first finished ones taken,
    short episodes would count more often. The episodes run on a fresh copy of the environment with its own seed, and
    the global random streams are put back, so a training run is the same with and without evaluations.

    Args:
        policy: Writes ``action`` into the TensorDict it is given.
        env: The environment to copy: one of this package's (it offers ``fresh``), any that can be deep-copied, or a
            function that builds a new one.
        episodes: The number of complete episodes.
        seed: Seed of the evaluation episodes; the same seed gives the same start states.
        deterministic: Take the mode of the action distribution; False samples.
        max_episode_steps: A longer episode is an error.

    Returns:
        Returns and lengths, ordered by environment and then by time.

    Raises:
        ValueError: If ``episodes`` is not positive, ``seed`` is out of range, or the environment cannot be copied.
        TypeError: If ``policy`` cannot be called, as a whole agent cannot, or ``env`` is no environment.
        RuntimeError: If an episode does not end within ``max_episode_steps``.

    Example:
        >>> from fp8rl_torchrl import ActorCritic, envs
        >>> env = envs.CustomEnv(num_envs=4, seed=0)
        >>> len(evaluate(ActorCritic.for_env(env).policy, env, episodes=6).returns)
        6
    """
    if isinstance(policy, nn.Module) and type(policy).forward is nn.Module.forward:
        raise TypeError(f"evaluate takes a policy, not the whole {type(policy).__name__}: pass its .policy")
    if isinstance(policy, EnvBase) or not callable(policy) or not (callable(env) or isinstance(env, EnvBase)):
        raise TypeError(
            f"evaluate takes a policy, then an environment; got {type(policy).__name__} and {type(env).__name__}"
        )
    if episodes < 1:
        raise ValueError(f"episodes must be >= 1; got {episodes}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2^32); got {seed}")
    exploration = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with _random_streams_put_back(), _eval_mode(policy), torch.no_grad(), set_exploration_type(exploration):
        torch.manual_seed(seed)
        test_env = _independent_copy(env, episodes, seed)
        try:
            finished = _play(policy, test_env, episodes, max_episode_steps)
        finally:
            test_env.close(raise_if_closed=False)
    return EvalResult(returns=tuple(r for r, _ in finished), lengths=tuple(n for _, n in finished))


def _play(
    policy: Callable[[TensorDictBase], TensorDictBase], env: EnvBase, episodes: int, max_episode_steps: int
) -> list[tuple[float, int]]:
    num_envs = env.batch_size.numel()
    quota = [episodes // num_envs + (place < episodes % num_envs) for place in range(num_envs)]
    finished: list[list[tuple[float, int]]] = [[] for _ in range(num_envs)]
    returns = torch.zeros(num_envs, dtype=torch.float64)
    lengths = torch.zeros(num_envs, dtype=torch.int64)
    tensordict = env.reset()
    while any(len(done) < wanted for done, wanted in zip(finished, quota, strict=True)):
        stepped, tensordict = env.step_and_maybe_reset(policy(tensordict))
        following = stepped.get("next")
        returns += following.get("reward").reshape(num_envs, -1).sum(-1).double().cpu()
        lengths += 1
        for place in following.get("done").reshape(num_envs, -1).any(-1).nonzero().flatten().tolist():
            if len(finished[place]) < quota[place]:
                finished[place].append((returns[place].item(), int(lengths[place])))
            returns[place], lengths[place] = 0.0, 0
        if lengths.max() >= max_episode_steps:
            raise RuntimeError(f"an episode has not ended after {max_episode_steps:,} steps (max_episode_steps)")
    return [episode for done in finished for episode in done]


def _independent_copy(env: Any, episodes: int, seed: int) -> EnvBase:
    if not isinstance(env, EnvBase):
        built: EnvBase = env()
        built.set_seed(seed)
        return built
    # Asked of the class: a TransformedEnv hands the question on to the env inside, whose copy lacks the transforms.
    fresh = getattr(type(env), "fresh", None)
    try:
        if fresh is not None:
            return fresh(env, num_envs=min(episodes, MAX_PARALLEL), seed=seed)
        copied = copy.deepcopy(env)
    except Exception as error:
        raise ValueError(
            f"{type(env).__name__} cannot be copied for evaluation ({error}); pass a function that builds a new one "
            "instead of the environment"
        ) from error
    copied.set_seed(seed)
    return copied


@contextlib.contextmanager
def _random_streams_put_back() -> Iterator[None]:
    streams = GlobalRNGState()
    before = streams.state_dict()
    try:
        yield
    finally:
        streams.load_state_dict(before)


@contextlib.contextmanager
def _eval_mode(policy: object) -> Iterator[None]:
    training = [module for module in policy.modules() if module.training] if isinstance(policy, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
