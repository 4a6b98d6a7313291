"""Spec conformance: does an environment keep the promises that training relies on?

`check_env` for scripts and notebooks, `EnvConformanceSuite` for pytest, and a command line::

    python -m fp8rl_torchrl.envs.conformance CartPole-v1
    python -m fp8rl_torchrl.envs.conformance my_package.my_module:make_env
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torchrl.envs import EnvBase

from fp8rl_torchrl.envs._conformance.examine import examine
from fp8rl_torchrl.envs._conformance.findings import ADVICE, CHECKS
from fp8rl_torchrl.envs._conformance.randomness import isolated

Status = Literal["passed", "failed", "not reached"]


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check."""

    name: str
    """The check's name."""
    status: Status
    """``"passed"``, ``"failed"`` or ``"not reached"``."""
    messages: tuple[str, ...] = ()
    """What failed, or why the check was not reached."""


@dataclass(frozen=True)
class ConformanceReport:
    """The outcome of every check; printing it gives a table."""

    env: str
    """The environment's class."""
    results: tuple[CheckResult, ...]
    """One result per check, in a fixed order."""
    steps: int
    """Steps taken in the long rollouts."""
    episodes: int
    """Episodes that ended in them."""

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def passed(self) -> tuple[str, ...]:
        """The names of the checks that passed."""
        return tuple(result.name for result in self.results if result.status == "passed")

    @property
    def failed(self) -> dict[str, tuple[str, ...]]:
        """By name of check, everything that failed."""
        return {result.name: result.messages for result in self.results if result.status == "failed"}

    @property
    def not_reached(self) -> dict[str, str]:
        """By name of check, why it could not be carried out."""
        return {result.name: result.messages[0] for result in self.results if result.status == "not reached"}

    def __getitem__(self, name: str) -> CheckResult:
        """The result of one check."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"there is no check {name!r}; the checks are {', '.join(CHECKS)}")

    def __str__(self) -> str:
        """An aligned table: check, outcome, and what was found."""
        width = max(len(result.name) for result in self.results)
        lines = [f"{self.env}: {self.steps} steps, {self.episodes} episodes ended in them"]
        for result in self.results:
            first, *others = result.messages or (CHECKS[result.name],)
            lines.append(f"  {result.name:<{width}}  {result.status:<11}  {first}")
            lines += [f"  {'':<{width}}  {'':<11}  {other}" for other in others]
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.not_reached)} not reached"
        return "\n".join([*lines, counts])


class EnvConformanceError(AssertionError):
    """An environment breaks its specs; the message lists every failure, and ``report`` holds all results."""

    def __init__(self, report: ConformanceReport) -> None:
        self.report = report
        lines = [f"{report.env} fails {len(report.failed)} of {len(report.results)} conformance checks:"]
        for name, messages in report.failed.items():
            lines += [f"  {name}: {message}" for message in messages]
            lines.append(f"    -> {ADVICE[name]}")
        super().__init__("\n".join(lines))


def check_env(env: EnvBase | Callable[[], EnvBase], *, seed: int = 0, max_steps: int = 1000) -> ConformanceReport:
    """Check an environment against its specs and against what collectors and training rely on.

    The environment is driven as a collector drives it, through the ends of episodes, with random actions and with its
    extreme ones. What cannot be decided (no episode ended, the environment shows no randomness, ...) is reported as
    not reached. The caller's global random streams are left as they were; the environment is left reset under ``seed``.

    Args:
        env: An environment, or a function without arguments that builds one. With a function a second instance can be
            built too, which the check ``instances`` needs and ``repeatable`` uses; what was built is closed.
        seed: Seed of the environment and of the actions.
        max_steps: The longest rollout, in steps. Give at least twice the length of an episode: only what is seen can
            be checked.

    Returns:
        What passed, and what was not reached.

    Raises:
        EnvConformanceError: If a check fails. All failures are listed.
        TypeError: If ``env`` is neither an environment nor a function that returns one.
        ValueError: If ``max_steps`` is below 1.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> check_env(GymEnv("CartPole-v1")).ok
        True
    """
    report = _check(env, seed, max_steps)
    if not report.ok:
        raise EnvConformanceError(report)
    return report


def _check(env: EnvBase | Callable[[], EnvBase], seed: int, max_steps: int) -> ConformanceReport:
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    factory = None
    if not isinstance(env, EnvBase):
        if not callable(env):
            raise TypeError(f"expected a TorchRL environment or a function that builds one, got {type(env).__name__}")
        factory = env
        with isolated():
            env = factory()
        if not isinstance(env, EnvBase):
            raise TypeError(f"the function must return a TorchRL environment, it returned {type(env).__name__}")
    try:
        findings, driver = examine(env, factory, seed, max_steps)
    finally:
        if factory is not None:
            env.close(raise_if_closed=False)
    results = []
    for name in CHECKS:
        reason = findings.reason(name)
        if findings.failed(name):
            results.append(CheckResult(name, "failed", findings.messages(name)))
        elif reason is not None:
            results.append(CheckResult(name, "not reached", (reason,)))
        else:
            results.append(CheckResult(name, "passed"))
    return ConformanceReport(type(env).__name__, tuple(results), driver.steps, driver.episodes)


class EnvConformanceSuite:
    """The checks as pytest tests, one per check; a check that is not reached is skipped with its reason.

    The checks run once per class (with pytest-xdist, once per class and worker).

    Example:
        Put this into a test module::

            from fp8rl_torchrl.envs import EnvConformanceSuite

            class TestMyEnv(EnvConformanceSuite):
                make_env = staticmethod(lambda: MyEnv())
    """

    make_env: ClassVar[Any] = None
    """A function without arguments that builds the environment."""
    seed: ClassVar[int] = 0
    """Seed of the environment and of the actions."""
    max_steps: ClassVar[int] = 1000
    """The longest rollout, in steps."""
    _report: ClassVar[ConformanceReport]

    def _conformance(self, name: str) -> None:
        import pytest  # the suite needs it, the package does not

        cls = type(self)
        if "_report" not in cls.__dict__:
            if self.make_env is None:
                pytest.fail(f"{cls.__name__} needs make_env, e.g.: make_env = staticmethod(lambda: MyEnv())")
            cls._report = _check(self.make_env, cls.seed, cls.max_steps)
        result = cls._report[name]
        if result.status == "not reached":
            pytest.skip(result.messages[0])
        if result.status == "failed":
            pytest.fail("\n".join([*result.messages, f"-> {ADVICE[name]}"]), pytrace=False)


def _test_of(name: str) -> Callable[[EnvConformanceSuite], None]:
    def test(self: EnvConformanceSuite) -> None:
        self._conformance(name)

    test.__name__, test.__qualname__, test.__doc__ = f"test_{name}", f"EnvConformanceSuite.test_{name}", CHECKS[name]
    return test


for _name in CHECKS:
    setattr(EnvConformanceSuite, f"test_{_name}", _test_of(_name))


class _BadTargetError(Exception):
    """The command line names nothing that can be checked."""


def _resolve(target: str, num_envs: int | None, seed: int) -> Callable[[], EnvBase]:
    """The function that builds the environment which a command line names."""
    if ":" in target:
        module_name, _, attribute = target.partition(":")
        if num_envs is not None:
            raise _BadTargetError(f"--num-envs goes with a Gymnasium id; let {target} choose its own batch size")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:
            raise _BadTargetError(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise _BadTargetError(f"{module_name!r} has no attribute {attribute!r}")
            found = getattr(found, part)
        if isinstance(found, EnvBase) or not callable(found):
            raise _BadTargetError(f"{target} is a {type(found).__name__}; name a function or class that builds the env")
        return cast("Callable[[], EnvBase]", found)  # what it returns is checked when it is called
    from fp8rl_torchrl.envs.gym import make

    return lambda: make(target, num_envs=num_envs, seed=seed)


def main(arguments: list[str] | None = None) -> int:
    """Check the environment that a command line names, and print the table.

    Args:
        arguments: The command line, without the program's name; None takes the process's.

    Returns:
        0 if the environment passes, 1 if it fails, 2 if there is nothing to check.
    """
    import tyro

    def check(
        target: str,
        /,
        seed: int = 0,
        max_steps: int = 1000,
        num_envs: int | None = None,
    ) -> int:
        """Check that an environment keeps to its specs.

        Args:
            target: A function that builds a TorchRL environment, as package.module:function, or a Gymnasium id.
            seed: Seed of the environment and of the actions.
            max_steps: The longest rollout, in steps.
            num_envs: Environments in the batch, for a Gymnasium id; None for a single one without a batch.
        """
        try:
            factory = _resolve(target, num_envs, seed)
            try:
                env = factory()
            except Exception as error:
                hint = "" if ":" in target else " (a function or class of your own is named module:function)"
                raise _BadTargetError(f"{target} cannot be built: {type(error).__name__}: {error}{hint}") from error
            if not isinstance(env, EnvBase):
                raise _BadTargetError(f"{target} must return a TorchRL EnvBase; it returned {type(env).__name__}")
            env.close(raise_if_closed=False)
            if max_steps < 1:
                raise _BadTargetError(f"--max-steps must be at least 1, got {max_steps}")
        except _BadTargetError as error:
            print(f"check_env: {error}", file=sys.stderr)
            return 2
        report = _check(factory, seed, max_steps)
        print(report)
        if not report.ok:
            print(EnvConformanceError(report), file=sys.stderr)
        return 0 if report.ok else 1

    return tyro.cli(check, args=arguments)


if __name__ == "__main__":
    sys.exit(main())
