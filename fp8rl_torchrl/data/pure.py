"""Environments as pure functions of tensors: what they offer, and many of their steps as one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, TensorSpec
from torchrl.envs import EnvBase

PURE = ("pure_step", "pure_reset", "observe", "read", "write", "entries")

AHEAD = 32
"""Episodes of each environment in a table of starts, on a CPU."""

_COUNTERS = ("seed", "index", "episode")
"""Fields of a state of which a reset changes the last alone, by one."""


class PureEnv(Protocol):
    """What a `FusedCollector` needs of an environment besides `EnvBase`; `fp8rl_torchrl.envs.NativeEnv` offers it.

    A state is a NamedTuple of tensors ``[N, ...]`` with, among others, the int64 counters ``seed``, ``index`` and
    ``episode``. The first three are pure functions of tensors: no generator, no read of a value by the host.
    """

    def pure_step(
        self, state: Any, action: torch.Tensor
    ) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next state, the next observation, the reward (float32 ``[N]``), ``terminated``, ``truncated``."""
        ...

    def pure_reset(self, seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> Any:
        """The state at the start of an episode."""
        ...

    def observe(self, state: Any) -> torch.Tensor:
        """The observation ``[N, ...]`` of a state, the same that a step into this state returns."""
        ...

    def read(self, tensordict: TensorDictBase) -> Any:
        """The state that a TensorDict carries."""
        ...

    def write(
        self, state: Any, observation: torch.Tensor, terminated: torch.Tensor, truncated: torch.Tensor
    ) -> TensorDict:
        """The TensorDict that carries a state: what a reset returns, and a step next to its reward."""
        ...

    def entries(
        self, state: Any, observation: torch.Tensor, terminated: torch.Tensor, truncated: torch.Tensor
    ) -> dict[Any, torch.Tensor]:
        """What ``write`` puts into a TensorDict, by key; may share memory with the state."""
        ...


class Table(NamedTuple):
    """Where the next episodes of each environment start."""

    before: torch.Tensor
    """int64 ``[N]``: the number of the episode before the first of them."""
    states: tuple[torch.Tensor, ...]
    """Their states, each field ``[episodes, N, ...]``."""


class Starts:
    """Looks up where episodes start, instead of computing it at every step.

    Hashing in every step would take minutes to compile, and in eager mode most of the time. On a CPU, where reading a
    value costs nothing, a table serves until some environment may come to its end; on a GPU each block has its own.

    Args:
        env: The environment.
        on_gpu: Applied to the function that computes a table, on a GPU, to compile it. On a CPU that is too rare.
    """

    def __init__(self, env: PureEnv, on_gpu: Callable[[Callable[..., Any]], Any] = lambda function: function) -> None:
        self.env = env
        self._compute_on_gpu = on_gpu(self._compute)
        self._table: Table | None = None

    def ahead(self, state: Any, steps: int) -> Table:
        """A table that lasts for some steps from a state on."""
        if state.episode.device.type != "cpu":
            return self._compute_on_gpu(state.seed, state.index, state.episode, steps)
        known = self._table
        if known is None or int((state.episode - known.before).max()) + steps > len(known.states[0]):
            self._table = known = self._compute(state.seed, state.index, state.episode, max(steps, AHEAD))
        return known

    def forget(self) -> None:
        """What is looked up next may be other environments: of another seed, or another place in their episodes."""
        self._table = None

    def _compute(self, seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor, episodes: int) -> Table:
        ahead = torch.arange(1, episodes + 1, device=episode.device).reshape(-1, *[1] * episode.ndim) + episode
        # A copy: a block that is given the same tensor twice is compiled for that, and again when they differ.
        return Table(episode.clone(), tuple(self.env.pure_reset(seed.expand_as(ahead), index.expand_as(ahead), ahead)))


def unrolled(
    env: PureEnv,
    state: Any,
    observation: torch.Tensor,
    act: Callable[[Any, torch.Tensor], torch.Tensor],
    steps: int,
    table: Table,
) -> tuple[Any, torch.Tensor, list[tuple[Any, ...]]]:
    """Some steps of every environment; those whose episode ends start the next one.

    Args:
        env: The environment.
        state: The state before the first step, each field ``[N, ...]``.
        observation: The observation of that state.
        act: Maps a state and its observation to actions.
        steps: How many.
        table: Of `Starts.ahead`, for as many steps.

    Returns:
        The state and the observation after the steps and their resets, and what `PureEnv.pure_step` returned in each.
    """
    transitions = []
    looks = state.episode.device.type == "cpu" and not torch.compiler.is_compiling()  # reading a value costs nothing
    starts = type(state)(*table.states)
    for _ in range(steps):
        transition = env.pure_step(state, act(state, observation))
        transitions.append(transition)
        state, observation, _, terminated, truncated = transition
        done = terminated | truncated
        if looks and not done.any():
            continue
        row = state.episode - table.before
        start = {name: _pick(field, row) for name, field in starts._asdict().items() if name not in _COUNTERS}
        start["episode"] = state.episode + 1
        state = state._replace(**{name: _where(done, new, getattr(state, name)) for name, new in start.items()})
        observation = env.observe(state)
    return state, observation, transitions


def _pick(field: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """``field[row[n], n]`` of a field ``[steps, N, ...]``."""
    row = row.reshape(1, *row.shape, *[1] * (field.ndim - 1 - row.ndim)).expand(1, *field.shape[1:])
    return field.gather(0, row).squeeze(0)


def _where(done: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.where(done.reshape((*done.shape, *[1] * (old.ndim - done.ndim))), new, old)


def refuse_impure(env: EnvBase) -> None:
    """Refuse an environment that cannot be fused.

    Raises:
        TypeError: If it does not offer what `PureEnv` lists, naming what is missing.
    """
    if missing := [name for name in PURE if not callable(getattr(type(env), name, None) or vars(env).get(name))]:
        raise TypeError(
            f"{type(env).__name__} cannot be fused: it does not offer {', '.join(missing)}. Collect with "
            "torchrl.collectors.Collector, or write it as a fp8rl_torchrl.envs.NativeEnv"
        )


def random_action(spec: TensorSpec) -> torch.Tensor:
    """What ``spec.rand()`` draws, without a read of a value by the host, so that it can be compiled."""
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        return spec.rand()
    space: Any = spec.space
    share = torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device).uniform_()
    return (share * (space.high - space.low) + space.low).clamp(space.low, space.high)
