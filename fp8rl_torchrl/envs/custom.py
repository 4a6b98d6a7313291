"""`CustomEnv`: push a mass towards a target, as a native, batched TorchRL environment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs.custom_constants import START_POSITION, START_VELOCITY, CustomConstants
from fp8rl_torchrl.envs.noise import uniform


class CustomState(NamedTuple):
    """All that one step needs, each of shape ``[N]`` (or ``[]``).

    ``position`` and ``velocity`` (float32) are the physics, ``step_count`` (int64) and ``episode_reward`` (float32)
    the episode so far, and ``seed``, ``index``, ``episode`` (int64) the counters that the start noise is hashed from.
    """

    position: torch.Tensor
    velocity: torch.Tensor
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CustomDynamics(CustomConstants):
    """The constants of `CustomEnv` and its two pure functions of tensors."""

    def step(
        self, state: CustomState, action: torch.Tensor
    ) -> tuple[CustomState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of semi-implicit Euler: velocity first, then position from the new velocity.

        Args:
            state: The state before the step.
            action: int64 ``[N]``, 0 (left) or 1 (right).

        Returns:
            The next state, the next observation (float32 ``[N, 2]``: position, velocity), the reward (float32
            ``[N]``), ``terminated`` and ``truncated`` (bool ``[N]``).
        """
        push = torch.where(action == 1, self.force, -self.force)
        velocity = state.velocity + (push - self.friction * state.velocity) * self.dt
        position = state.position + velocity * self.dt
        reward = self.survival_reward + (1.0 - (position - self.target).abs() / self.bound)
        step_count = state.step_count + 1
        next_state = state._replace(
            position=position,
            velocity=velocity,
            step_count=step_count,
            episode_reward=state.episode_reward + reward,
        )
        terminated = position.abs() > self.bound
        truncated = step_count >= self.max_steps
        return next_state, torch.stack((position, velocity), -1), reward, terminated, truncated

    @staticmethod
    def reset(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> CustomState:
        """Start an episode: position uniform in ±0.5, velocity uniform in ±0.05, both a hash of the three counters.

        Args:
            seed: int64 ``[N]``, the seed of the batch.
            index: int64 ``[N]``, the place of each environment in the batch.
            episode: int64 ``[N]``, the number of the episode to start, counted from 0.

        Returns:
            The state at the start, each field of the counters' shape.
        """
        position = (2 * uniform(seed, index, episode, stream=0) - 1) * START_POSITION
        velocity = (2 * uniform(seed, index, episode, stream=1) - 1) * START_VELOCITY
        return CustomState(
            position=position,
            velocity=velocity,
            step_count=torch.zeros_like(episode),
            episode_reward=torch.zeros_like(position),
            seed=seed,
            index=index,
            episode=episode,
        )


class CustomEnv(EnvBase):
    """Push a mass left or right so that it stays near a target; 200 steps, ceiling of the return 220.

    Uniformly random actions return 73.5 on average, a hand-made bang-bang controller 219.05.

    Every TensorDict carries the whole state, so a step is a function of the TensorDict alone: an episode can be saved,
    restored and branched by keeping TensorDicts. Start states are hashed from (seed, index, episode number), hence the
    same in eager, compiled and captured runs, and resetting one environment never disturbs another.

    | key | shape | dtype | |
    |---|---|---|---|
    | ``observation`` | ``[N, 2]`` | float32 | position, velocity |
    | ``action`` | ``[N]`` | int64 | categorical: 0 pushes left, 1 pushes right |
    | ``reward`` | ``[N, 1]`` | float32 | ``survival_reward + (1 - abs(x - target) / bound)``, from the new position |
    | ``terminated`` / ``truncated`` / ``done`` | ``[N, 1]`` | bool | beyond the bound / step limit / either |
    | ``step_count``, ``episode_reward`` | ``[N, 1]`` | int64, float32 | of the running episode |
    | ``state`` | ``[N]`` | | position, velocity, and the counters of the start noise |

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `CustomConstants`: ``dt``, ``force``, ``friction``, ``bound``, ``target``,
            ``survival_reward``, ``max_steps``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = CustomEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([4, 5, 1])
    """

    stateless = True

    def __init__(
        self,
        num_envs: int | None = None,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        **constants: float,
    ) -> None:
        known = [field.name for field in fields(CustomDynamics)]
        if unknown := sorted(set(constants) - set(known)):
            raise TypeError(f"CustomEnv has no argument {', '.join(unknown)}; its constants are {', '.join(known)}")
        if num_envs is not None and (isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1):
            raise ValueError(f"num_envs must be a positive integer, or None for a single environment; got {num_envs!r}")
        self.num_envs = num_envs
        self.dynamics = CustomDynamics(**constants)  # pyright: ignore[reportArgumentType]
        self.pure_step = self.dynamics.step
        self.pure_reset = self.dynamics.reset
        super().__init__(device=device, batch_size=torch.Size(() if num_envs is None else (num_envs,)))
        self._make_specs()
        # The counters that the last step or reset saw. TorchRL's auto-reset hands `_reset` nothing but the mask.
        index = torch.zeros((), dtype=torch.int64) if num_envs is None else torch.arange(num_envs)
        for name in ("_seed", "_index", "_episode"):
            self.register_buffer(name, index.to(self.device), persistent=False)
        self._reseeded: torch.Tensor | None
        self.register_buffer("_reseeded", None, persistent=False)
        self.set_seed(int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed)
        self._reseeded = None  # so that a run that was saved elsewhere goes on here with its own seed

    def fresh(self, num_envs: int | None = None, seed: int | None = None) -> CustomEnv:
        """An independent environment with the same constants, on the same device.

        Args:
            num_envs: The size of the batch; None keeps this one's.
            seed: As in the constructor.
        """
        constants = {field.name: getattr(self.dynamics, field.name) for field in fields(CustomDynamics)}
        return CustomEnv(self.num_envs if num_envs is None else num_envs, self.device, seed, **constants)

    def _make_specs(self) -> None:
        dynamics, batch, device = self.dynamics, self.batch_size, self.device
        high = torch.tensor([dynamics.max_position, dynamics.max_velocity], device=device).expand(*batch, 2)
        low_reward, high_reward = dynamics.reward_range
        # Every addition of a float32 sum may round up by 2^-24 of the sum.
        returns = dynamics.max_steps * max(-low_reward, high_reward) * (1 + dynamics.max_steps * 2.0**-23)

        def interval(bound: float, dtype: torch.dtype, *shape: int, low: float | None = None) -> Bounded:
            size = torch.Size((*batch, *shape))
            return Bounded(-bound if low is None else low, bound, size, dtype=dtype, device=device)

        counter = Unbounded(batch, dtype=torch.int64, device=device)
        carried = {
            "step_count": interval(dynamics.max_steps, torch.int64, 1, low=0),
            "episode_reward": interval(returns, torch.float32, 1),
            "state": Composite(
                position=interval(dynamics.max_position, torch.float32),
                velocity=interval(dynamics.max_velocity, torch.float32),
                seed=counter.clone(),
                index=counter.clone(),
                episode=counter.clone(),
                shape=batch,
                device=device,
            ),
        }
        self.observation_spec = Composite(
            observation=Bounded(-high, high, dtype=torch.float32, device=device),
            **carried,
            shape=batch,
            device=device,
        )
        self.state_spec = Composite(carried, shape=batch, device=device).clone()
        self.action_spec = Categorical(2, shape=batch, dtype=torch.int64, device=device)
        self.reward_spec = interval(high_reward, torch.float32, 1, low=low_reward)
        flag = Categorical(2, shape=torch.Size((*batch, 1)), dtype=torch.bool, device=device)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=batch, device=device
        )

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
        state = self._read(tensordict)
        self._remember(state)
        state, observation, reward, terminated, truncated = self.pure_step(state, tensordict.get("action"))
        return self._write(state, observation, terminated, truncated).set("reward", reward.unsqueeze(-1))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if tensordict is not None and "state" in tensordict.keys():
            self._remember(self._read(tensordict))
        new = torch.ones_like(self._episode) if mask is None else mask.reshape(self.batch_size).long()
        state = self.pure_reset(self._seed, self._index, self._episode + new)
        self._seed, self._index, self._episode = state.seed, state.index, state.episode
        if self._reseeded is not None:
            self._reseeded = None if mask is None else self._reseeded & (new == 0)
        running = torch.zeros_like(self._episode, dtype=torch.bool)
        observation = torch.stack((state.position, state.velocity), -1)
        return self._write(state, observation, running, running)

    def _remember(self, state: CustomState) -> None:
        seen = (state.seed, state.index, state.episode)
        if self._reseeded is not None:
            own = (self._seed, self._index, self._episode)
            seen = tuple(torch.where(self._reseeded, mine, theirs) for mine, theirs in zip(own, seen, strict=True))
        self._seed, self._index, self._episode = seen

    def _read(self, tensordict: TensorDictBase) -> CustomState:
        state = tensordict.get("state")
        return CustomState(
            step_count=tensordict.get("step_count").squeeze(-1),
            episode_reward=tensordict.get("episode_reward").squeeze(-1),
            **{name: state.get(name) for name in ("position", "velocity", "seed", "index", "episode")},
        )

    def _write(
        self, state: CustomState, observation: torch.Tensor, terminated: torch.Tensor, truncated: torch.Tensor
    ) -> TensorDict:
        # Every entry is its own tensor: a shared one would let a later in-place write reach an earlier TensorDict.
        physics = TensorDict(
            {
                "position": state.position,
                "velocity": state.velocity,
                "seed": state.seed.clone(),
                "index": state.index.clone(),
                "episode": state.episode.clone(),
            },
            batch_size=self.batch_size,
            device=self.device,
        )
        entries = {
            "observation": observation,
            "state": physics,
            "step_count": state.step_count.unsqueeze(-1),
            "episode_reward": state.episode_reward.unsqueeze(-1),
            "terminated": terminated.unsqueeze(-1).clone(),
            "truncated": truncated.unsqueeze(-1).clone(),
            "done": (terminated | truncated).unsqueeze(-1),
        }
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)
