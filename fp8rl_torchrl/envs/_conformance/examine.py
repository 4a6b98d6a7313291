"""The order in which an environment is put through its checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs._conformance import episodes, isolation, partial_resets
from fp8rl_torchrl.envs._conformance.diagnosis import describe, origin
from fp8rl_torchrl.envs._conformance.driver import Driver, Run
from fp8rl_torchrl.envs._conformance.findings import CHECKS, Findings
from fp8rl_torchrl.envs._conformance.layout import show
from fp8rl_torchrl.envs._conformance.randomness import isolated

EDGE_STEPS = 250


def examine(env: EnvBase, factory: Callable[[], EnvBase] | None, seed: int, max_steps: int) -> tuple[Findings, Driver]:
    """Put an environment through every check.

    Args:
        env: The environment; it is left reset under ``seed``.
        factory: Builds further instances, or None.
        seed: Seed of environments and actions.
        max_steps: Length of the longest rollouts.

    Returns:
        What was found, and the driver with its counts of steps and episodes.
    """
    findings = Findings()
    with isolated(), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        driver = Driver(env, findings, seed)
        if driver.layout.ragged:
            for name in CHECKS:
                findings.skip(name, "the specs are stacks of different shapes or keys, which cannot be checked")
            return findings, driver
        _guarded(findings, lambda: check_specs(driver))
        undo = driver.let_resets_be_done()
        try:
            _examine(driver, factory, seed, max_steps)
        finally:
            undo()
        driver.set_seed(seed)
        _guarded(findings, env.reset)
    return findings, driver


def _examine(driver: Driver, factory: Callable[[], EnvBase] | None, seed: int, max_steps: int) -> None:
    findings = driver.findings
    main = driver.run(seed, max_steps, driver.random())
    if not main.start:
        return
    findings.reach("no_crash")
    runs = [main, driver.run(seed + 1, min(max_steps, 137), driver.sticky())]
    runs += _edge_runs(driver, seed + 2, min(max_steps, EDGE_STEPS))

    def compare_runs() -> None:
        starts = episodes.check_starts(driver, seed)
        episodes.check_repeatable(driver, main, factory)
        if starts is not None:
            episodes.check_fresh_episode(driver, starts[0], runs)
            episodes.check_seeds_differ(driver, *starts)

    _guarded(findings, compare_runs)
    _guarded(findings, lambda: isolation.check_inputs(driver, seed))
    _guarded(findings, lambda: isolation.check_actions(driver, seed))
    _guarded(findings, lambda: partial_resets.check_partial_resets(driver, seed))
    _guarded(findings, lambda: isolation.check_stateless(driver, seed))
    _guarded(findings, lambda: isolation.check_instances(driver, seed, factory))


def _edge_runs(driver: Driver, seed: int, steps: int) -> list[Run]:
    """Runs under one extreme action held for long, which drives the environment to the borders of its states."""
    data = driver.reset("before an extreme action is held")
    if data is None:
        return []
    candidates = [action for _, action in driver.extreme_actions(data)]
    candidates = [*candidates[:1], *candidates[-1:]] if len(candidates) > 1 else candidates
    return [driver.run(seed + i, steps, driver.held(action)) for i, action in enumerate(candidates)]


def check_specs(driver: Driver) -> None:
    """Check the specs by themselves: shapes, devices, samples, and the flags that TorchRL needs."""
    env, findings, layout = driver.env, driver.findings, driver.layout
    findings.reach("specs")
    for kind in ("observation", "reward", "done", "state", "action"):
        for key, spec in getattr(layout, kind).items():
            name = f"the {kind} spec of {show(key)}"
            if tuple(spec.shape[: env.batch_dims]) != tuple(env.batch_size):
                message = f"{name} has shape {list(spec.shape)}, which does not start with the environment's batch_size"
                findings.fail("specs", f"{message} {list(env.batch_size)}")
            if env.device is not None and spec.device is not None and not _on(spec.device, env.device):
                findings.fail("specs", f"{name} is on {spec.device}; the environment is on {env.device}")
            _check_sample(driver, name, spec)
    try:
        env.fake_tensordict()
    except Exception as error:
        findings.fail("specs", f"env.fake_tensordict() raised {describe(error)}")
    try:
        drawn = env.rand_action()
        for key, spec in layout.action.items():
            if not spec.is_in(drawn.get(key)):
                findings.fail("specs", f"env.rand_action() gave an action {show(key)} outside its own spec")
    except Exception as error:
        findings.fail("specs", f"env.rand_action() raised {describe(error)}")


def _check_sample(driver: Driver, name: str, spec: TensorSpec) -> None:
    low, high = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    if torch.is_tensor(low) and torch.is_tensor(high):
        if torch.isnan(low).any() or torch.isnan(high).any():
            driver.findings.fail("specs", f"{name} has NaN among its bounds")
            return
        if (low > high).any():
            driver.findings.fail("specs", f"{name} has a lower bound above its upper bound")
            return
    try:
        sample = spec.zero()
        if (
            min(spec.shape, default=0) >= 0
            and torch.is_tensor(sample)
            and (sample.shape != spec.shape or sample.dtype != spec.dtype)
        ):
            driver.findings.fail("specs", f"{name} makes samples of another shape or dtype than it declares")
    except Exception as error:
        driver.findings.fail("specs", f"{name} cannot make a sample: {describe(error)}")


def _on(actual: torch.device, expected: torch.device) -> bool:
    return actual.type == expected.type and (None in (actual.index, expected.index) or actual.index == expected.index)


def _guarded(findings: Findings, checks: Callable[[], object]) -> None:
    """Run a group of checks; one that stumbles over what another has already reported stays not reached."""
    try:
        checks()
    except Exception as error:
        if not findings.count:
            findings.fail("no_crash", f"{describe(error)}; {origin(error)}")
