"""Checks that compare whole runs: seeds, repetition, and what an episode leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchrl.envs import EnvBase

from fp8rl_torchrl.envs._conformance.driver import Driver, Frame, Run
from fp8rl_torchrl.envs._conformance.findings import Findings
from fp8rl_torchrl.envs._conformance.layout import Key, Leaves, first_difference, leaves, same, show
from fp8rl_torchrl.envs._conformance.randomness import seed_globals

SEED_OFFSETS = (0, 1, 2, 3, 10, 1000, 2**16, 2**24)
"""Neighbours, and seeds far enough apart to notice one that is cut to its lowest digits or bits."""
RESETS = 8
"""Resets per seed: 64 starts tell what is always the same at a start, and 8 tell two seeds apart."""
COUNTERS = ("step_count", "episode_reward")
"""What TorchRL's transforms call the entries that must start at the same value in every episode."""


@dataclass
class Difference:
    """Where two runs part: ``step`` -1 is the start."""

    step: int
    key: Key
    only_done: bool

    def __str__(self) -> str:
        place = "at the start" if self.step < 0 else f"at step {self.step}"
        return f"{show(self.key)} differs {place}"


def compare(first: Run, second: Run) -> Difference | None:
    """The first difference between two runs, up to where either of them stopped."""
    key = first_difference(first.start, second.start)
    if key is not None:
        return Difference(-1, key, False)
    for step, (a, b) in enumerate(zip(first.frames, second.frames, strict=False)):
        key = first_difference(a.next, b.next)
        if key is None:
            key = first_difference(a.root, b.root)
            if key is None:
                continue
        others = [k for k in a.next if k in b.next and not same(a.next[k], b.next[k])]
        return Difference(
            step, key, bool(others) and all(_last(k) in ("done", "terminated", "truncated") for k in others)
        )
    return None


def check_starts(driver: Driver, seed: int) -> tuple[list[list[Leaves]], list[Run]] | None:
    """Reset several times under several seeds, and check that a seed decides the starts.

    Returns:
        The starts, by seed and reset, and a short run per seed under the same actions; None if a reset raised.
    """
    findings, starts, runs = driver.findings, [], []
    for offset in SEED_OFFSETS:
        sequence = _starts(driver, seed + offset)
        if sequence is None:
            return None
        starts.append(sequence)
        policy = driver.replay(runs[0].actions) if runs else driver.random()
        runs.append(driver.run(seed + offset, len(runs[0].frames) if runs else 16, policy, check=False))
    if not driver.seedable:
        return starts, runs
    findings.reach("reset_seed")
    for sequence, offset in zip(starts[:2], SEED_OFFSETS, strict=False):
        again = _starts(driver, seed + offset)
        if again is None:
            return None
        for number, (first, second) in enumerate(zip(sequence, again, strict=True), 1):
            key = first_difference(first, second)
            if key is not None:
                message = f"{show(key)} of reset number {number} after set_seed({seed + offset}) was another"
                findings.fail("reset_seed", f"{message} when seeded so a second time", "start")
                break
    return starts, runs


def check_seeds_differ(driver: Driver, starts: list[list[Leaves]], runs: list[Run]) -> None:
    """Fail if seeds make no difference in an environment that shows randomness."""
    findings = driver.findings
    if findings.failed("reset_seed", "repeatable", "fresh_episode"):
        findings.skip("seeds_differ", "the same seed does not repeat its episodes, so seeds cannot be compared")
        return
    distinct = max(_distinct(sequence) for sequence in starts)
    # An environment may be deterministic. That it is not shows in successive resets, or in runs under the same actions.
    random_steps = any(compare(runs[0], run) is not None for run in runs[1:])
    alike = [
        (i, j)
        for i in range(len(starts))
        for j in range(i)
        if all(first_difference(a, b) is None for a, b in zip(starts[i], starts[j], strict=True))
        and compare(runs[i], runs[j]) is None
    ]
    if distinct == 1 and not random_steps and not _episodes_vary(driver, runs[0]):
        findings.skip("seeds_differ", "the environment shows no randomness")
        return
    findings.reach("seeds_differ")
    everything = len(alike) == len(runs) * (len(runs) - 1) // 2
    # With few distinct starts two seeds may agree by chance; with many they cannot.
    if everything or (alike and distinct >= RESETS // 2):
        i, j = alike[0]
        message = f"seeds {runs[j].seed} and {runs[i].seed} gave the same {RESETS} starts and the same steps"
        findings.fail("seeds_differ", f"{message}, though successive episodes differ", "alike")


def _episodes_vary(driver: Driver, run: Run) -> bool:
    """Whether, without seeding anew, the same actions from a reset lead elsewhere: noise in the steps alone."""
    outcomes = []
    driver.set_seed(run.seed)
    for _ in range(3):
        data = driver.reset("to look for randomness")
        if data is None:
            return False
        frames = []
        for action in run.actions[:16]:
            try:
                out = driver.env.step(driver.put(data, dict(action)))
            except Exception:
                return False
            frames.append({key: value.clone() for key, value in leaves(out.get("next")).items()})
            if driver.ended(out.get("next")).any():
                break
            data = driver.env.step_mdp(out)
        outcomes.append(frames)
    return any(
        first_difference(a, b) is not None for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=False)
    )


def check_repeatable(driver: Driver, main: Run, factory: Callable[[], EnvBase] | None) -> None:
    """Repeat a run from its seed and actions, after other runs have left the environment in another state."""
    findings = driver.findings
    if not driver.seedable:
        findings.skip("repeatable", "set_seed raises")
        return
    if not main.frames:
        findings.skip("repeatable", "no step could be taken")
        return
    again = _again(driver, main)
    if again.crashed and not main.crashed:
        text = f"a run with seed {main.seed} that had gone well raised at step {len(again.frames)} when it was repeated"
        findings.fail("no_crash", text)
    if not again.frames:
        findings.skip("repeatable", "the run could not be repeated")
        return
    difference = compare(main, again)
    if difference is None:
        findings.reach("repeatable")
        if factory is not None:
            _check_fresh_instance(driver, main, factory)
        return
    if difference.step < 0 and findings.failed("reset_seed") and not _leaks(driver, main):
        findings.skip("repeatable", "the same seed gives different starts (reset_seed)")
        return
    third = compare(again, _again(driver, main))
    text = f"with seed {main.seed} and the same actions, {difference} from the run before"
    if difference.only_done or third is None or _leaks(driver, main):
        findings.fail("fresh_episode", f"{text}: it depends on the episode that came before", "rerun")
        findings.withdraw("reset_seed", "start")
        findings.skip("repeatable", "an old episode leaks into the next one (fresh_episode)")
    else:
        findings.fail("repeatable", text, "rerun")


def _again(driver: Driver, main: Run) -> Run:
    return driver.run(main.seed, len(main.frames), driver.replay(main.actions), check=False)


def _check_fresh_instance(driver: Driver, main: Run, factory: Callable[[], EnvBase]) -> None:
    """A second instance must repeat the run too; building it draws the same random numbers every time."""
    outcomes = []
    for _ in range(2):
        seed_globals(0)
        other = Driver(factory(), Findings(), main.seed)
        other.let_resets_be_done()
        outcomes.append(other.run(main.seed, min(len(main.frames), 200), other.replay(main.actions), check=False))
        other.env.close(raise_if_closed=False)
    difference = compare(outcomes[0], outcomes[1])
    if difference is not None:
        text = f"{difference} between two new instances with seed {main.seed} and the same actions"
        driver.findings.fail("repeatable", text, "instance")


def _leaks(driver: Driver, main: Run) -> bool:
    """Whether a run depends on what happened in the episode before it, rather than on an unseeded generator.

    Two copies of the environment take the same number of steps, with different actions, before the run. A generator
    that the seed does not reach has advanced alike in both; what an episode leaves behind has not.
    """
    for offset in range(6, 42, 6):
        before = main.actions[:6], main.actions[offset : offset + 6]
        try:
            # As long as the same episodes end: an unseeded generator may advance at a reset too.
            one, two = (_ends(_twin(driver), main.seed, actions) for actions in before)
            alike = [torch.equal(a, b) for a, b in zip(one, two, strict=False)]
            steps = alike.index(False) if False in alike else len(alike)
            outcomes = []
            for actions in (before[0], before[0], before[1]):
                twin = _twin(driver)
                twin.run(main.seed, steps, twin.replay(actions), check=False)
                outcomes.append(twin.run(main.seed, min(64, len(main.frames)), twin.replay(main.actions), check=False))
        except Exception:  # an environment that cannot be copied
            return False
        if compare(outcomes[0], outcomes[1]) is not None:
            return False
        if compare(outcomes[0], outcomes[2]) is not None:
            return True
    return False


def _twin(driver: Driver) -> Driver:
    twin = Driver(copy.deepcopy(driver.env), Findings(), 0)
    twin.let_resets_be_done()
    return twin


def _ends(driver: Driver, seed: int, actions: list[Leaves]) -> list[torch.Tensor]:
    """Whose episodes end, step by step, under these actions."""
    run = driver.run(seed, len(actions), driver.replay(actions), check=False)
    return [frame.ended for frame in run.frames]


def check_fresh_episode(driver: Driver, starts: list[list[Leaves]], runs: list[Run]) -> None:
    """Compare the starts of episodes that follow a finished one with those of untouched resets."""
    findings, env = driver.findings, driver.env
    if len(env.reset_keys) != 1:
        findings.skip("fresh_episode", "the environment has several reset keys; only whole runs were compared")
    ends = [(frame, rows) for run in runs for frame in run.frames if (rows := frame.ended).any()]
    if not ends or len(env.reset_keys) != 1:
        findings.skip("fresh_episode", f"no episode ended within {driver.steps} steps")
        return
    findings.reach("fresh_episode")
    flat = [start for sequence in starts for start in sequence]
    for key in [*driver.layout.observation, *driver.layout.state]:
        untouched = [start[key] for start in flat if torch.is_tensor(start.get(key))]
        if len(untouched) == len(flat):
            _check_start(driver, key, torch.stack(untouched), ends)
    lengths = _lengths(runs)
    later = [length for lengths_of_run in lengths for length in lengths_of_run[1:]]
    if len(later) >= 4 and max(later) == 1 and all(first[0] > 3 for first in lengths if first):
        findings.fail("fresh_episode", "every episode but the first after set_seed ends at its first step", "length")


def _check_start(driver: Driver, key: Key, untouched: torch.Tensor, ends: list[tuple[Frame, torch.Tensor]]) -> None:
    """What is the same at all untouched starts, ``[S, *shape]``, must be so too after an episode has ended."""
    batch = driver.env.batch_size
    constant = (untouched == untouched[0]).all(0).reshape(*batch, -1)
    expected = untouched[0].reshape(*batch, -1)
    pairs: list[tuple[Any, Any, torch.Tensor]] = [(f.root.get(key), f.next.get(key), rows) for f, rows in ends]
    if any(not torch.is_tensor(v) or v.shape != untouched.shape[1:] for new, old, _ in pairs for v in (new, old)):
        return
    new = torch.cat([new.reshape(*batch, -1)[rows].reshape(-1, expected.shape[-1]) for new, _, rows in pairs])
    old = torch.cat([old.reshape(*batch, -1)[rows].reshape(-1, expected.shape[-1]) for _, old, rows in pairs])
    wrong = torch.cat(
        [
            ((new.reshape(*batch, -1) != expected) & constant)[rows].reshape(-1, expected.shape[-1])
            for new, _, rows in pairs
        ]
    )
    truncated = torch.cat([_flagged(frame, "truncated", batch)[rows].reshape(-1) for frame, rows in ends])
    # An element may be the same at all untouched starts by chance; a leak shows in most starts after an episode, or in
    # most after one that ended the same way.
    for group in (torch.ones_like(truncated), truncated, ~truncated):
        some = wrong[group]
        least = 1 if _last(key) in COUNTERS else 2 if constant.all() else 3
        often = (some.sum(0) * 2 >= max(len(some), 1)) & (some.sum(0) >= least)
        if often.any() and not _counts_episodes(new):
            element = int(often.nonzero()[0])
            at = int((wrong[:, element] & group).nonzero()[0])
            index = f" element {element}" if expected.shape[-1] > 1 else ""
            message = f"{show(key)}{index} starts at {new[at, element].item():g} after a finished episode"
            was = f"its last value was {old[at, element].item():g}"
            usual = expected.reshape(-1, expected.shape[-1])[0, element].item()
            driver.findings.fail("fresh_episode", f"{message} ({was}); an untouched reset gives {usual:g}", key)
            return
    if driver.findings.failed("aliasing"):
        return  # an overwritten buffer shows the new start where the last observation was
    if len(new) >= 2 and new.is_floating_point() and same(new, old) and not constant.all() and (old != old[0]).any():
        message = f"{show(key)} starts every episode at the last value of the one before"
        driver.findings.fail("fresh_episode", message, key)


def _flagged(frame: Frame, name: str, batch: torch.Size) -> torch.Tensor:
    """Where a done flag of this name is true, bool ``[*batch_size]``."""
    flags = [flag for key, flag in frame.next.items() if _last(key) == name and flag.shape[: len(batch)] == batch]
    if not flags:
        return torch.zeros(batch, dtype=torch.bool)
    return torch.stack([flag.reshape(*batch, -1).bool().any(-1).cpu() for flag in flags]).any(0)


def _counts_episodes(values: torch.Tensor) -> bool:
    """Whether values ``[M, D]`` only ever grow by 0 or 1, as the number of an episode does."""
    if values.is_floating_point() or values.shape[-1] != 1 or len(values) < 3:
        return False
    steps = values.flatten().diff()
    return bool(((steps == 0) | (steps == 1)).all()) and bool(steps.any())


def _lengths(runs: list[Run]) -> list[list[int]]:
    """The lengths of the complete episodes of each run's first environment."""
    lengths = []
    for run in runs:
        ends = [step for step, frame in enumerate(run.frames) if bool(frame.ended.flatten()[0])]
        lengths.append([end - start for start, end in zip([-1, *ends], ends, strict=False)])
    return [found for found in lengths if found]


def _starts(driver: Driver, seed: int) -> list[Leaves] | None:
    """Successive starts from one seed; fails ``aliasing`` if a later reset changes an earlier one."""
    driver.set_seed(seed)
    live, copies = [], []
    for number in range(RESETS):
        data = driver.reset(f"number {number + 1} after set_seed({seed})")
        if data is None:
            return None
        live.append(leaves(data))
        copies.append({key: v.detach().clone() if torch.is_tensor(v) else v for key, v in live[-1].items()})
    for now, then in zip(live, copies, strict=True):
        key = first_difference(now, then)
        if key is not None:
            message = f"{show(key)}, returned by reset(), was changed by a later reset"
            driver.findings.fail("aliasing", message, ("root", key))
    return copies


def _distinct(sequence: list[Leaves]) -> int:
    """How many of these starts differ from all the earlier ones."""
    found: list[Leaves] = []
    for start in sequence:
        if all(first_difference(start, other) is not None for other in found):
            found.append(start)
    return len(found)


def _last(key: Key) -> str:
    return key if isinstance(key, str) else key[-1]
