"""A native task beside Gymnasium's own: single steps from the same states, and the states that episodes start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from episode_returns import CRITICAL, scaled_distance


class Steps(NamedTuple):
    """Steps of Gymnasium, in float64."""

    before: np.ndarray  # [steps, k]: the physics
    step_count: np.ndarray
    action: np.ndarray
    after: np.ndarray  # [steps, k]
    observation: np.ndarray  # [steps, obs]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Twin:
    """What is to be known of a task to compare both forms of it."""

    id: str
    env: type
    seen: tuple[int, ...]
    """For each component of an observation, the number of the state that it is, or is the sine or cosine of."""
    turning: tuple[int, ...] = ()
    """The numbers that are equal modulo one turn."""
    near: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda after, bound: np.zeros(len(after), dtype=bool)
    """States ``[steps, k]`` so close to where an episode terminates that an error within ``bound`` may decide."""
    reward_error: float = 0.0
    """By how much a reward may differ, besides the rounding of itself."""

    @property
    def dynamics(self) -> Any:
        return self.env.dynamics_type()

    def states(self, physics: np.ndarray, step_count: Any = 0, dtype: torch.dtype = torch.float32) -> Any:
        """States of shape [N] from physics [N, k], at a step count or at one for each."""
        values = torch.as_tensor(np.asarray(physics), dtype=dtype)
        count = torch.zeros(len(values), dtype=torch.int64) + torch.as_tensor(step_count)
        zero = torch.zeros_like(count)
        return self.env.state_type(*values.unbind(-1), count, count.to(dtype), zero, zero, zero)

    def physics(self, state: Any) -> np.ndarray:
        """The physics [N, k] of a state, in float64."""
        return torch.stack(tuple(state)[: len(state) - 5], -1).double().numpy()


def visited(twin: Twin, drive: Callable[[int, np.ndarray, Any], Any], episodes: int) -> Steps:
    """Every step of some Gymnasium episodes; ``drive(episode, state, noise)`` acts."""
    env, noise, rows = gymnasium.make(twin.id), np.random.default_rng(0), []
    for episode in range(episodes):
        env.reset(seed=episode)
        over, count = False, 0
        while not over:
            before = np.array(env.unwrapped.state, dtype=np.float64)
            action = drive(episode, before, noise)
            seen, reward, terminated, truncated, _ = env.step(action)
            after = np.array(env.unwrapped.state, dtype=np.float64)
            rows.append((before, count, action, after, seen, reward, terminated, truncated))
            over, count = terminated or truncated, count + 1
    return Steps(*map(np.array, zip(*rows, strict=True)))


def anywhere(twin: Twin, actions: Callable[[Any, int], np.ndarray], count: int = 4096) -> Steps:
    """A step of Gymnasium from random states in all of the state's limits, each of them a float32."""
    env, noise, rows = gymnasium.make(twin.id).unwrapped, np.random.default_rng(1), []
    low, high = np.array(list(twin.dynamics.limits.state.values())).T
    states = noise.uniform(low, high, (count, len(low))).astype(np.float32).astype(np.float64)
    for before, action in zip(states, actions(noise, count), strict=True):
        env.reset()
        env.state = before.copy()
        seen, reward, terminated, truncated, _ = env.step(action)
        after = np.array(env.state, dtype=np.float64)
        rows.append((before, 0, action, after, seen, reward, terminated, truncated))
    return Steps(*map(np.array, zip(*rows, strict=True)))


def four_ulp(values: np.ndarray) -> np.ndarray:
    """4 float32 ulp of the scale of each column: of its largest magnitude."""
    return 4 * np.spacing(np.abs(values).max(0).astype(np.float32)).astype(np.float64)


def assert_agrees(
    twin: Twin, step: Callable[[Any, Any], Any], steps: Steps, bound: Any = None, dtype: torch.dtype = torch.float32
) -> None:
    """One native step from every state gives Gymnasium's, within a bound for each number of the state.

    By default the bound is 4 float32 ulp of the number's scale, its largest magnitude in these steps. An observation
    has the bound of the number it is made from, as a sine moves no farther than its angle, and half an ulp more, which
    Gymnasium rounds away. Where an error within the bound decides about the end, neither it nor the reward is compared.
    """
    bound = four_ulp(steps.before) if bound is None else bound * np.abs(steps.before).max(0)
    start = twin.states(steps.before, torch.as_tensor(steps.step_count), dtype)
    following, observation, reward, terminated, truncated = step(start, torch.as_tensor(steps.action))

    error = np.abs(twin.physics(following) - steps.after)
    turn = list(twin.turning)
    error[:, turn] = np.minimum(error[:, turn], 2 * np.pi - error[:, turn])
    assert (error <= bound).all(), error.max(0) / bound

    seen = twin.env.dynamics_type.observe(following)
    torch.testing.assert_close(observation, seen, rtol=0, atol=2.0**-22)  # generated code may have another sine
    rounded = bound[list(twin.seen)] + four_ulp(steps.observation) / 8
    error = np.abs(observation.double().numpy() - steps.observation)
    assert (error <= rounded).all(), error.max(0) / rounded

    far = ~twin.near(steps.after, bound)
    assert far.mean() > 0.99
    error = np.abs(reward.double().numpy() - steps.reward)[far]
    assert (error <= four_ulp(steps.reward[:, None]) + twin.reward_error).all(), error.max()
    assert torch.equal(following.episode_reward, start.episode_reward + reward)
    assert np.array_equal(terminated.numpy()[far], steps.terminated[far])
    assert np.array_equal(truncated.numpy(), steps.truncated)
    assert np.array_equal(following.step_count.numpy(), steps.step_count + 1)


def step_of(env: Any) -> Callable[[Any, Any], Any]:
    """A step of an environment of as many as there are states, injected into the TensorDict, as a user would."""

    def step(state: Any, action: torch.Tensor) -> Any:
        no = torch.zeros_like(state.episode, dtype=torch.bool)
        following = env.step(env.write(state, env.observe(state), no, no).set("action", action))["next"]
        ends = (following[name].squeeze(-1) for name in ("reward", "terminated", "truncated"))
        return env.read(following), following["observation"], *ends

    return step


def assert_starts_agree(twin: Twin, dynamics: Any, count: int = 2000) -> None:
    """Each number of the start states has the distribution of Gymnasium's (two samples, Kolmogorov-Smirnov)."""
    env, index = gymnasium.make(twin.id), torch.arange(count)
    theirs = []
    for seed in range(count):
        env.reset(seed=seed)
        theirs.append(np.array(env.unwrapped.state, dtype=np.float64))
    ours = dynamics.reset(torch.zeros_like(index), index, torch.zeros_like(index))
    for mine, column in zip(twin.physics(ours).T, np.array(theirs).T, strict=True):
        assert scaled_distance(mine, column) < CRITICAL
    assert not ours.step_count.any()
    assert not ours.episode_reward.any()
