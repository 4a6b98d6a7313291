"""Which check an exception belongs to."""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase

from fp8rl_torchrl.envs._conformance.layout import Leaves, leaves, show

if TYPE_CHECKING:
    from fp8rl_torchrl.envs._conformance.driver import Driver


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def origin(error: BaseException) -> str:
    """Where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"raised in {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})" if frames else "raised elsewhere"


def blame(driver: Driver, error: Exception, action: Leaves | None, where: str) -> None:
    """File an exception under the check it belongs to.

    Args:
        driver: Drives the environment that raised.
        error: The exception.
        action: The action that the environment was given, or None if it was reset.
        where: The moment, for messages.
    """
    findings, frames = driver.findings, traceback.extract_tb(error.__traceback__)
    text = f"{describe(error)} {where}"
    if "True after" in str(error) and "reset" in str(error):  # TorchRL's own complaint, from a nested environment
        findings.fail("reset_clears_done", text, "raised")
        return
    outside = any(f"{package}{os.sep}" in frames[-1].filename for package in ("tensordict", "torchrl"))
    if outside and findings.failed("keys", "shape", "dtype", "device"):
        return  # TorchRL could not take what those failures describe
    in_reset = action is None or any(frame.name == "maybe_reset" for frame in frames)
    if not in_reset and action and _rejects(driver, action):
        shown = ", ".join(f"{show(key)} = {value.tolist()}" for key, value in action.items())
        findings.fail("action_accepted", f"{shown}, inside its spec, was rejected: {text}", "rejected")
    elif _malformed(driver, in_reset, action, where):
        pass
    elif in_reset and action is not None and _needs_more_than_mask(driver):
        findings.fail("reset_mask_only", f"resetting at the end of an episode raised {text}", "raised")
    else:
        findings.fail("no_crash", f"{text}; {origin(error)}", (type(error), str(error)))


def refusal(driver: Driver, action: Leaves) -> Exception | None:
    """What a fresh episode raises when it is given this action, or None."""
    try:
        data = driver.env.reset()
    except Exception:
        return None
    if not driver.allowed(action):
        return None
    try:
        driver.env.step(driver.put(data, {key: value.clone() for key, value in action.items()}))
    except Exception as error:
        return error
    return None


def mask_alone(driver: Driver, rows: torch.Tensor) -> TensorDict:
    """A TensorDict with nothing but the reset mask.

    Args:
        driver: Drives the environment.
        rows: Which environments to reset, bool ``[*batch_size]``.
    """
    env = driver.env
    flag = driver.layout.done[env.done_keys_groups[0][0]]
    full = rows.to(flag.device or "cpu")
    full = full.reshape(*rows.shape, *(1 for _ in flag.shape[rows.ndim :])).expand(flag.shape).clone()
    return TensorDict({env.reset_keys[0]: full}, batch_size=env.batch_size, device=env.device)


def _rejects(driver: Driver, action: Leaves) -> bool:
    """Whether a fresh episode refuses this action but takes another one."""
    if refusal(driver, action) is None:
        return False
    try:
        data = driver.env.reset()
        others = [driver.random_action(data) for _ in range(8)]
        others += [other for _, other in driver.extreme_actions(data)]
    except Exception:
        return False
    return any(refusal(driver, other) is None for other in others)


def _needs_more_than_mask(driver: Driver) -> bool:
    """Whether `_reset` raises for a TensorDict that holds only the mask, though it works without one."""
    if len(driver.env.reset_keys) != 1:
        return False
    rows = torch.ones(driver.env.batch_size, dtype=torch.bool)
    try:
        driver.env.reset()
    except Exception:
        return False
    try:
        driver.env.reset(mask_alone(driver, rows), select_reset_only=True)
    except Exception:
        return True
    return False


def _malformed(driver: Driver, in_reset: bool, action: Leaves | None, where: str) -> bool:
    """Whether the environment itself did not raise, but returned what TorchRL could not take."""
    nothing: Any = None
    try:
        raw: Any = driver.env._reset(nothing)
        if not in_reset:
            raw = driver.env._step(driver.put(raw, {key: value.clone() for key, value in (action or {}).items()}))
    except Exception:
        return False
    place, call = ("root", "_reset") if in_reset else ("next", "_step")
    if not isinstance(raw, TensorDictBase):
        driver.findings.fail("keys", f"{call} returned a {type(raw).__name__}, not a TensorDict, {where}", call)
        return True
    found, malformed = leaves(raw), False
    for key, spec in {**driver.layout.observation, **({} if in_reset else driver.layout.reward)}.items():
        value, fixed = found.get(key), min(spec.shape, default=0) >= 0
        if key not in found:
            message = f"{show(key)} is missing from what {call} returns; a spec declares it"
            driver.findings.fail("keys", message, (place, key))
            malformed = True
        elif isinstance(value, torch.Tensor) and fixed and value.numel() != spec.shape.numel():
            message = f"{show(key)} from {call} has shape {list(value.shape)}; its spec says {list(spec.shape)}"
            driver.findings.fail("shape", message, (place, key))
            malformed = True
    return malformed
