"""Drives an environment as a collector does, and keeps what it returned."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import AutoResetTransform, EnvBase, TransformedEnv, VecGymEnvTransform

from fp8rl_torchrl.envs._conformance.findings import Findings
from fp8rl_torchrl.envs._conformance.layout import Layout, Leaves, extremes, leaves, same, show
from fp8rl_torchrl.envs._conformance.randomness import PrivateStream, seed_globals
from fp8rl_torchrl.envs._conformance.window import Window

MAX_CRASHES = 3
KEPT_BYTES = 256 * 2**20

Policy = Callable[[int, TensorDictBase], Leaves]


@dataclass
class Frame:
    """One step of a run: copies of what went in and what came out."""

    action: Leaves
    next: Leaves
    root: Leaves
    """The root after the step, where an episode that ended has been reset."""
    ended: torch.Tensor
    """bool ``[*batch_size]``: whose episode ended in this step."""


@dataclass
class Run:
    """One seeded rollout through several episodes."""

    seed: int
    start: Leaves = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    crashed: bool = False

    @property
    def actions(self) -> list[Leaves]:
        """The actions taken, in order."""
        return [frame.action for frame in self.frames]

    @property
    def episodes(self) -> int:
        """How many episodes ended."""
        return sum(int(frame.ended.sum()) for frame in self.frames)


class Driver:
    """Runs an environment from a seed, checking everything it returns on the way.

    Args:
        env: The environment.
        findings: Where failures go.
        seed: Seed of the actions.
    """

    def __init__(self, env: EnvBase, findings: Findings, seed: int) -> None:
        self.env = env
        self.findings = findings
        self.layout = Layout(env)
        self.steps = 0
        self.episodes = 0
        self._seed = seed
        self._stream = PrivateStream(seed)
        self._seedings = 0
        self.seedable = True
        self.allows_done = bool(env._allow_done_after_reset)
        self.blanks_final = _blanks_final_observation(env)

    # --- one call of the environment at a time -----------------------------------------------------------------------
    def set_seed(self, seed: int) -> None:
        """Seed the environment, with every global generator left in a state that it has not been in before.

        An environment that seeds the global generators itself and draws from them repeats its runs all the same.
        """
        self._seedings += 1
        seed_globals(1_000_003 * self._seedings + 17 * self._seed + 1)
        if not self.seedable:
            return
        try:
            self.env.set_seed(seed)
        except Exception as error:
            self.seedable = False
            self.findings.fail("reset_seed", f"set_seed({seed}) raised {describe(error)}")

    def let_resets_be_done(self) -> Callable[[], None]:
        """Keep TorchRL from raising at a reset that is done: the run goes on and the check can name it.

        Returns:
            Puts everything back.
        """
        base = self.env
        while isinstance(base, TransformedEnv):
            base = base.base_env
        declared = base._allow_done_after_reset
        base._allow_done_after_reset = True

        def undo() -> None:
            base._allow_done_after_reset = declared

        return undo

    def reset(self, when: str) -> TensorDictBase | None:
        """Reset everything; None (and a finding) if that raises."""
        try:
            data = self.env.reset()
        except Exception as error:
            self.blame(error, None, f"in reset() {when}")
            return None
        self.check_running(data, f"after reset() {when}")
        return data

    def check_running(self, data: TensorDictBase, where: str, *, of: torch.Tensor | None = None) -> None:
        """Fail if a done flag is true right after a reset.

        Args:
            data: What the reset returned.
            where: The moment, for messages.
            of: Which environments were reset, bool ``[*batch_size]``; None for all of them.
        """
        if self.allows_done:
            self.findings.skip("reset_clears_done", "the environment declares allow_done_after_reset")
            return
        if of is not None and (len(self.env.reset_keys) > 1 or not of.any()):
            return  # with nested done flags some groups go on where others are reset
        self.findings.reach("reset_clears_done")
        for key in self.layout.done:
            flag = data.get(key, None)
            if not isinstance(flag, torch.Tensor) or flag.device.type == "meta":
                continue
            rows = flag.reshape(*data.batch_size, -1).any(-1).cpu()
            wrong = rows if of is None else rows & of
            if wrong.any():
                which = f" (rows {wrong.flatten().nonzero().flatten().tolist()[:8]})" if wrong.ndim else ""
                self.findings.fail("reset_clears_done", f"{show(key)} is true {where}{which}", key)

    def random_action(self, data: TensorDictBase) -> Leaves:
        """Draw an action from the spec, leaving the global generators alone."""
        with self._stream.active():
            drawn = self.env.rand_action(data.copy())
        return {key: drawn.get(key).clone() for key in self.layout.action}

    def put(self, data: TensorDictBase, action: Leaves) -> TensorDictBase:
        """Write an action into a TensorDict."""
        for key, value in action.items():
            data.set(key, value)
        return data

    # --- policies ------------------------------------------------------------------------------------------------------
    def random(self) -> Policy:
        """Fresh random actions."""
        return lambda step, data: self.random_action(data)

    def held(self, action: Leaves) -> Policy:
        """One action for ever, to drive the environment to the borders of its state space."""
        return lambda step, data: _copies(action)

    def sticky(self, period: int = 20) -> Policy:
        """Random actions held for ``period`` steps each."""
        current: Leaves = {}

        def act(step: int, data: TensorDictBase) -> Leaves:
            if step % period == 0:
                current.update(self.random_action(data))
            return _copies(current)

        return act

    def replay(self, actions: Sequence[Leaves]) -> Policy:
        """The given actions, in order."""
        return lambda step, data: _copies(actions[step])

    def extreme_actions(self, data: TensorDictBase) -> list[tuple[str, Leaves]]:
        """Each action entry at its extremes, the others random."""
        found = []
        for key, spec in self.layout.action.items():
            for label, value in extremes(spec):
                found.append((f"{show(key)} = {label}", {**self.random_action(data), key: value}))
        return found

    # --- a whole run ---------------------------------------------------------------------------------------------------
    def run(self, seed: int, steps: int, policy: Policy, *, check: bool = True, keep: bool = True) -> Run:
        """Seed, reset, then step and reset through ``steps`` steps.

        Args:
            seed: Seed of the environment.
            steps: Steps to take.
            policy: Chooses the actions.
            check: Whether to check what the environment returns against its specs.
            keep: Whether the frames are kept for comparison (up to a fixed amount of memory).
        """
        run = Run(seed)
        self.set_seed(seed)
        data = self.reset(f"with seed {seed}")
        if data is None:
            run.crashed = True
            return run
        window = Window(self.layout, self.findings, self.blanks_final) if check else None
        if window is not None:
            root = self.layout.inspect(data, "root", f"after reset() with seed {seed}", self.findings)
            window.add("root", root, f"after reset() with seed {seed}")
        run.start = _copies(leaves(data))
        crashes, kept = 0, 0
        for step in range(steps):
            action: Leaves = {}
            try:
                action = policy(step, data)
                untouched = _copies(action)
                out, after = self.env.step_and_maybe_reset(self.put(data, action))
            except Exception as error:
                run.crashed = True
                crashes += 1
                if not keep or not check:
                    break
                self.blame(error, action, f"at step {step} of a run with seed {seed}")
                restart = self.reset(f"after the crash at step {step}") if crashes < MAX_CRASHES else None
                if restart is None:
                    break
                data = restart
                continue
            self.steps += 1
            where = f"step {step} of a run with seed {seed}"
            following = out.get("next")
            if window is not None:
                window.add("action", self._fixed(action), f"at {where}")
                for key, value in untouched.items():
                    if not same(action[key], value) or not same(out.get(key), value):
                        self.findings.fail("action_unchanged", f"the action {show(key)} was changed at {where}", key)
                ended = self.ended(following)
                at, after_it = f"at {where}", f"after {where}"
                window.add("next", self.layout.inspect(following, "next", at, self.findings), at, ended)
                window.add("root", self.layout.inspect(after, "root", after_it, self.findings), after_it)
                self.check_running(after, f"after the reset at {where}", of=ended)
            else:
                ended = self.ended(following)
            self.episodes += int(ended.sum())
            if keep and not run.crashed and kept < KEPT_BYTES:
                root = leaves(after, without={"next"})
                frame = Frame(untouched, _copies(leaves(following)), _copies(root), ended)
                kept += sum(v.nbytes for part in (frame.next, frame.root) for v in part.values() if torch.is_tensor(v))
                run.frames.append(frame)
            data = after
        if window is not None:
            window.close()
        return run

    def _fixed(self, action: Leaves) -> Leaves:
        """The action's tensors whose shape never varies."""
        specs = self.layout.action
        return {k: v for k, v in action.items() if torch.is_tensor(v) and v.shape == specs[k].shape}

    def ended(self, following: TensorDictBase) -> torch.Tensor:
        """Whose episode ended, bool ``[*batch_size]``, from the ``"next"`` TensorDict of a step."""
        shape = following.batch_size
        ended = torch.zeros(shape, dtype=torch.bool)
        # TorchRL resets by the flags named done where there are any; terminated alone does not end an episode.
        named = [key for key in self.layout.done if (key if isinstance(key, str) else key[-1]) == "done"]
        for key in named or self.layout.done:
            flag = following.get(key, None)
            if isinstance(flag, torch.Tensor) and flag.device.type != "meta" and flag.shape[: len(shape)] == shape:
                ended |= flag.reshape(*shape, -1).bool().any(-1).cpu()
        return ended

    # --- what went wrong ------------------------------------------------------------------------------------------------
    def blame(self, error: Exception, action: Leaves | None, where: str) -> None:
        """Find the check that an exception belongs to.

        Args:
            error: The exception.
            action: The action that the environment was given, or None if it was reset.
            where: The moment, for messages.
        """
        text = f"{describe(error)} {where}"
        if "True after" in str(error) and "reset" in str(error):
            self.findings.fail("reset_clears_done", text, "raised")
            return
        if self.findings.failed("keys", "shape", "dtype", "device") and _raised_outside(error):
            return  # TorchRL could not take what these failures describe
        in_reset = action is None or _raised_in_reset(error)
        if not in_reset and action and self._rejects(action):
            shown = ", ".join(f"{show(key)} = {value.tolist()}" for key, value in action.items())
            self.findings.fail("action_accepted", f"{shown}, inside its spec, was rejected: {text}", "rejected")
            return
        if self._malformed(in_reset, action, where):
            return
        if in_reset and action is not None:
            try:
                self.env.reset()
            except Exception:
                pass
            else:
                self.findings.fail("reset_mask_only", f"resetting at the end of an episode raised {text}", "raised")
                return
        self.findings.fail("no_crash", f"{text}; {origin(error)}", (type(error), str(error)))

    def _rejects(self, action: Leaves) -> bool:
        """Whether a fresh episode refuses this action but takes another one."""
        if self.accepts(action) is None:
            return False
        for _ in range(8):
            try:
                other = self.random_action(self.env.reset())
            except Exception:
                return False
            if self.accepts(other) is None:
                return True
        return False

    def accepts(self, action: Leaves) -> Exception | None:
        """What a fresh episode raises when it is given this action, or None."""
        try:
            data = self.env.reset()
        except Exception:
            return None
        try:
            self.env.step(self.put(data, _copies(action)))
        except Exception as error:
            return error
        return None

    def _malformed(self, in_reset: bool, action: Leaves | None, where: str) -> bool:
        """Whether the environment itself did not raise, but returned what TorchRL could not take."""
        try:
            if in_reset:
                raw: Any = self.env._reset(None)
            else:
                data = self.env._reset(None)
                raw = self.env._step(self.put(data, _copies(action or {})))
        except Exception:
            return False
        place, call = ("root", "_reset") if in_reset else ("next", "_step")
        if not isinstance(raw, TensorDictBase):
            self.findings.fail("keys", f"{call} returned a {type(raw).__name__}, not a TensorDict, {where}", call)
            return True
        needed = {**self.layout.observation, **({} if in_reset else self.layout.reward)}
        found, malformed = leaves(raw), False
        for key, spec in needed.items():
            name, value = show(key), found.get(key)
            if key not in found:
                malformed = True
                self.findings.fail(
                    "keys", f"{name} is missing from what {call} returns; a spec declares it", (place, key)
                )
            elif isinstance(value, torch.Tensor) and value.numel() != spec.shape.numel():
                malformed = True
                message = f"{name} from {call} has shape {list(value.shape)}; its spec says {list(spec.shape)}"
                self.findings.fail("shape", message, (place, key))
        return malformed


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def origin(error: BaseException) -> str:
    """Where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"raised in {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else "raised elsewhere"


def _raised_in_reset(error: BaseException) -> bool:
    return any(frame.name in ("maybe_reset", "reset", "_reset") for frame in traceback.extract_tb(error.__traceback__))


def _raised_outside(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(f"{package}{os.sep}" in frames[-1].filename for package in ("tensordict", "torchrl"))


def _copies(entries: Leaves) -> Leaves:
    return {key: value.detach().clone() if torch.is_tensor(value) else value for key, value in entries.items()}


def _blanks_final_observation(env: EnvBase) -> bool:
    """Whether TorchRL itself puts a placeholder (NaN) where an auto-resetting simulator lost the final observation."""
    while True:
        if env.__dict__.get("_torchrl_native_autoreset", False):
            return True
        if not isinstance(env, TransformedEnv):
            return False
        transforms = getattr(env.transform, "transforms", [env.transform])
        if any(isinstance(transform, (AutoResetTransform, VecGymEnvTransform)) for transform in transforms):
            return True
        env = env.base_env
