"""Checks of what goes into a step: inputs and actions, and whatever else reaches it (hidden state, other instances)."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs._conformance.diagnosis import blame, describe, refusal
from fp8rl_torchrl.envs._conformance.driver import Driver, copies
from fp8rl_torchrl.envs._conformance.findings import Findings
from fp8rl_torchrl.envs._conformance.layout import Leaves, first_difference, leaves, same, show
from fp8rl_torchrl.envs._conformance.randomness import global_state, seed_globals, set_global_state

STEPS = 24


def check_inputs(driver: Driver, seed: int, steps: int = STEPS) -> None:
    """Give every step a TensorDict of its own; neither that step nor a later one may change it."""
    driver.set_seed(seed)
    data = driver.reset("to check what a step does to its input")
    if data is None:
        return
    given: list[tuple[TensorDictBase, Leaves]] = []
    for step in range(steps):
        try:
            action = driver.random_action(data)
            root = driver.put(data.clone(), action)
            before = copies(leaves(root))
            given.append((root, before))
            out = driver.env.step(root)
            data = driver.env.maybe_reset(driver.env.step_mdp(out))
        except Exception as error:
            driver.findings.skip("input_unchanged", f"step {step} raised {describe(error)}")
            return
    driver.findings.reach("input_unchanged")
    for step, (root, before) in enumerate(given):
        after = leaves(root, without={"next"})
        for key in after.keys() - before.keys():
            driver.findings.fail("input_unchanged", f"step {step} added {show(key)} to its input", key)
        for key in before:
            if key in driver.layout.action and driver.findings.failed("action_unchanged"):
                continue
            if key not in after:
                driver.findings.fail("input_unchanged", f"step {step} removed {show(key)} from its input", key)
            elif not same(before[key], after[key]):
                message = f"{show(key)} in the TensorDict given to step {step} was changed"
                driver.findings.fail("input_unchanged", message, key)


def check_actions(driver: Driver, seed: int) -> None:
    """Take every extreme action from a fresh episode, twice."""
    driver.set_seed(seed)
    data = driver.reset("to try the extreme actions")
    if data is None:
        return
    candidates = driver.extreme_actions(data)
    if not candidates:
        candidates = [("a random action", driver.random_action(data)) for _ in range(4)]
    for label, action in candidates:
        error = refusal(driver, action)
        if error is None:
            driver.findings.reach("action_accepted")
        else:
            blame(driver, error, action, f"at the first step of an episode, for {label}")


def check_stateless(driver: Driver, seed: int) -> None:
    """Replay saved TensorDicts after other steps, where an environment declares ``stateless = True``."""
    if getattr(driver.env, "stateless", False) is not True:
        driver.findings.skip("stateless", "the environment does not declare stateless = True")
        return
    driver.set_seed(seed)
    data = driver.reset("to check statelessness")
    if data is None:
        return
    saved: list[tuple[TensorDictBase, Leaves]] = []
    try:
        for _ in range(STEPS):
            driver.put(data, driver.random_action(data))
            before = data.clone()
            out, data = driver.env.step_and_maybe_reset(data)
            saved.append((before, copies(leaves(out.get("next")))))
        driver.run(seed + 1, STEPS, driver.random(), check=False)
        for step in reversed(range(len(saved))):
            before, expected = saved[step]
            key = first_difference(expected, leaves(driver.env.step(before.clone()).get("next")))
            if key is not None:
                message = f"{show(key)} of step {step} came out differently when the step was repeated later"
                driver.findings.fail("stateless", f"{message} from its saved TensorDict", "replay")
    except Exception as error:
        message = f"repeating a step from its saved TensorDict raised {describe(error)}"
        driver.findings.fail("stateless", message, "raised")
    if saved:
        driver.findings.reach("stateless")


def check_instances(driver: Driver, seed: int, factory: Callable[[], EnvBase] | None) -> None:
    """Run one instance while another is used in between; each keeps global random streams of its own."""
    if factory is None:
        driver.findings.skip("instances", "only one instance was given; pass a function that builds the environment")
        return
    if driver.findings.failed("repeatable", "fresh_episode", "reset_seed"):
        driver.findings.skip("instances", "a run does not repeat even without another instance")
        return
    alone = driver.run(seed, STEPS, driver.random(), check=False)
    other = Driver(factory(), Findings(), seed + 1)
    other.let_resets_be_done()
    try:
        other.set_seed(seed + 1)
        with_other = other.reset("beside a first instance")
        driver.set_seed(seed)
        data = driver.reset("beside a second instance")
        if data is None or with_other is None:
            return
        for step, frame in enumerate(alone.frames):
            # The globals belong to whoever runs: what is shared through them is no state of the environment.
            outside = global_state()
            seed_globals(step)
            _, with_other = other.env.step_and_maybe_reset(other.put(with_other, other.random_action(with_other)))
            set_global_state(outside)
            out, data = driver.env.step_and_maybe_reset(driver.put(data, dict(frame.action)))
            driver.findings.reach("instances")
            key = first_difference(frame.next, leaves(out.get("next")))
            if key is not None:
                message = f"{show(key)} at step {step} changed because a second instance took steps in between"
                driver.findings.fail("instances", message, "interleaved")
                return
    except Exception as error:
        if driver.findings.failed("no_crash", "action_accepted", "reset_mask_only"):
            return  # it raises without another instance too
        driver.findings.fail("instances", f"two instances used in turn: {describe(error)}", "raised")
    finally:
        other.env.close(raise_if_closed=False)
