"""What every native environment shares: a batch whose whole state travels in the TensorDict, over pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

_Env = TypeVar("_Env", bound="NativeEnv")
_State = TypeVar("_State")
_COUNTERS = ("seed", "index", "episode")
_AT_ROOT = ("step_count", "episode_reward")

Transition = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The next state, the next observation, the reward, ``terminated`` and ``truncated``."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The closed, finite intervals, as (low, high), in which all values of an environment lie: they are its specs."""

    actions: int | tuple[tuple[float, float], ...]
    """How many actions there are, or the interval of each component of a continuous action."""
    observation: tuple[tuple[float, float], ...]
    """Of each component of the observation."""
    state: Mapping[str, tuple[float, float]]
    """Of each float32 field of the state that is physics."""
    reward: tuple[float, float]
    """Of the reward of one step."""
    max_steps: int
    """Of the step count: the longest episode."""

    @property
    def episode_reward(self) -> tuple[float, float]:
        """Of the return. Every addition of a float32 sum may round up by 2^-24 of the sum."""
        low, high = self.reward
        bound = self.max_steps * max(-low, high) * (1 + self.max_steps * 2.0**-23)
        return -bound, bound


def episode_start(
    state_type: Callable[..., _State],
    seed: torch.Tensor,
    index: torch.Tensor,
    episode: torch.Tensor,
    **physics: torch.Tensor,
) -> _State:
    """The state with which an episode starts: its physics, no step and no reward so far, and the counters.

    Args:
        state_type: The NamedTuple class of the state.
        seed: int64 ``[N]``, as `Dynamics.reset` is given it.
        index: int64 ``[N]``, likewise.
        episode: int64 ``[N]``, likewise.
        **physics: float32 ``[N]``, the other fields of the state.
    """
    return state_type(
        **physics,
        step_count=torch.zeros_like(episode),
        episode_reward=torch.zeros_like(episode, dtype=torch.float32),
        seed=seed,
        index=index,
        episode=episode,
    )


class Dynamics(Protocol):
    """The task of a native environment: a frozen dataclass whose fields are its constants, all with defaults.

    Its functions are made of tensor operations alone (no read of a value by the host, no generator, no tensor changed
    in place), so that they can be compiled and captured. A state is a NamedTuple of tensors of shape ``[N]`` (or
    ``[]``): float32 physics, ``step_count`` (int64) and ``episode_reward`` (float32) of the episode so far, and the
    counters ``seed``, ``index``, ``episode`` (int64) that the noise of the start is hashed from.
    """

    @property
    def limits(self) -> Limits:
        """What the specs are made from."""
        ...

    def step(self, state: Any, action: torch.Tensor) -> Transition:
        """Advance by one step; the reward (float32) and both flags (bool) have the shape ``[N]``."""
        ...

    def reset(self, seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> Any:
        """Start an episode: the state as a function of three int64 counters ``[N]``."""
        ...

    def observe(self, state: Any) -> torch.Tensor:
        """What the policy sees of a state, float32 ``[N, obs]``."""
        ...


class NativeEnv(EnvBase):
    """A batch of environments as pure functions of tensors. A subclass names its state and its `Dynamics`.

    Every TensorDict carries the whole state, so a step is a function of the TensorDict alone: an episode can be saved,
    restored and branched by keeping TensorDicts. Start states are hashed from (seed, index, episode number), hence the
    same in eager, compiled and captured runs, and resetting one environment never disturbs another.

    | key | shape | dtype | |
    |---|---|---|---|
    | ``observation`` | ``[N, obs]`` | float32 | |
    | ``action`` | ``[N]`` or ``[N, d]`` | int64, float32 | categorical, or a continuous vector |
    | ``reward`` | ``[N, 1]`` | float32 | |
    | ``terminated`` / ``truncated`` / ``done`` | ``[N, 1]`` | bool | ended by the task / by the step limit / either |
    | ``step_count``, ``episode_reward`` | ``[N, 1]`` | int64, float32 | of the running episode |
    | ``state`` | ``[N]`` | | the other fields of the state: the physics and the counters of the start noise |

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of the dynamics.

    Raises:
        ValueError: If ``num_envs`` is not positive, ``seed`` is not an integer or a constant is out of range.
        TypeError: If a constant is unknown.
    """

    stateless = True
    state_type: ClassVar[type[Any]]
    """The NamedTuple class of the state."""
    dynamics_type: ClassVar[type[Any]]
    """The class of the dynamics, which meets `Dynamics`."""

    dynamics: Any
    """The dynamics, with this environment's constants."""
    pure_step: Callable[[Any, torch.Tensor], Transition]
    """``pure_step(state, action) -> (state, next_observation, reward, terminated, truncated)``: the dynamics' step."""
    pure_reset: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
    """``pure_reset(seed, index, episode) -> state``: the dynamics' reset."""
    observe: Callable[[Any], torch.Tensor]
    """``observe(state) -> observation``, float32 ``[N, obs]``: the dynamics' observe."""

    def __init__(
        self,
        num_envs: int | None = None,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        **constants: float,
    ) -> None:
        known = [field.name for field in fields(self.dynamics_type)]
        if unknown := sorted(set(constants) - set(known)):
            raise TypeError(
                f"{type(self).__name__} has no argument {', '.join(unknown)}; its constants are {', '.join(known)}"
            )
        if num_envs is not None and (isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1):
            raise ValueError(f"num_envs must be a positive integer, or None for a single environment; got {num_envs!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise ValueError(f"seed must be an integer, or None for one that torch draws; got {seed!r}")
        self.num_envs = num_envs
        self.dynamics = self.dynamics_type(**constants)
        # Of the dynamics and not of the environment: a compiler then has no module to guard.
        self.pure_step, self.pure_reset = self.dynamics.step, self.dynamics.reset
        self.observe = self.dynamics.observe
        super().__init__(device=device, batch_size=torch.Size(() if num_envs is None else (num_envs,)))
        self._make_specs(self.dynamics.limits)
        # The counters that the last step or reset saw. TorchRL's auto-reset hands `_reset` nothing but the mask.
        index = torch.zeros((), dtype=torch.int64) if num_envs is None else torch.arange(num_envs)
        for name in ("_seed", "_index", "_episode"):
            self.register_buffer(name, index.to(self.device), persistent=False)
        self._reseeded: torch.Tensor | None
        self.register_buffer("_reseeded", None, persistent=False)
        self.set_seed(int(torch.empty((), dtype=torch.int64).random_() if seed is None else seed))
        self._reseeded = None  # so that a run that was saved elsewhere goes on here with its own seed

    def fresh(self: _Env, num_envs: int | None = None, seed: int | None = None) -> _Env:
        """An independent environment with the same constants, on the same device.

        Args:
            num_envs: The size of the batch; None keeps this one's.
            seed: As in the constructor.
        """
        constants = {field.name: getattr(self.dynamics, field.name) for field in fields(self.dynamics_type)}
        return type(self)(self.num_envs if num_envs is None else num_envs, self.device, seed, **constants)

    def read(self, tensordict: TensorDictBase) -> Any:
        """The state that a TensorDict carries.

        Args:
            tensordict: Of this environment's batch size, as a reset or a step made it.

        Returns:
            A ``state_type``, each field of shape ``[N]``.
        """
        state = tensordict.get("state")
        physics = {name: state.get(name) for name in self.state_type._fields if name not in _AT_ROOT}
        return self.state_type(**physics, **{name: tensordict.get(name).squeeze(-1) for name in _AT_ROOT})

    def write(
        self, state: Any, observation: torch.Tensor, terminated: torch.Tensor, truncated: torch.Tensor
    ) -> TensorDict:
        """The TensorDict that carries a state: what a reset returns, and a step next to its reward.

        Args:
            state: A ``state_type``, each field of shape ``[N]``.
            observation: float32 ``[N, obs]``.
            terminated: bool ``[N]``.
            truncated: bool ``[N]``.

        Returns:
            The entries of the class's table but ``action`` and ``reward``; each is its own tensor.
        """
        # Every entry is its own tensor: a shared one would let a later in-place write reach an earlier TensorDict.
        # What a step passes on as it is, such as the counters, would be shared otherwise.
        entries: dict[str, Any] = {"state": {}}
        for key, value in self.entries(state, observation, terminated, truncated).items():
            if isinstance(key, tuple):
                entries["state"][key[1]] = value.clone()
            else:
                entries[key] = value.clone() if key in ("terminated", "truncated") else value
        entries["state"] = TensorDict(entries["state"], batch_size=self.batch_size, device=self.device)
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def entries(
        self, state: Any, observation: torch.Tensor, terminated: torch.Tensor, truncated: torch.Tensor
    ) -> dict[Any, torch.Tensor]:
        """What `write` puts into a TensorDict, by key, without a copy: for programs that make columns of it."""
        physics = {("state", name): value for name, value in state._asdict().items() if name not in _AT_ROOT}
        return {
            "observation": observation,
            **physics,
            "step_count": state.step_count.unsqueeze(-1),
            "episode_reward": state.episode_reward.unsqueeze(-1),
            "terminated": terminated.unsqueeze(-1),
            "truncated": truncated.unsqueeze(-1),
            "done": (terminated | truncated).unsqueeze(-1),
        }

    def _make_specs(self, limits: Limits) -> None:
        batch, device = self.batch_size, self.device

        def interval(low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Bounded:
            return Bounded(low, high, torch.Size((*batch, *shape)), dtype=dtype, device=device)

        def vector(intervals: tuple[tuple[float, float], ...]) -> Bounded:
            low, high = torch.tensor(intervals, device=device).T.unbind()
            return Bounded(low.expand(*batch, -1), high.expand(*batch, -1), dtype=torch.float32, device=device)

        def composite(entries: Mapping[str, TensorSpec]) -> Composite:
            return Composite({name: spec.clone() for name, spec in entries.items()}, shape=batch, device=device)

        counter = Unbounded(batch, dtype=torch.int64, device=device)
        physics = {name: interval(*bounds) for name, bounds in limits.state.items()}
        carried = {
            "step_count": interval(0, limits.max_steps, 1, dtype=torch.int64),
            "episode_reward": interval(*limits.episode_reward, 1),
            "state": composite({**physics, **dict.fromkeys(_COUNTERS, counter)}),
        }
        self.observation_spec = composite({"observation": vector(limits.observation), **carried})
        self.state_spec = composite(carried)
        if isinstance(limits.actions, int):
            self.action_spec = Categorical(limits.actions, shape=batch, dtype=torch.int64, device=device)
        else:
            self.action_spec = vector(limits.actions)
        self.reward_spec = interval(*limits.reward, 1)
        flag = Categorical(2, shape=torch.Size((*batch, 1)), dtype=torch.bool, device=device)
        self.done_spec = composite(dict.fromkeys(("done", "terminated", "truncated"), flag))

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            return
        count = self.batch_size.numel()
        self._index = torch.arange(count, device=self.device).reshape(self.batch_size)
        self._seed = torch.full_like(self._index, seed & (2**63 - 1))
        self._episode = torch.full_like(self._index, -1)
        # Running episodes still carry the old seed; until its next reset, an environment must not take it back from
        # them. A collector, for one, is seeded after it has reset its environment.
        self._reseeded = torch.ones_like(self._index, dtype=torch.bool)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        state = self.read(tensordict)
        self.remember(state)
        state, observation, reward, terminated, truncated = self.pure_step(state, tensordict.get("action"))
        return self.write(state, observation, terminated, truncated).set("reward", reward.unsqueeze(-1))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if tensordict is not None and "state" in tensordict.keys():
            self.remember(self.read(tensordict))
        new = torch.ones_like(self._episode) if mask is None else mask.reshape(self.batch_size).long()
        state = self.pure_reset(self._seed, self._index, self._episode + new)
        self._seed, self._index, self._episode = state.seed, state.index, state.episode
        if self._reseeded is not None:
            self._reseeded = None if mask is None else self._reseeded & (new == 0)
        running = torch.zeros_like(self._episode, dtype=torch.bool)
        return self.write(state, self.observe(state), running, running)

    def remember(self, state: Any) -> None:
        """Go on from a state's counters: the next reset, which may be handed nothing, starts the episodes after these.

        Args:
            state: A ``state_type``, each field of shape ``[N]``.
        """
        seen = (state.seed, state.index, state.episode)
        if self._reseeded is not None:
            own = (self._seed, self._index, self._episode)
            seen = tuple(torch.where(self._reseeded, mine, theirs) for mine, theirs in zip(own, seen, strict=True))
        self._seed, self._index, self._episode = seen
