"""Environments as pure functions of tensors: what they offer, and many of their steps as one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded
from torchrl.envs import EnvBase

PURE = ("pure_step", "pure_reset", "observe", "read", "write", "entries")

_CONSTANT = ("seed", "index")
"""Fields of a state that no step and no reset changes."""


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
        """The observation ``[N, ...]`` of a state."""
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


def unrolled(
    env: PureEnv, state: Any, observation: torch.Tensor, act: Callable[[Any, torch.Tensor], torch.Tensor], steps: int
) -> tuple[Any, torch.Tensor, list[tuple[Any, ...]]]:
    """Some steps of every environment; those whose episode ends start the next one.

    Args:
        env: The environment.
        state: The state before the first step, each field ``[N, ...]``.
        observation: The observation of that state.
        act: Maps a state and its observation to actions.
        steps: How many.

    Returns:
        The state and the observation after the steps and their resets, and what `PureEnv.pure_step` returned in each.
    """
    transitions = []
    looks = state.episode.device.type == "cpu" and not torch.compiler.is_compiling()  # reading a value costs nothing
    first, starts, resets = state, None, torch.zeros_like(state.episode)
    for _ in range(steps):
        transition = env.pure_step(state, act(state, observation))
        transitions.append(transition)
        state, observation, _, terminated, truncated = transition
        done = terminated | truncated
        if looks and not done.any():
            continue
        starts = _starts(env, first, steps) if starts is None else starts
        picked = {name: _pick(field, resets) for name, field in starts._asdict().items() if name not in _CONSTANT}
        start = state._replace(**picked)
        resets = resets + done
        observation = _where(done, env.observe(start), observation)
        state = state._replace(**{name: _where(done, new, getattr(state, name)) for name, new in picked.items()})
    return state, observation, transitions


def _starts(env: PureEnv, state: Any, steps: int) -> Any:
    """The starts of the episodes after the running ones, each field ``[steps, N, ...]``: more can not begin.

    These are one computation beforehand, and a reset is a look into this table: hashing in every step would take
    minutes to compile, and in eager mode most of the time.
    """
    episode = state.episode
    ahead = torch.arange(1, steps + 1, device=episode.device).reshape(-1, *[1] * episode.ndim) + episode
    return env.pure_reset(state.seed.expand_as(ahead), state.index.expand_as(ahead), ahead)


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


def random_action(env: EnvBase) -> torch.Tensor:
    """What ``env.action_spec.rand()`` draws, without a read of a value by the host, so that it can be compiled."""
    spec = env.action_spec
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        return spec.rand()
    space: Any = spec.space
    share = torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device).uniform_()
    return (share * (space.high - space.low) + space.low).clamp(space.low, space.high)
