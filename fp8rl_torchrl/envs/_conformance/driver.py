"""Drives an environment as a collector does, and keeps what it returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tensordict import TensorDictBase
from torchrl.envs import AutoResetTransform, EnvBase, TransformedEnv, VecGymEnvTransform

from fp8rl_torchrl.envs._conformance.diagnosis import blame, describe
from fp8rl_torchrl.envs._conformance.findings import Findings
from fp8rl_torchrl.envs._conformance.layout import Layout, Leaves, extremes, leaves, same, show, spec_leaves
from fp8rl_torchrl.envs._conformance.randomness import PrivateStream, seed_globals
from fp8rl_torchrl.envs._conformance.window import Window

MAX_CRASHES = 10
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
            blame(self, error, None, f"in reset() {when}")
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

    def allowed(self, action: Leaves) -> bool:
        """Whether an action is inside the spec now: a mask may change it from step to step."""
        specs = spec_leaves(self.env.full_action_spec)
        return all(getattr(spec, "mask", None) is None or bool(spec.is_in(action[key])) for key, spec in specs.items())

    def put(self, data: TensorDictBase, action: Leaves) -> TensorDictBase:
        """Write an action into a TensorDict."""
        for key, value in action.items():
            data.set(key, value)
        return data

    # --- policies ----------------------------------------------------------------------------------------------------
    def random(self) -> Policy:
        """Fresh random actions."""
        return lambda step, data: self.random_action(data)

    def held(self, action: Leaves) -> Policy:
        """One action for as long as the spec allows it, to drive the environment to the borders of its state space."""
        return lambda step, data: copies(action) if self.allowed(action) else self.random_action(data)

    def sticky(self, period: int = 20) -> Policy:
        """Random actions held for ``period`` steps each, or until the spec no longer allows them."""
        current: Leaves = {}

        def act(step: int, data: TensorDictBase) -> Leaves:
            if step % period == 0 or not self.allowed(current):
                current.update(self.random_action(data))
            return copies(current)

        return act

    def replay(self, actions: Sequence[Leaves]) -> Policy:
        """The given actions, in order."""
        return lambda step, data: copies(actions[step])

    def extreme_actions(self, data: TensorDictBase) -> list[tuple[str, Leaves]]:
        """Each action entry at its extremes, the others random."""
        found = []
        for key, spec in spec_leaves(self.env.full_action_spec).items():
            for label, value in extremes(spec):
                found.append((f"{show(key)} = {label}", {**self.random_action(data), key: value}))
        return found

    # --- a whole run -------------------------------------------------------------------------------------------------
    def run(self, seed: int, steps: int, policy: Policy, *, check: bool = True) -> Run:
        """Seed, reset, then step and reset through ``steps`` steps.

        Args:
            seed: Seed of the environment.
            steps: Steps to take.
            policy: Chooses the actions.
            check: Whether to check what the environment returns against its specs, and to go on after a crash.

        Returns:
            The run, with the frames until the first crash, or until they fill a fixed amount of memory.
        """
        run = Run(seed)
        self.set_seed(seed)
        data = self.reset(f"with seed {seed}")
        if data is None:
            run.crashed = True
            return run
        run.start = copies(leaves(data))
        window = Window(self.layout, self.findings, self.blanks_final) if check else None
        if window is not None:
            after_reset = f"after reset() with seed {seed}"
            window.add("root", self.layout.inspect(data, "root", after_reset, self.findings), after_reset)
        crashes, kept = 0, 0
        for step in range(steps):
            where, action = f"step {step} of a run with seed {seed}", {}
            try:
                action = policy(step, data)
                given = copies(action)
                out, after = self.env.step_and_maybe_reset(self.put(data, action))
            except Exception as error:
                run.crashed = True
                crashes += 1
                if not check:
                    return run
                blame(self, error, action, f"at {where}")
                restart = self.reset(f"after the crash at step {step}") if crashes < MAX_CRASHES else None
                if restart is None:
                    break
                data = restart
                continue
            following = out.get("next")
            ended = self.ended(following)
            if window is not None:
                self.steps += 1
                self.episodes += int(ended.sum())
                self._check_action(given, action, out, where)
                window.add("action", self._fixed(action), f"at {where}")
                self._check_step(window, following, after, ended, where)
            if not run.crashed and kept < KEPT_BYTES:
                frame = Frame(given, copies(leaves(following)), copies(leaves(after, without={"next"})), ended)
                kept += sum(v.nbytes for part in (frame.next, frame.root) for v in part.values() if torch.is_tensor(v))
                run.frames.append(frame)
            data = after
        if window is not None:
            window.close()
        return run

    def _check_action(self, given: Leaves, action: Leaves, out: TensorDictBase, where: str) -> None:
        for key, value in given.items():
            if not same(action[key], value) or not same(out.get(key), value):
                self.findings.fail("action_unchanged", f"the action {show(key)} was changed at {where}", key)

    def _check_step(
        self, window: Window, following: TensorDictBase, after: TensorDictBase, ended: torch.Tensor, where: str
    ) -> None:
        at, after_it = f"at {where}", f"after {where}"
        window.add("next", self.layout.inspect(following, "next", at, self.findings), at, ended)
        window.add("root", self.layout.inspect(after, "root", after_it, self.findings), after_it)
        self.check_running(after, f"after the reset at {where}", of=ended)

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


def copies(entries: Leaves) -> Leaves:
    """Entries that nothing else holds on to."""
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
