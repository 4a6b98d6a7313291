"""The custom environment for Gymnasium: one mass, or a batch of them, in numpy; registered as ``fp8rl/CustomEnv-v0``.

The dynamics are those of the TorchRL `CustomEnv`, in float32 and in the same order of operations, so that both agree to
float32 rounding on the same states and actions. Start states differ: Gymnasium draws them from ``np_random``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.spaces import Box, Discrete
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fp8rl_torchrl.envs.custom_constants import START_POSITION, START_VELOCITY, CustomConstants
from fp8rl_torchrl.envs.rendering import render_frame

ENV_ID = "fp8rl/CustomEnv-v0"
_METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}
_NO_ACTION = -1  # what is drawn before the first action of an episode


def register() -> None:
    """Make ``fp8rl/CustomEnv-v0`` known to `gymnasium.make` and `gymnasium.make_vec`; calling it again does nothing.

    The step limit is the environment's own (``max_steps``), not a ``max_episode_steps`` of the registration: Gymnasium
    would otherwise cut an episode of ``make(..., max_steps=500)`` at the registered limit.
    """
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point=f"{__name__}:CustomGymnasiumEnv",
            vector_entry_point=f"{__name__}:CustomGymnasiumVectorEnv",
            reward_threshold=215.0,
        )


class CustomGymnasiumEnv(gymnasium.Env):
    """Push a mass left (0) or right (1) so that it stays near a target; 200 steps, ceiling of the return 220.

    Observation: float32 ``[2]``, position and velocity. Reward: ``survival_reward + (1 - |x - target| / bound)`` from
    the new position. ``terminated`` beyond the bound, ``truncated`` at the step limit.

    Args:
        render_mode: None, or ``"rgb_array"``: uint8 ``[240, 600, 3]`` pictures, drawn in numpy without a display.
        **constants: The fields of `CustomConstants`: ``dt``, ``force``, ``friction``, ``bound``, ``target``,
            ``survival_reward``, ``max_steps``.

    Raises:
        ValueError: If a constant or the render mode is not one that the environment can have.

    Example:
        >>> env = gymnasium.make("fp8rl_torchrl:fp8rl/CustomEnv-v0")
        >>> observation, info = env.reset(seed=0)
    """

    metadata = _METADATA

    def __init__(self, render_mode: str | None = None, **constants: Any) -> None:
        self.render_mode = _checked_render_mode(render_mode)
        self.constants = CustomConstants(**constants)
        self._physics = _Physics(self.constants)
        self.observation_space, self.action_space = _spaces(self.constants)
        self._state: np.ndarray | None = None
        self._step_count = 0
        self._action = _NO_ACTION
        self._done = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seeds ``np_random``, from which this and all later start states are drawn.
            options: None, or ``{"state": (position, velocity)}`` to start from a state of your choice.

        Returns:
            The observation, float32 ``[2]``, and an empty info.

        Raises:
            ValueError: If an option is unknown or the given state is not one that an episode can start from.
        """
        super().reset(seed=seed)
        given = _given_state(options, self.constants, (2,))
        self._state = state = _start([self.np_random])[0] if given is None else given
        self._step_count, self._action, self._done = 0, _NO_ACTION, False
        return state.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Advance by one step of semi-implicit Euler.

        Args:
            action: 0 pushes left, 1 pushes right.

        Returns:
            The observation (float32 ``[2]``), the reward, ``terminated``, ``truncated`` and an empty info.

        Raises:
            ResetNeeded: If no episode is running.
            InvalidAction: If the action is neither 0 nor 1.
        """
        if self._state is None or self._done:
            raise ResetNeeded(f"CustomEnv: {'the episode is over' if self._done else 'no episode'}; call reset() first")
        if not self.action_space.contains(action):
            raise InvalidAction(f"CustomEnv: the action must be the integer 0 (left) or 1 (right); got {action!r}")
        self._action = int(action)
        self._state, reward, terminated = self._physics.step(self._state, self._action)
        self._step_count += 1
        truncated = self._step_count >= self.constants.max_steps
        self._done = bool(terminated) or truncated
        return self._state.copy(), float(reward), bool(terminated), truncated, {}

    def render(self) -> Any:
        """The current state as a picture, uint8 ``[240, 600, 3]``; None, with a warning, without a render mode."""
        if self.render_mode is None:
            gymnasium.logger.warn("CustomEnv was made without render_mode='rgb_array': nothing to render")
            return None
        if self._state is None:
            raise ResetNeeded("CustomEnv: there is nothing to render yet; call reset() first")
        return render_frame(self.constants, self._state, self._action, self._step_count)


class CustomGymnasiumVectorEnv(VectorEnv):
    """A batch of `CustomGymnasiumEnv`, stepped as one numpy array; equal to a ``SyncVectorEnv`` of them, seed by seed.

    Args:
        num_envs: The number of environments ``N``.
        render_mode: None, or ``"rgb_array"``: a tuple of ``N`` pictures, uint8 ``[240, 600, 3]``.
        autoreset_mode: When a finished environment starts anew: ``"NextStep"`` (Gymnasium's default: the next step
            ignores its action and returns the start state), ``"SameStep"`` (the last observation is in
            ``info["final_obs"]``) or ``"Disabled"`` (call ``reset(options={"reset_mask": done})``).
        max_episode_steps: A step limit as `gymnasium.make_vec` passes it; the lower one of it and ``max_steps`` holds.
        **constants: As in `CustomGymnasiumEnv`.

    Raises:
        ValueError: If an argument is not one that the environment can have.
    """

    metadata: dict[str, Any] = {**_METADATA, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        **constants: Any,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs must be a positive integer; got {num_envs!r}")
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            modes = [mode.value for mode in AutoresetMode]
            raise ValueError(f"autoreset_mode must be one of {modes}; got {autoreset_mode!r}") from None
        self.num_envs = num_envs
        self.render_mode = _checked_render_mode(render_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.constants = CustomConstants(**constants)
        self._physics = _Physics(self.constants)
        self.single_observation_space, self.single_action_space = _spaces(self.constants)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        limit = self.constants.max_steps
        self._step_limit = limit if max_episode_steps is None else min(limit, max_episode_steps)
        # A generator (and its seed) per environment, as in a SyncVectorEnv: one's reset never shifts another's start.
        self._generators: list[tuple[np.random.Generator, int] | None] = [None] * num_envs
        self._state: np.ndarray | None = None
        self._step_count = np.zeros(num_envs, dtype=np.int64)
        self._actions = np.full(num_envs, _NO_ACTION)
        self._done = np.zeros(num_envs, dtype=np.bool_)

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The random generator of each environment."""
        return tuple(self._generator(index)[0] for index in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The seed of each environment's random generator."""
        return tuple(self._generator(index)[1] for index in range(self.num_envs))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in every environment, or in those of a mask.

        Args:
            seed: An integer (environment ``i`` gets ``seed + i``), one seed per environment, or None to continue.
            options: None, or a dict of ``"reset_mask"`` (bool ``[N]``, at least one True: only these start anew) and
                ``"state"`` (``[2]`` or ``[N, 2]``: position and velocity to start from).

        Returns:
            The observations of all environments, float32 ``[N, 2]``, and an empty info.

        Raises:
            ValueError: If an option or the number of seeds is not as above.
            ResetNeeded: If the very first reset is a partial one.
        """
        options = dict(options or {})
        mask = self._checked_mask(options.pop("reset_mask", None))
        given = _given_state(options, self.constants, (self.num_envs, 2))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"a list of seeds must have one for each of the {self.num_envs} envs; got {len(seeds)}")
        if self._state is None:
            if not mask.all():
                raise ResetNeeded("CustomEnv: the first reset must be one of all environments")
            self._state = np.zeros((self.num_envs, 2), dtype=np.float32)
        for index in np.flatnonzero(mask).tolist():
            self._generator(index, None if seeds is None else seeds[index])
        self._start_episodes(mask, given)
        return self._state.copy(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance all environments by one step.

        Args:
            actions: Integers ``[N]``: 0 pushes left, 1 pushes right.

        Returns:
            The observations (float32 ``[N, 2]``), the rewards (float32 ``[N]``), ``terminated`` and ``truncated``
            (bool ``[N]``), and the info (empty but for ``"final_obs"`` in same-step mode).

        Raises:
            ResetNeeded: If there was no reset, or an environment is done and its reset is up to the caller.
            InvalidAction: If an action is neither 0 nor 1, or there is not one for each environment.
        """
        if self._state is None:
            raise ResetNeeded("CustomEnv: no episode; call reset() first")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._done.any():
            raise ResetNeeded(
                f"CustomEnv: the episodes of environments {np.flatnonzero(self._done).tolist()} are over; with "
                "autoreset disabled, call reset(options={'reset_mask': terminated | truncated}) before the next step"
            )
        actions = np.asarray(actions)
        if not np.issubdtype(actions.dtype, np.integer) or not self.action_space.contains(actions):
            raise InvalidAction(
                f"CustomEnv: actions must be {self.num_envs} integers, each 0 (left) or 1 (right); got {actions!r}"
            )
        self._actions = actions.copy()
        self._state, reward, terminated = self._physics.step(self._state, actions)
        self._step_count += 1
        truncated = self._step_count >= self._step_limit
        info: dict[str, Any] = {}
        if self._done.any():  # next-step mode: these were done already, so this step is their reset
            over = self._done
            self._start_episodes(over)
            reward[over], terminated[over], truncated[over] = 0.0, False, False
        self._done = terminated | truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._done.any():
            for index in np.flatnonzero(self._done).tolist():
                final = {"final_obs": self._state[index].copy(), "final_info": {}}
                info = self._add_info(info, final, index)
            self._start_episodes(self._done)
        return self._state.copy(), reward, terminated, truncated, info

    def render(self) -> Any:
        """A tuple of one picture per environment; None, with a warning, without a render mode."""
        if self.render_mode is None:
            gymnasium.logger.warn("CustomEnv was made without render_mode='rgb_array': nothing to render")
            return None
        if self._state is None:
            raise ResetNeeded("CustomEnv: there is nothing to render yet; call reset() first")
        frames = zip(self._state, self._actions.tolist(), self._step_count.tolist(), strict=True)
        return tuple(render_frame(self.constants, *frame) for frame in frames)

    def _generator(self, index: int, seed: int | None = None) -> tuple[np.random.Generator, int]:
        """The generator of one environment and its seed, made anew if a seed is given or there is none yet."""
        generator = self._generators[index]
        if generator is None or seed is not None:
            generator = seeding.np_random(None if seed is None else int(seed))
            self._generators[index] = generator
        return generator

    def _start_episodes(self, mask: np.ndarray, given: np.ndarray | None = None) -> None:
        """Write start states in place where ``mask`` (bool ``[N]``) is True."""
        assert self._state is not None
        if given is None:
            self._state[mask] = _start([self._generator(index)[0] for index in np.flatnonzero(mask).tolist()])
        else:
            self._state[mask] = given[mask]
        self._step_count[mask], self._actions[mask] = 0, _NO_ACTION
        self._done = self._done & ~mask

    def _checked_mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f"options['reset_mask'] must be a bool array of {self.num_envs} values; got {mask!r}")
        if not mask.any():
            raise ValueError("options['reset_mask'] must be True for at least one environment; got none")
        return mask


def _spaces(constants: CustomConstants) -> tuple[Box, Discrete]:
    high = np.array([constants.max_position, constants.max_velocity], dtype=np.float32)
    return Box(-high, high, dtype=np.float32), Discrete(2)


class _Physics:
    """The dynamics, in float32.

    Every constant is made float32 once: numpy 1 would otherwise compute with single numbers in float64.
    """

    def __init__(self, constants: CustomConstants) -> None:
        self.pushes = np.array([-constants.force, constants.force], dtype=np.float32)
        self.one, self.dt, self.friction = np.float32(1), np.float32(constants.dt), np.float32(constants.friction)
        self.bound, self.target = np.float32(constants.bound), np.float32(constants.target)
        self.survival_reward = np.float32(constants.survival_reward)

    def step(self, state: np.ndarray, action: Any) -> tuple[np.ndarray, Any, Any]:
        """One step of semi-implicit Euler: velocity first, then position from the new velocity.

        Args:
            state: float32 ``[..., 2]``, position and velocity.
            action: Integer(s) ``[...]``, 0 or 1.

        Returns:
            The next state (float32 ``[..., 2]``), the reward (float32 ``[...]``) and ``terminated`` (bool ``[...]``).
        """
        position, velocity = state[..., 0], state[..., 1]
        velocity = velocity + (self.pushes[action] - self.friction * velocity) * self.dt
        position = position + velocity * self.dt
        next_state = np.empty_like(state)
        next_state[..., 0], next_state[..., 1] = position, velocity
        reward = self.survival_reward + (self.one - np.abs(position - self.target) / self.bound)
        return next_state, reward, np.abs(position) > self.bound


def _start(generators: list[np.random.Generator]) -> np.ndarray:
    """A start state from each generator, float32 ``[n, 2]``: uniform around 0."""
    noise = 2 * np.array([generator.random(2) for generator in generators]) - 1
    return (noise * (START_POSITION, START_VELOCITY)).astype(np.float32)


def _given_state(
    options: dict[str, Any] | None, constants: CustomConstants, shape: tuple[int, ...]
) -> np.ndarray | None:
    """The start state in the options, as float32 of the given shape; None if there is none."""
    options = options or {}
    if unknown := sorted(set(options) - {"state"}):
        raise ValueError(f"CustomEnv: unknown reset option(s) {', '.join(map(repr, unknown))}; there is 'state'")
    if options.get("state") is None:
        return None
    state = np.broadcast_to(np.asarray(options["state"], dtype=np.float32), shape).copy()
    # A faster start is within the observation space only if friction, and not the step limit, keeps the speed there.
    frictional = constants.terminal_velocity <= constants.max_velocity
    limits = np.array([constants.bound, constants.max_velocity if frictional else START_VELOCITY], dtype=np.float32)
    if not (np.abs(state) <= limits).all():
        raise ValueError(
            f"CustomEnv: options['state'] must have |position| <= {limits[0]:g} and |velocity| <= {limits[1]:g}; "
            f"got {options['state']!r}"
        )
    return state


def _checked_render_mode(render_mode: str | None) -> str | None:
    if render_mode not in (None, *_METADATA["render_modes"]):
        raise ValueError(f"CustomEnv: render_mode must be None or 'rgb_array'; got {render_mode!r}")
    return render_mode
