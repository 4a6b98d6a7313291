"""Checks the values of many steps at once, and that none of them changes after it was returned."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from fp8rl_torchrl.envs._conformance.findings import Findings
from fp8rl_torchrl.envs._conformance.layout import Key, Layout, Leaves, check_values, same, show

MAX_STEPS = 256
MAX_BYTES = 64 * 2**20


@dataclass
class _Series:
    """The values of one entry, as returned (``live``) and as they were then (``copies``)."""

    live: list[torch.Tensor] = field(default_factory=list)
    copies: list[torch.Tensor] = field(default_factory=list)
    moments: list[str] = field(default_factory=list)
    ended: list[torch.Tensor | None] = field(default_factory=list)


class Window:
    """A stretch of a run. Memory is bounded: it is checked and emptied every so many steps.

    Args:
        layout: The specs.
        findings: Where failures go.
        blanks_final: Whether the observation that ends an episode is a placeholder and thus not checked.
    """

    def __init__(self, layout: Layout, findings: Findings, blanks_final: bool) -> None:
        self.layout, self.findings, self.blanks_final = layout, findings, blanks_final
        self._series: dict[tuple[str, Key], _Series] = defaultdict(_Series)
        self._bytes = 0
        self._steps = 0

    def add(self, place: str, entries: Leaves, moment: str, ended: torch.Tensor | None = None) -> None:
        """Add the entries of one TensorDict.

        Args:
            place: ``"root"``, ``"next"`` or ``"action"``.
            entries: Tensors of their specs' shape and dtype.
            moment: When they were returned, for messages.
            ended: Whose episode ended, bool ``[*batch_size]``.
        """
        for key, value in entries.items():
            series = self._series[place, key]
            series.live.append(value)
            series.copies.append(value.detach().clone())
            series.moments.append(moment)
            series.ended.append(ended)
            self._bytes += 2 * value.nbytes
        self._steps += place == "next"
        if self._steps >= MAX_STEPS or self._bytes > MAX_BYTES:
            self.close()

    def close(self) -> None:
        """Check what was added, and forget it."""
        self.findings.reach("keys", "shape", "dtype", "device", "detached", "bounds", "finite", "aliasing")
        self.findings.reach("action_unchanged", "done_flags")
        for (place, key), series in self._series.items():
            self._check_unchanged(place, key, series)
            if place != "action":
                self._check_values(place, key, series)
        self._check_done_flags()
        self._series.clear()
        self._bytes = self._steps = 0

    def _check_unchanged(self, place: str, key: Key, series: _Series) -> None:
        if place == "action" and self.findings.failed("action_unchanged"):
            return
        if same(torch.stack(series.live), torch.stack(series.copies)):
            return
        changed = [i for i, (a, b) in enumerate(zip(series.live, series.copies, strict=True)) if not same(a, b)]
        message = f"{show(key)} ({place}), returned {series.moments[changed[0]]}, was changed by a later step or reset"
        self.findings.fail("aliasing", f"{message} ({len(changed)} of {len(series.live)} were)", (place, key))

    def _check_values(self, place: str, key: Key, series: _Series) -> None:
        values, moments, spec = torch.stack(series.copies), series.moments, self.layout.promised(place)[key]
        if self.blanks_final and place == "next" and key in self.layout.observation:
            kept = [i for i, ended in enumerate(series.ended) if ended is None or not ended.any()]
            values, moments = values[kept], [moments[i] for i in kept]
        if len(values):
            check_values(values, spec, f"{show(key)} ({place})", moments, self.findings)

    def _check_done_flags(self) -> None:
        for key in self.layout.done:
            *prefix, name = (key,) if isinstance(key, str) else key
            if name != "done":
                continue
            parts = {part: (*prefix, part) if prefix else part for part in ("terminated", "truncated")}
            present = {part: k for part, k in parts.items() if k in self.layout.done}
            for place in ("next", "root"):
                self._compare_done(place, key, present)

    def _compare_done(self, place: str, key: Key, causes: dict[str, Key]) -> None:
        series = [self._series.get((place, k)) for k in (key, *causes.values())]
        if not causes or any(s is None for s in series) or len({len(s.copies) for s in series if s}) != 1:
            return
        done, *flags = (torch.stack(s.copies).bool() for s in series if s)
        moments = series[0].moments if series[0] else []
        for name, flag in zip(causes, flags, strict=True):
            wrong = flag & ~done
            if wrong.any():
                at = int(wrong.flatten(1).any(1).nonzero()[0])
                message = f"{show(causes[name])} is true and {show(key)} is false ({place}), {moments[at]}"
                self.findings.fail("done_flags", message, (place, name))
        either = torch.stack(flags).any(0)
        # Without a truncated flag in the specs, done without terminated is how an environment says truncated.
        wrong = done & ~either
        if "truncated" in causes and "terminated" in causes and wrong.any():
            at = int(wrong.flatten(1).any(1).nonzero()[0])
            message = f"{show(key)} is true, terminated and truncated are both false ({place}), {moments[at]}"
            self.findings.fail("done_flags", message, (place, "done"))
