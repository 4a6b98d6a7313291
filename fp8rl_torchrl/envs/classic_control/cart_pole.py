"""`CartPoleEnv`: balance a pole on a cart, Gymnasium's CartPole-v1 as a native, batched TorchRL environment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8rl_torchrl.envs._constants import ROUNDING, positive, refuse_unless
from fp8rl_torchrl.envs.native import Limits, NativeEnv, episode_start
from fp8rl_torchrl.envs.noise import uniform

_START = 0.05


class CartPoleState(NamedTuple):
    """All that one step needs, each of shape ``[N]`` (or ``[]``).

    ``position`` (m), ``velocity`` (m/s), ``angle`` (rad) and ``angular_velocity`` (rad/s), all float32, are the
    physics, ``step_count`` (int64) and ``episode_reward`` (float32) the episode so far, and ``seed``, ``index``,
    ``episode`` (int64) the counters that the start noise is hashed from.
    """

    position: torch.Tensor
    velocity: torch.Tensor
    angle: torch.Tensor
    angular_velocity: torch.Tensor
    step_count: torch.Tensor
    episode_reward: torch.Tensor
    seed: torch.Tensor
    index: torch.Tensor
    episode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CartPoleDynamics:
    """The constants of `CartPoleEnv`, by default those of Gymnasium's CartPole-v1, and its pure functions of tensors.

    The equations are those of a pole on a cart without friction (Florian, "Correct equations for the dynamics of the
    cart-pole system", 2007).

    Raises:
        ValueError: If a constant is outside the range in which the environment makes sense.
    """

    gravity: float = 9.8
    """Acceleration of free fall, m/s²."""
    cart_mass: float = 1.0
    """Mass of the cart, kg."""
    pole_mass: float = 0.1
    """Mass of the pole, kg."""
    half_length: float = 0.5
    """Half the length of the pole, m."""
    force: float = 10.0
    """Magnitude of the push, N; action 0 pushes left, action 1 right."""
    dt: float = 0.02
    """Seconds per step."""
    position_bound: float = 2.4
    """The episode terminates once the cart is farther than this from 0, m."""
    angle_bound: float = 12 * 2 * math.pi / 360
    """The episode terminates once the pole leans farther than this from upright, rad."""
    max_steps: int = 500
    """The episode is truncated after this many steps."""

    def __post_init__(self) -> None:
        """Refuse constants that make no environment."""
        requirements = positive(self, "gravity", "cart_mass", "pole_mass", "half_length", "force", "dt")
        for name in ("position_bound", "angle_bound"):
            requirements[f"{name} must be > {_START}, the farthest start"] = getattr(self, name) > _START
        refuse_unless(self, "CartPoleEnv", requirements)

    def step(
        self, state: CartPoleState, action: torch.Tensor
    ) -> tuple[CartPoleState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance by one step of explicit Euler: positions and velocities both move by what they were before.

        Args:
            state: The state before the step.
            action: int64 ``[N]``, 0 (left) or 1 (right).

        Returns:
            The next state, the next observation (float32 ``[N, 4]``), the reward (float32 ``[N]``: 1, also for the
            last step), ``terminated`` and ``truncated`` (bool ``[N]``).
        """
        mass = self.cart_mass + self.pole_mass
        moment = self.pole_mass * self.half_length
        sine, cosine = state.angle.sin(), state.angle.cos()
        push = torch.where(action == 1, self.force, -self.force)
        drive = (push + moment * state.angular_velocity.square() * sine) * (1 / mass)
        inertia = self.half_length * (4 / 3) - (moment / mass) * cosine.square()
        angular_acceleration = (self.gravity * sine - cosine * drive) / inertia
        acceleration = drive - (moment / mass) * angular_acceleration * cosine

        position = state.position + self.dt * state.velocity
        angle = state.angle + self.dt * state.angular_velocity
        reward = torch.ones_like(position)
        step_count = state.step_count + 1
        next_state = state._replace(
            position=position,
            velocity=state.velocity + self.dt * acceleration,
            angle=angle,
            angular_velocity=state.angular_velocity + self.dt * angular_acceleration,
            step_count=step_count,
            episode_reward=state.episode_reward + reward,
        )
        terminated = (position.abs() > self.position_bound) | (angle.abs() > self.angle_bound)
        return next_state, self.observe(next_state), reward, terminated, step_count >= self.max_steps

    @staticmethod
    def reset(seed: torch.Tensor, index: torch.Tensor, episode: torch.Tensor) -> CartPoleState:
        """Start an episode: all four physical numbers uniform in ±0.05, each a hash of the three counters.

        Args:
            seed: int64 ``[N]``, the seed of the batch.
            index: int64 ``[N]``, the place of each environment in the batch.
            episode: int64 ``[N]``, the number of the episode to start, counted from 0.

        Returns:
            The state at the start, each field of the counters' shape.
        """
        noise = (2 * uniform(seed, index, episode, streams=4) - 1) * _START
        position, velocity, angle, angular_velocity = noise.unbind()
        return episode_start(
            CartPoleState,
            seed,
            index,
            episode,
            position=position,
            velocity=velocity,
            angle=angle,
            angular_velocity=angular_velocity,
        )

    @staticmethod
    def observe(state: CartPoleState) -> torch.Tensor:
        """Position, velocity, angle and angular velocity, float32 ``[N, 4]``."""
        return torch.stack((state.position, state.velocity, state.angle, state.angular_velocity), -1)

    @property
    def limits(self) -> Limits:
        """Where an episode stays, whatever the constants: finite where Gymnasium's limits are not, wider elsewhere.

        A step that led from within a bound to within it had a speed of at most twice the bound per step. Two steps can
        come after that: itself, and one that ends the episode. Each adds the highest acceleration at most.
        """
        start, dt, mass = _START, self.dt, self.cart_mass + self.pole_mass
        sine = min(1.0, self.angle_bound)

        def accelerations(angular_velocity: float) -> tuple[float, float]:
            drive = (self.force + self.pole_mass * self.half_length * angular_velocity**2 * sine) / mass
            turning = (self.gravity * sine + drive) / (self.half_length * (4 / 3 - self.pole_mass / mass))
            return drive + self.pole_mass * self.half_length * turning / mass, turning

        angular_velocity = max(start, 2 * self.angle_bound / dt)
        velocity = max(start, 2 * self.position_bound / dt)
        reached = []
        for _ in range(2):
            acceleration, turning = accelerations(angular_velocity)
            velocity, angular_velocity = velocity + dt * acceleration, angular_velocity + dt * turning
            reached.append((velocity, angular_velocity))
        highest = {
            "position": self.position_bound + dt * reached[0][0],
            "velocity": reached[1][0],
            "angle": self.angle_bound + dt * reached[0][1],
            "angular_velocity": reached[1][1],
        }
        state = {name: (-value * ROUNDING, value * ROUNDING) for name, value in highest.items()}
        return Limits(
            actions=2, observation=tuple(state.values()), state=state, reward=(0.0, 1.0), max_steps=self.max_steps
        )


class CartPoleEnv(NativeEnv):
    """Balance a pole on a cart by pushing the cart left or right: Gymnasium's CartPole-v1, native and batched.

    One step equals Gymnasium's up to the rounding of float32 (Gymnasium computes in float64), and so do the rewards and
    the ends of episodes; the start states have the same distribution. Solved: mean return ≥ 475 of 500.

    Its TensorDicts are described in `NativeEnv`. ``observation`` is ``[N, 4]``: position (m), velocity (m/s), angle
    (rad), angular velocity (rad/s); ``action`` is 0 (left) or 1 (right); every step pays 1, the last one too; an
    episode is terminated beyond 2.4 m or 12°, and truncated after 500 steps. Unlike Gymnasium's, the specs of both
    velocities are finite.

    Args:
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live.
        seed: Seed of the start states; None draws one from torch's global generator.
        **constants: The fields of `CartPoleDynamics`: ``gravity``, ``cart_mass``, ``pole_mass``, ``half_length``,
            ``force``, ``dt``, ``position_bound``, ``angle_bound``, ``max_steps``.

    Raises:
        ValueError: If ``num_envs`` is not positive or a constant is out of range.
        TypeError: If a constant is unknown.

    Example:
        >>> env = CartPoleEnv(num_envs=4, seed=0)
        >>> env.rollout(5)["next", "observation"].shape
        torch.Size([4, 5, 4])
    """

    state_type = CartPoleState
    dynamics_type = CartPoleDynamics
    dynamics: CartPoleDynamics
