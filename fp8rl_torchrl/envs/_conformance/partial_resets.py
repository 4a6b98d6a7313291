"""Checks of resetting some environments of a batch while the others go on."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from fp8rl_torchrl.envs._conformance.diagnosis import blame, describe, mask_alone
from fp8rl_torchrl.envs._conformance.driver import Driver, Run
from fp8rl_torchrl.envs._conformance.layout import Key, Leaves, leaves, show
from fp8rl_torchrl.envs._conformance.randomness import fingerprint, generator_states

WARMUP = 3
HORIZON = 12
COMPARED = 2
"""Steps in which an environment that was reset must have left its old path."""
ATTEMPTS = 2
"""Seeds per mask."""


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
        if findings.failed("aliasing", "action_unchanged", "shape"):
            for name in names:
                findings.skip(name, "what was returned or given is overwritten or misshapen, and cannot be compared")
        elif not driver.seedable or findings.failed("repeatable", "fresh_episode", "reset_seed"):
            for name in names:
                findings.skip(name, "the same seed and actions do not repeat a run")
        else:
            for attempt in range(ATTEMPTS):
                _compare_partial_reset(driver, seed + attempt, mask, unrestarted)
    if unrestarted and all(unrestarted):
        message = "after a partial reset the environments in the mask were exactly where they had been before it"
        findings.fail("partial_reset_applied", message, "same")


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
    masked = data.copy().update(mask_alone(driver, mask))
    rows = f"rows {mask.flatten().nonzero().flatten().tolist()[:8]}" if mask.ndim else "the environment"
    try:
        # What step_and_maybe_reset does at the end of an episode: _reset is given nothing but the mask.
        driver.findings.reach("reset_mask_only")
        after = env.reset(masked.clone(), select_reset_only=True)
        driver.layout.inspect(after, "root", f"after a reset of {rows} by mask", driver.findings)
        env.reset(mask_alone(driver, mask))
    except Exception as error:
        if not driver.findings.failed("keys", "shape", "dtype", "device"):
            driver.findings.fail("reset_mask_only", f"a reset of {rows} raised {describe(error)}", "raised")
        return False
    action: Leaves | None = None
    try:
        after = env.reset(masked.clone(), **({"set_state": False} if env._supports_set_state else {}))
        action = driver.random_action(after)
        env.step(driver.put(after, action))
    except Exception as error:
        blame(driver, error, action, f"after a reset of {rows} from the full TensorDict")
        return False
    return True


def _compare_partial_reset(driver: Driver, seed: int, mask: torch.Tensor, unrestarted: list[bool]) -> None:
    """Take the same run twice, the second time with a partial reset after ``WARMUP`` steps."""
    env = driver.env
    plain = driver.run(seed, WARMUP + HORIZON, driver.random(), check=False)
    if len(plain.frames) < WARMUP + HORIZON:
        return
    # Only rows that are still in their first episode when others are reset can be followed.
    first_episode = ~torch.stack([frame.ended for frame in plain.frames[:WARMUP]]).any(0)
    driver.set_seed(seed)
    data = driver.reset("before a partial reset")
    if data is None:
        return
    try:
        for frame in plain.frames[:WARMUP]:
            _, data = env.step_and_maybe_reset(driver.put(data, dict(frame.action)))
        restore = generator_states(env)
        before = data.clone()
        data = env.reset(data.copy().update(mask_alone(driver, mask)), select_reset_only=True)
        driver.check_running(data, "after a partial reset", of=mask)
        # Drawing the new starts advanced the generators; with that undone, the other rows meet the same noise.
        restore()
        _follow(driver, before, data, plain, first_episode, mask, unrestarted)
    except Exception as error:
        blame(driver, error, None, "around a partial reset")


def _follow(
    driver: Driver,
    before: TensorDictBase,
    data: TensorDictBase,
    plain: Run,
    first_episode: torch.Tensor,
    mask: torch.Tensor,
    unrestarted: list[bool],
) -> None:
    """Go on after a partial reset, beside the run without it.

    Args:
        driver: Drives the environment.
        before: The root before the reset.
        data: The root after it.
        plain: The run without the reset.
        first_episode: Which rows are still in their first episode, bool ``[*batch_size]``.
        mask: Which rows were reset.
        unrestarted: Collects whether the rows asked for stayed where they were.
    """
    findings, reset = driver.findings, data.clone()
    followed, continued = first_episode & ~mask, first_episode & mask
    if followed.any():
        findings.reach("partial_reset_isolated")
        key = _row_difference(leaves(before), leaves(reset), followed)
        if key is not None:
            message = f"{show(key)} of an environment outside the mask was changed by the reset of others"
            findings.fail("partial_reset_isolated", message, "rows")
    if continued.any():
        unrestarted.append(_kept(driver, before, reset, continued, plain.start))
    draws, moving, noisy = fingerprint(driver.env), _moving(driver), False
    for step, frame in enumerate(plain.frames[WARMUP:]):
        out, data = driver.env.step_and_maybe_reset(driver.put(data, dict(frame.action)))
        got, drawn, draws = leaves(out.get("next")), draws, fingerprint(driver.env)
        noisy = noisy or (draws != drawn and not driver.ended(out.get("next")).any())
        if noisy and step > 0:
            return  # a shared generator may by now serve the rows in another order
        key = _row_difference(frame.next, got, followed)
        if key is not None:
            message = f"{show(key)} of an environment outside the mask went another way {step + 1} step(s) after"
            findings.fail("partial_reset_isolated", f"{message} others were reset", "rows")
            return
        followed &= ~frame.ended
        if step < COMPARED:
            continued &= ~frame.ended
            for name in moving:
                continued &= _rows_equal(frame.next[name], got[name], mask.shape)
    for name in moving:
        continued &= ~_rows_equal(before.get(name), reset.get(name), mask.shape)
        continued &= ~_rows_equal(before.get(name), plain.start[name], mask.shape)
    if moving and continued.any():
        message = "environments in the mask returned a start, then went on with their old episode"
        findings.fail("partial_reset_applied", message, "continued")


def _moving(driver: Driver) -> list[Key]:
    """The observations by which a continued episode shows: real numbers, not counters that a reset may set back."""
    return [key for key, spec in driver.layout.observation.items() if spec.dtype.is_floating_point]


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


def _row_difference(a: Leaves, b: Leaves, rows: torch.Tensor) -> Key | None:
    """The first key whose entries differ in these rows."""
    for key, value in a.items():
        comparable = torch.is_tensor(value) and torch.is_tensor(b.get(key))
        if comparable and not _rows_equal(value, b[key], rows.shape)[rows].all():
            return key
    return None
