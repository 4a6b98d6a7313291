"""Checks that one part of an environment does not reach into another: inputs, rows, instances, hidden state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs._conformance.driver import Driver, describe
from fp8rl_torchrl.envs._conformance.findings import Findings
from fp8rl_torchrl.envs._conformance.layout import Key, Leaves, first_difference, leaves, same, show
from fp8rl_torchrl.envs._conformance.randomness import (
    fingerprint,
    generator_states,
    global_state,
    seed_globals,
    set_global_state,
)

HORIZON = 12
COMPARED = 3
"""Steps in which an environment that was reset must have left its old path."""


def check_inputs(driver: Driver, seed: int, steps: int = 24) -> None:
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
            before = {key: v.clone() if torch.is_tensor(v) else v for key, v in leaves(root).items()}
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
        error = driver.accepts(action)
        if error is None:
            driver.findings.reach("action_accepted")
        else:
            driver.blame(error, action, f"at the first step of an episode, for {label}")


def check_stateless(driver: Driver, seed: int) -> None:
    """Replay saved TensorDicts after other steps, where an environment declares ``stateless = True``."""
    if getattr(driver.env, "stateless", False) is not True:
        driver.findings.skip("stateless", "the environment does not declare stateless = True")
        return
    driver.set_seed(seed)
    data = driver.reset("to check statelessness")
    saved: list[tuple[TensorDictBase, Leaves]] = []
    try:
        for _ in range(2 * HORIZON if data is not None else 0):
            driver.put(data, driver.random_action(data))
            before = data.clone()
            out, data = driver.env.step_and_maybe_reset(data)
            saved.append((before, _copied(leaves(out.get("next")))))
        driver.run(seed + 1, HORIZON, driver.random(), check=False)
        for step in reversed(range(len(saved))):
            before, expected = saved[step]
            key = first_difference(expected, leaves(driver.env.step(before.clone()).get("next")))
            if key is not None:
                message = f"{show(key)} of step {step} came out differently when the step was repeated later"
                driver.findings.fail("stateless", f"{message} from its saved TensorDict", "replay")
    except Exception as error:
        driver.findings.fail(
            "stateless", f"repeating a step from its saved TensorDict raised {describe(error)}", "raised"
        )
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
    alone = driver.run(seed, HORIZON, driver.random(), check=False)
    other = Driver(factory(), Findings(), seed + 1)
    other.let_resets_be_done()
    try:
        driver.set_seed(seed)
        data = driver.reset("beside a second instance")
        other.set_seed(seed + 1)
        with_other = other.reset("beside a first instance")
        if data is None or with_other is None:
            return
        # The globals belong to whoever runs: what is shared through them is no state of the environment.
        driver.set_seed(seed)
        data = driver.reset("beside a second instance")
        for step, frame in enumerate(alone.frames):
            outside = global_state()
            seed_globals(step)
            _, with_other = other.env.step_and_maybe_reset(other.put(with_other, other.random_action(with_other)))
            set_global_state(outside)
            assert data is not None
            out, data = driver.env.step_and_maybe_reset(driver.put(data, dict(frame.action)))
            driver.findings.reach("instances")
            key = first_difference(frame.next, leaves(out.get("next")))
            if key is not None:
                message = f"{show(key)} at step {step} changed because a second instance took steps in between"
                driver.findings.fail("instances", message, "interleaved")
                return
    except Exception as error:
        driver.findings.fail("instances", f"two instances used in turn: {describe(error)}", "raised")
    finally:
        other.env.close(raise_if_closed=False)


def check_partial_resets(driver: Driver, seed: int) -> None:
    """Reset some environments of a batch mid-episode and compare with the same run without that reset."""
    env, findings = driver.env, driver.findings
    names = ("partial_reset_isolated", "partial_reset_applied")
    if len(env.reset_keys) != 1 or driver.blanks_final:
        why = "it resets itself" if driver.blanks_final else "it has several reset keys"
        for name in (*names, "reset_mask_only"):
            findings.skip(name, f"the environment takes no reset mask from outside: {why}")
        return
    if env.batch_size.numel() < 2:
        for name in names:
            findings.skip(name, "the environment is not a batch of several")
        _reset_by_mask_alone(driver, seed, torch.ones(env.batch_size, dtype=torch.bool))
        return
    first, last, half = (torch.zeros(env.batch_size.numel(), dtype=torch.bool) for _ in range(3))
    first[0] = last[-1] = half[::2] = True
    unrestarted: list[bool] = []
    for mask in (last, first, half):
        mask = mask.reshape(env.batch_size)
        if not _reset_by_mask_alone(driver, seed, mask):
            return
        if driver.seedable and not findings.failed("repeatable", "fresh_episode", "reset_seed"):
            for attempt in range(3):
                _compare_partial_reset(driver, seed + attempt, mask, unrestarted)
        else:
            for name in names:
                findings.skip(name, "the same seed and actions do not repeat a run")
    if unrestarted and all(unrestarted):
        message = "after a partial reset the environments in the mask were exactly where they had been before it"
        findings.fail("partial_reset_applied", message, "same")


def _masked(driver: Driver, data: TensorDictBase, mask: torch.Tensor) -> TensorDictBase:
    key, flag = driver.env.reset_keys[0], driver.layout.done[driver.env.done_keys_groups[0][0]]
    full = mask.to(flag.device or "cpu")
    full = full.reshape(*mask.shape, *(1 for _ in flag.shape[mask.ndim :])).expand(flag.shape).clone()
    return data.copy().set(key, full)


def _reset_by_mask_alone(driver: Driver, seed: int, mask: torch.Tensor) -> bool:
    """Reset with TensorDicts that hold only the mask, and with a full one."""
    env = driver.env
    driver.set_seed(seed)
    data = driver.reset("before a reset by mask")
    if data is None:
        return False
    try:
        data = env.step_mdp(env.step(driver.put(data, driver.random_action(data))))
    except Exception:
        return False
    masked = _masked(driver, data, mask)
    rows = f"rows {mask.flatten().nonzero().flatten().tolist()[:8]}" if mask.ndim else "the environment"
    try:
        # What step_and_maybe_reset does at the end of an episode: _reset is given nothing but the mask.
        driver.findings.reach("reset_mask_only")
        after = env.reset(masked.clone(), select_reset_only=True)
        driver.layout.inspect(after, "root", f"after a reset of {rows} by mask", driver.findings)
        only = TensorDict({}, batch_size=data.batch_size, device=data.device)
        env.reset(_masked(driver, only, mask))
    except Exception as error:
        if not driver.findings.failed("keys", "shape", "dtype", "device"):
            driver.findings.fail("reset_mask_only", f"a reset of {rows} raised {describe(error)}", "raised")
        return False
    try:
        after = env.reset(masked.clone(), **({"set_state": False} if env._supports_set_state else {}))
        env.step(driver.put(after, driver.random_action(after)))
    except Exception as error:
        message = f"a reset of {rows} from the full TensorDict, then a step, raised {describe(error)}"
        driver.findings.fail("no_crash", message, "masked")
        return False
    return True


def _compare_partial_reset(driver: Driver, seed: int, mask: torch.Tensor, unrestarted: list[bool]) -> None:
    env, findings = driver.env, driver.findings
    warmup = HORIZON // 2
    plain = driver.run(seed, warmup + HORIZON, driver.random(), check=False)
    if len(plain.frames) < warmup + HORIZON:
        return
    # Only rows that are still in their first episode when others are reset can be followed.
    fresh = ~torch.stack([frame.ended for frame in plain.frames[:warmup]]).any(0)
    others = fresh & ~mask
    asked = fresh & mask
    driver.set_seed(seed)
    data = driver.reset("before a partial reset")
    try:
        for frame in plain.frames[:warmup]:
            _, data = env.step_and_maybe_reset(driver.put(data, dict(frame.action)))
        restore = generator_states(env)
        before = data.clone()
        data = env.reset(_masked(driver, data, mask), select_reset_only=True)
        driver.check_running(data[mask], "after a partial reset")
        # Drawing the new starts advanced the generators; with that undone, the other rows see the noise they would have.
        restore()
        draws = fingerprint(env)
        _compare_rows(driver, before, data, others, plain.frames[warmup - 1].root, "right after")
        if asked.any():
            unrestarted.append(_kept(driver, before, data, asked, plain.start))
        data_after, followed, continued = data.clone(), others.clone(), asked.clone()
        noisy = finished = False
        for step, frame in enumerate(plain.frames[warmup:]):
            out, data = env.step_and_maybe_reset(driver.put(data, dict(frame.action)))
            noisy = noisy or fingerprint(env) != draws
            if noisy and step > 0:
                break  # a shared generator may by now serve the rows in another order
            got = leaves(out.get("next"))
            if followed.any():
                findings.reach("partial_reset_isolated")
                key = _row_difference(frame.next, got, followed)
                if key is not None:
                    message = (
                        f"{show(key)} of an environment outside the mask went another way {step + 1} step(s) after"
                    )
                    findings.fail("partial_reset_isolated", f"{message} others were reset", "rows")
                    break
            followed &= ~frame.ended
            if step < COMPARED:
                for name in _moving(driver):
                    continued &= _rows_equal(frame.next[name], got[name], mask.shape)
                continued &= ~frame.ended
            finished = not noisy and step >= COMPARED - 1
    except Exception as error:
        driver.blame(error, None, "around a partial reset")
        return
    if finished and _moving(driver):
        for name in _moving(driver):
            continued &= ~_rows_equal(before.get(name), data_after.get(name), mask.shape)
            continued &= ~_rows_equal(before.get(name), plain.start[name], mask.shape)
        if continued.any():
            message = "environments in the mask returned a start, then went on with their old episode"
            findings.fail("partial_reset_applied", message, "continued")


def _moving(driver: Driver) -> list[Key]:
    """The observations by which a continued episode shows: real numbers, not counters that a reset may set back."""
    return [key for key, spec in driver.layout.observation.items() if spec.dtype.is_floating_point]


def _compare_rows(
    driver: Driver, before: TensorDictBase, after: TensorDictBase, rows: torch.Tensor, root: Leaves, when: str
) -> None:
    if rows.any():
        driver.findings.reach("partial_reset_isolated")
        entries = {key: value for key, value in leaves(after).items() if key in driver.layout.root}
        key = _row_difference({k: v for k, v in leaves(before).items() if k in entries}, entries, rows)
        if key is not None:
            message = f"{show(key)} of an environment outside the mask changed {when} the reset"
            driver.findings.fail("partial_reset_isolated", message, "rows")


def _kept(driver: Driver, before: TensorDictBase, after: TensorDictBase, rows: torch.Tensor, start: Leaves) -> bool:
    """Whether these rows are still where they were, though that is not where an episode starts."""
    driver.findings.reach("partial_reset_applied")
    kept, moved = True, False
    for key in driver.layout.observation:
        old, new = before.get(key, None), after.get(key, None)
        if torch.is_tensor(old) and torch.is_tensor(new) and key in start:
            kept = kept and bool(_rows_equal(old, new, rows.shape)[rows].all())
            moved = moved or not bool(_rows_equal(old, start[key], rows.shape)[rows].any())
    return kept and moved


def _rows_equal(a: torch.Tensor, b: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """Which rows of two entries are equal, bool ``[*batch]``; NaN equals NaN."""
    if a.shape != b.shape:
        return torch.zeros(batch, dtype=torch.bool)
    a, b = a.detach().reshape(*batch, -1).cpu(), b.detach().reshape(*batch, -1).cpu()
    return ((a == b) | ((a != a) & (b != b))).all(-1)


def _row_difference(a: Leaves, b: Leaves, rows: torch.Tensor):
    """The first key whose entries differ in these rows."""
    for key, value in a.items():
        if torch.is_tensor(value) and torch.is_tensor(b.get(key)):
            if not _rows_equal(value, b[key], rows.shape)[rows].all():
                return key
    return None


def _copied(entries: Leaves) -> Leaves:
    return {key: value.detach().clone() if torch.is_tensor(value) else value for key, value in entries.items()}
