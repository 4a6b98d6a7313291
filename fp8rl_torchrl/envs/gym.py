"""`make`: any Gymnasium environment as a TorchRL one, in one process; native where this package has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FlattenObservation, TransformAction
from torchrl.envs import (
    Compose,
    DTypeCastTransform,
    EnvBase,
    GymWrapper,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from fp8rl_torchrl.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    MountainCarContinuousEnv,
    MountainCarEnv,
    PendulumEnv,
)
from fp8rl_torchrl.envs.custom import CustomEnv
from fp8rl_torchrl.envs.gymnasium_env import ENV_ID, CustomGymnasiumVectorEnv, register

_NATIVE: dict[str, Callable[..., EnvBase]] = {
    "CustomEnv": CustomEnv,
    ENV_ID: CustomEnv,
    "Acrobot-v1": AcrobotEnv,
    "CartPole-v1": CartPoleEnv,
    "MountainCar-v0": MountainCarEnv,
    "MountainCarContinuous-v0": MountainCarContinuousEnv,
    "Pendulum-v1": PendulumEnv,
}
# Extras of this package that bring what some of Gymnasium's environments need; its modules have the same names.
_EXTRAS = ("box2d", "mujoco")
# Vector environments that take a reset mask in every autoreset mode, and not only in the one that is made for it.
_RESETTABLE = (SyncVectorEnv, AsyncVectorEnv, CustomGymnasiumVectorEnv)


def is_native(id: str) -> bool:
    """Whether `make` gives a native environment for an id: one of pure functions of tensors, which can be fused."""
    return (id.partition(":")[2] if id.startswith("fp8rl_torchrl:") else id) in _NATIVE


def make(
    id: str | EnvSpec | gymnasium.Env | VectorEnv,
    num_envs: int | None = None,
    device: str | torch.device = "cpu",
    seed: int | None = None,
    *,
    native: bool = True,
    **kwargs: Any,
) -> EnvBase:
    """Make an environment: native where this package has one, else Gymnasium's own as a TorchRL environment.

    These ids are native, as `is_native` tells, and their classes say what they hold:

    | id | class |
    |---|---|
    | ``"CustomEnv"``, ``"fp8rl/CustomEnv-v0"`` | `CustomEnv` |
    | ``"Acrobot-v1"`` | `AcrobotEnv` |
    | ``"CartPole-v1"`` | `CartPoleEnv` |
    | ``"MountainCar-v0"`` | `MountainCarEnv` |
    | ``"MountainCarContinuous-v0"`` | `MountainCarContinuousEnv` |
    | ``"Pendulum-v1"`` | `PendulumEnv` |

    Any other id, and with ``native=False`` these too, is made by Gymnasium, all ``num_envs`` of it in this process, and
    returned as a `GymnasiumEnv`. Where only an id can be given, as on a command line, ``"gymnasium:CartPole-v1"`` asks
    for Gymnasium's own. A `GymnasiumEnv` holds:

    | key | shape | dtype | |
    |---|---|---|---|
    | ``observation`` | ``[N, ...]`` | float32 | a discrete one is one-hot; an image stays uint8 (see below) |
    | ``action`` | ``[N]`` or ``[N, d]`` | int64, float32 | categorical for a discrete space, else the vector |
    | ``reward`` | ``[N, 1]`` | float32 | |
    | ``terminated`` / ``truncated`` / ``done`` | ``[N, 1]`` | bool | |
    | ``step_count``, ``episode_reward`` | ``[N, 1]`` | int64, float32 | by TorchRL's `StepCounter` and `RewardSum` |

    The observation at ``("next", "observation")`` of a last step is always the true last one of its episode, and the
    next step starts from the new episode's first: no step of a reset is ever returned. Images (uint8, two dimensions or
    more) are passed on as they are; a model for them needs an encoder of its own.

    Args:
        id: The name of an environment, its Gymnasium spec, or a Gymnasium environment that exists already, single or
            vectorised, in any autoreset mode in which its environments can be reset one by one.
        num_envs: The number of environments ``N``; None gives a single one with an empty batch size.
        device: Where all tensors live. Gymnasium environments compute on the CPU and their results are moved.
        seed: The seed; environment ``i`` of a batch gets ``seed + i``. None draws one from torch's global generator; an
            environment that exists already is then left as it is.
        native: Whether an id that this package has an environment of its own for gives that one. False gives
            Gymnasium's. A spec or an existing environment is always Gymnasium's.
        **kwargs: Passed on to the environment's constructor, the native one's or Gymnasium's.

    Returns:
        An environment of batch size ``[N]`` (or ``[]``). Its method ``fresh(num_envs=None, seed=None)`` builds an
        independent one like it.

    Raises:
        ValueError: If there is no such environment or device, a package that it needs is missing, ``num_envs`` or
            ``seed`` is out of range, or one of its spaces is not supported. Nothing has been stepped then.
        TypeError: If ``id`` is none of the above, or the constructor does not take one of ``kwargs``.

    Example:
        >>> env = make("CartPole-v1", num_envs=4, seed=0)
        >>> env.rollout(10, break_when_any_done=False)["next", "observation"].shape
        torch.Size([4, 10, 4])
        >>> make("CartPole-v1", num_envs=4, native=False).rollout(1)["next", "observation"].shape
        torch.Size([4, 1, 4])
    """
    device = _available(device)
    if num_envs is not None and (isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1):
        raise ValueError(f"num_envs must be a positive integer, or None for a single environment; got {num_envs!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ValueError(f"seed must be an integer >= 0, or None; got {seed!r}")
    if isinstance(id, (gymnasium.Env, VectorEnv)):
        return _wrap_existing(id, num_envs, device, seed, kwargs)
    if not isinstance(id, (str, EnvSpec)):
        raise TypeError(f"make needs the id of an environment, or a Gymnasium environment; got {type(id).__name__}")
    if isinstance(id, str) and id.startswith("fp8rl_torchrl") and id.partition(":")[2] in _NATIVE:
        id = id.partition(":")[2]
    if native and isinstance(id, str) and id in _NATIVE:
        try:
            return _NATIVE[id](num_envs=num_envs, device=device, seed=seed, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}; native=False makes Gymnasium's {id}, with that one's arguments") from error

    name = ENV_ID if id == "CustomEnv" else id
    env = GymnasiumEnv(
        _build(name, num_envs, kwargs), device, lambda n, s: make(name, n, device, s, native=False, **kwargs)
    )
    env.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    return env


class GymnasiumEnv(TransformedEnv):
    """A Gymnasium environment in TorchRL, with episode return and length, which can build another like itself.

    Made by `make`, which describes what its TensorDicts hold.
    """

    def __init__(
        self,
        env: gymnasium.Env | VectorEnv,
        device: torch.device,
        rebuild: Callable[[int | None, int | None], EnvBase],
    ) -> None:
        base = _Wrapper(env, categorical_action_encoding=True, device=device)
        casts: list[Transform] = []
        if (dtype := base.observation_spec["observation"].dtype) != torch.float32 and not _is_image(env):
            casts.append(DTypeCastTransform(dtype, torch.float32, in_keys=["observation"]))
        if isinstance(env.action_space, spaces.Box) and (dtype := base.action_spec.dtype) != torch.float32:
            casts.append(DTypeCastTransform(dtype, torch.float32, in_keys=[], in_keys_inv=["action"]))
        summary = RewardSum(in_keys=["reward"], out_keys=["episode_reward"])
        super().__init__(base_env=base, transform=Compose([*casts, summary, StepCounter()]))
        self._rebuild = rebuild

    def fresh(self, num_envs: int | None = None, seed: int | None = None) -> EnvBase:
        """An independent environment like this one, on the same device.

        Args:
            num_envs: The size of the batch; None keeps this one's.
            seed: As in `make`.

        Raises:
            RuntimeError: If this one was made from an environment that Gymnasium does not know how to build again.
        """
        same = self.batch_size[0] if self.batch_size else None
        return self._rebuild(same if num_envs is None else num_envs, seed)


class _Wrapper(GymWrapper):
    """`GymWrapper`, but a batched reset takes a TensorDict without a mask, or with a mask on another device, too.

    Observations are copied: an environment that reuses its buffer would change the ones it gave out before. An image is
    an ``"observation"`` like any other, where `GymWrapper` calls a single one ``"pixels"`` but not a batch of them.
    """

    def _build_env(self, env: gymnasium.Env | VectorEnv, **kwargs: Any) -> gymnasium.Env | VectorEnv:
        env = super()._build_env(env, **kwargs)
        self.from_pixels = False
        return env

    def read_obs(self, observations: Any) -> dict[str, Any]:
        return super().read_obs(np.array(observations))

    def _replace_reset(self, reset: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if reset is not None:
            mask = reset.reshape(self.batch_size).cpu().numpy()
            kwargs["options"] = {**kwargs.get("options", {}), "reset_mask": mask}
        return kwargs


class _ExplicitReset(VectorWrapper):
    """Presents a vector environment that resets by itself as one that is reset by its caller, by mask.

    In next-step mode the caller's reset comes before the step that would have been a mere reset. In same-step mode the
    reset has happened already: the last observation is taken from the info, and the start is handed out on reset.
    """

    autoreset_mode = AutoresetMode.DISABLED

    def __init__(self, env: VectorEnv) -> None:
        super().__init__(env)
        self._same_step = env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self._starts = np.empty(0)
        self._restarted = np.zeros(self.num_envs, dtype=np.bool_)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(actions)
        self._restarted = (terminated | truncated) & self._same_step
        if self._restarted.any():
            self._starts, observation = observation, observation.copy()
            observation[self._restarted] = np.stack(list(info["final_obs"][self._restarted]))
        return observation, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        restarted, self._restarted = self._restarted, np.zeros_like(self._restarted)
        mask = np.ones_like(restarted) if options is None else options.get("reset_mask", np.ones_like(restarted))
        if seed is not None or (mask.all() and not restarted.all()):
            return super().reset(seed=seed)
        # Those that were reset within their last step start from there; only the others are still to be reset.
        others = mask & ~restarted
        if not others.any():
            return self._starts.copy(), {}
        if not _takes_reset_mask(self.env):
            raise RuntimeError(f"{self.env} cannot reset environments {np.flatnonzero(others).tolist()} in mid-episode")
        observation, info = super().reset(options={"reset_mask": others})
        if restarted.any():
            observation = np.where(restarted.reshape(-1, *[1] * (observation.ndim - 1)), self._starts, observation)
        return observation, info


def _build(id: str | EnvSpec, num_envs: int | None, kwargs: dict[str, Any]) -> gymnasium.Env | VectorEnv:
    """The Gymnasium environment of an id; every way in which there may be none becomes a `ValueError`."""
    register()
    name = id if isinstance(id, str) else id.id
    try:
        if num_envs is None:
            return _adapt(gymnasium.make(id, **kwargs))
        return gymnasium.make_vec(
            id,
            num_envs=num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
            wrappers=[_adapt],  # pyright: ignore[reportArgumentType]
            **kwargs,
        )
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
        raise ValueError(
            f"there is no environment {name!r}: {error} Native ones: {', '.join(sorted(_NATIVE))}; "
            "gymnasium.pprint_registry() lists Gymnasium's. One of another package needs 'package:' before its id."
        ) from error
    except gymnasium.error.DeprecatedEnv as error:
        raise ValueError(f"the environment {name!r} is retired upstream, Gymnasium has it no more: {error}") from error
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"the environment {name!r} cannot be made: {error}{_what_to_install(name, error)}") from error


def _what_to_install(name: str, error: Exception) -> str:
    """The extra of Gymnasium that brings what an environment lacks, as the end of a message."""
    spec = gymnasium.registry.get(name.rpartition(":")[2])
    if spec is None or not isinstance(error, (gymnasium.error.DependencyNotInstalled, ImportError)):
        return ""
    extra = next((extra for extra in _EXTRAS if f".{extra}." in str(spec.entry_point)), None)
    return "" if extra is None else f'. In short: pip install "gymnasium[{extra}]"'


def _wrap_existing(
    env: gymnasium.Env | VectorEnv, num_envs: int | None, device: torch.device, seed: int | None, kwargs: dict[str, Any]
) -> EnvBase:
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: arguments of an environment cannot be set once it exists")
    batched = isinstance(env, VectorEnv)
    if num_envs is not None and (not batched or num_envs != env.num_envs):
        raise ValueError(
            f"num_envs={num_envs}, but the environment exists already, with {env.num_envs if batched else 1}"
        )
    if batched:
        _check_spaces(env.single_observation_space, env.single_action_space, str(env), adaptable=False)
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP and not _takes_reset_mask(env):
            raise ValueError(
                f"{env} cannot be reset one environment at a time (autoreset_mode={mode}), so a step after a last "
                "one would be a mere reset; pass its id and num_envs instead, or use the same-step mode"
            )
        wrapped = GymnasiumEnv(_ExplicitReset(env), device, partial(_refuse_rebuild, str(env)))
    else:
        spec = env.spec
        rebuild = partial(_refuse_rebuild, str(env)) if spec is None else lambda n, s: make(spec, n, device, s)
        wrapped = GymnasiumEnv(_adapt(env), device, rebuild)
    if seed is not None:
        wrapped.set_seed(seed)
    return wrapped


def _takes_reset_mask(env: VectorEnv) -> bool:
    return env.metadata.get("autoreset_mode") == AutoresetMode.DISABLED or isinstance(env.unwrapped, _RESETTABLE)


def _refuse_rebuild(name: str, num_envs: int | None, seed: int | None) -> EnvBase:
    raise RuntimeError(
        f"no second environment can be built like {name}; pass make() the id of a registered one instead"
    )


def _adapt(env: gymnasium.Env) -> gymnasium.Env:
    """Check the spaces of a single environment; make a discrete observation one-hot and let actions count from 0."""
    _check_spaces(env.observation_space, env.action_space, env.spec.id if env.spec else str(env))
    if isinstance(env.observation_space, spaces.Discrete) or env.observation_space.shape == ():
        env = FlattenObservation(env)
    action_space = env.action_space
    if isinstance(action_space, spaces.Discrete) and action_space.start != 0:
        env = TransformAction(env, lambda action: action + action_space.start, spaces.Discrete(int(action_space.n)))
    return env


def _check_spaces(observation: spaces.Space, action: spaces.Space, name: str, adaptable: bool = True) -> None:
    """Refuse, by name, what a TensorDict with one observation and one action cannot hold."""
    if not (isinstance(observation, spaces.Box) or (adaptable and isinstance(observation, spaces.Discrete))):
        raise ValueError(
            f"{name}: observations of the space {type(observation).__name__} are not supported, only Box and Discrete "
            "(of a vector environment that exists already: Box). If they make sense as one vector of numbers, pass "
            "make(gymnasium.wrappers.FlattenObservation(gymnasium.make(...)))"
        )
    if isinstance(action, spaces.Box):
        supported = np.issubdtype(action.dtype, np.floating)
    else:
        supported = isinstance(action, spaces.Discrete) and (adaptable or action.start == 0)
    if not supported:
        raise ValueError(
            f"{name}: actions of the space {action} are not supported, only Discrete and floating-point Box"
        )


def _is_image(env: gymnasium.Env | VectorEnv) -> bool:
    space = env.single_observation_space if isinstance(env, VectorEnv) else env.observation_space
    return space.dtype == np.uint8 and space.shape is not None and len(space.shape) >= 2


def _available(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"there is no device {str(device)!r} here ({reason}); 'cpu' always works") from error
    return device
