"""What a comparison says of each precision on a task, in words that its numbers bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from scores import LEVEL, Paired, holm, probability_of_improvement

MIN_SEEDS = 10
"""With fewer, nothing is claimed."""

WHEN = ("at the end", "over training")
"""Where the scores of `paired` differ."""

Kind = Literal["reference", "equivalent", "worse", "better", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class ModeRuns:
    """The runs of a mode on a task; everything in the order of the seeds."""

    seeds: tuple[int, ...]
    final: tuple[float, ...]
    """Scores at the end."""
    areas: tuple[float, ...]
    """Mean scores over training."""
    frames_per_second: tuple[float, ...]
    memory: tuple[float, ...]
    """Bytes of parameters, gradients, optimizer state, saved activations and replay."""
    diverged: int = 0
    """Runs that ended in numbers that are not finite; they score 0 from there on."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is said of a mode."""

    mode: str
    kind: Kind
    words: str
    equivalence: float
    """Corrected p-value of the test of equivalence, on the score at the end and on the area; the larger."""
    harm: float
    """Corrected p-value of the test whether it is worse, on either; the smaller."""
    smallest_margin: float
    """The smallest margin at which it would be called equivalent, with the same correction; in units of the score."""
    tests: int
    """Among so many tests of equivalence the level is shared when its turn comes (Holm's correction)."""
    improvement: float
    """The probability that a run of it scores above one of the reference."""
    speed: float
    """Frames a second in units of the reference's, median over seeds."""
    memory: float
    """Memory in units of the reference's, median over seeds."""


@dataclass(frozen=True, kw_only=True)
class TaskVerdict:
    """What is said of a task."""

    verdicts: tuple[Verdict, ...]
    sensitive: bool | None
    """Whether a negative control came out worse; None where there was none, or too few seeds to say."""
    advice: str
    """Which precision to use, in a sentence."""


def judge(runs: Mapping[str, ModeRuns], reference: str, controls: Sequence[str], margin: float) -> TaskVerdict:
    """Judge the modes of a task against the reference.

    A mode is equivalent if both its score at the end and the area under its learning curve pass the test of equivalence
    (which needs no correction between the two, for both must pass), worse or better if one of them is by an exact
    test. Tests of a kind are Holm-corrected over the modes of the task.

    Args:
        runs: By mode.
        reference: The mode that the others are compared with.
        controls: The modes that must come out worse.
        margin: Of equivalence, in units of the score (from random to solved).

    Raises:
        ValueError: If the reference is missing, the margin is not positive, or a mode has other seeds.
    """
    if reference not in runs:
        raise ValueError(f"there are no runs of the reference {reference}, only of {', '.join(runs)}")
    if not margin > 0:
        raise ValueError(f"margin must be > 0; got {margin}")
    others = [mode for mode in runs if mode != reference]
    for mode in others:
        if runs[mode].seeds != runs[reference].seeds:
            raise ValueError(f"{mode} and {reference} must have the same seeds: they are compared seed by seed")
    pairs = {mode: paired(runs[mode], runs[reference]) for mode in others}
    compare = len(runs[reference].seeds) > 1
    equivalence = holm([max(pair.equivalence(margin) for pair in pairs[mode]) for mode in others] if compare else [])
    smallest = _smallest_margins(pairs) if compare else {}
    harm = holm([pair.harm() for mode in others for pair in pairs[mode]] if compare else [])
    gain = holm([pair.gain() for mode in others for pair in pairs[mode]] if compare else [])
    verdicts = [_of_reference(reference)]
    for place, mode in enumerate(others):
        if not compare:
            verdicts.append(_verdict(mode, runs, reference, pairs[mode], (1.0, 1.0, 1.0), margin, (float("inf"), 1)))
            continue
        both = slice(2 * place, 2 * place + 2)
        p_values = equivalence[place], min(harm[both]), min(gain[both])
        verdicts.append(_verdict(mode, runs, reference, pairs[mode], p_values, margin, smallest[mode]))
    judged = {verdict.mode: verdict for verdict in verdicts}
    present = [mode for mode in controls if mode in runs]
    enough = len(runs[reference].seeds) >= MIN_SEEDS
    sensitive = any(judged[mode].kind == "worse" for mode in present) if present and enough else None
    return TaskVerdict(
        verdicts=tuple(verdicts),
        sensitive=sensitive,
        advice=_advice(judged, reference, present, sensitive) if enough else _too_few(len(runs[reference].seeds)),
    )


def paired(mode: ModeRuns, reference: ModeRuns) -> tuple[Paired, Paired]:
    """A mode's scores at the end, and its areas, minus those of the reference."""
    final, areas = (
        Paired(differences=tuple(a - b for a, b in zip(ours, theirs, strict=True)))
        for ours, theirs in ((mode.final, reference.final), (mode.areas, reference.areas))
    )
    return final, areas


def _smallest_margins(pairs: Mapping[str, tuple[Paired, Paired]]) -> dict[str, tuple[float, int]]:
    """The smallest margin at which each mode passes both tests of equivalence, and among how many tests at its turn.

    Holm's correction asks the first to pass for a level divided by the number of modes, the next for one divided by one
    less, and so on; none passes before those that came through before it.
    """
    waiting, found, reached = dict(pairs), {}, 0.0
    while waiting:
        own = {mode: max(each.smallest_margin(len(waiting)) for each in pair) for mode, pair in waiting.items()}
        mode = min(own, key=own.__getitem__)
        reached = max(reached, own[mode])
        found[mode] = reached, len(waiting)
        del waiting[mode]
    return found


def _of_reference(mode: str) -> Verdict:
    return Verdict(
        mode=mode,
        kind="reference",
        words="the reference",
        equivalence=0.0,
        harm=1.0,
        smallest_margin=0.0,
        tests=1,
        improvement=0.5,
        speed=1.0,
        memory=1.0,
    )


def _verdict(
    mode: str,
    runs: Mapping[str, ModeRuns],
    reference: str,
    pairs: tuple[Paired, Paired],
    p_values: tuple[float, float, float],
    margin: float,
    found: tuple[float, int],
) -> Verdict:
    own, base = runs[mode], runs[reference]
    smallest, tests = found
    equivalence, harm, gain = p_values
    alpha, count = 1 - LEVEL, len(own.seeds)
    name = reference.upper()
    kind: Kind = "cannot tell"
    if count < MIN_SEEDS:
        words = f"cannot tell: {in_words(count)}, and a claim needs {MIN_SEEDS}"
    elif equivalence <= alpha:
        kind, words = "equivalent", f"equivalent to {name} within {margin:.0%}"
        if 0 < smallest < margin / 2:
            words += f" (even {smallest:.1%})"
    elif harm <= alpha:
        mean, when = min(zip((pair.mean for pair in pairs), WHEN, strict=True))
        kind, words = "worse", f"worse than {name}, by {-mean:.0%} of the way from random to solved {when}"
    elif gain <= alpha:
        mean, when = max(zip((pair.mean for pair in pairs), WHEN, strict=True))
        kind, words = "better", f"better than {name}, by {mean:.0%} of the way from random to solved {when}"
    else:
        words = f"cannot tell: {count} seeds leave room for a difference of up to {smallest:.1%}"
    if own.diverged:
        words += f"; {own.diverged} of {count} runs diverged"
    return Verdict(
        mode=mode,
        kind=kind,
        words=words,
        equivalence=equivalence,
        harm=harm,
        smallest_margin=smallest,
        tests=tests,
        improvement=probability_of_improvement(own.final, base.final),
        speed=median(a / b for a, b in zip(own.frames_per_second, base.frames_per_second, strict=True)),
        memory=median(a / b for a, b in zip(own.memory, base.memory, strict=True)),
    )


def _too_few(count: int) -> str:
    return f"No advice: {in_words(count)}, and a claim needs {MIN_SEEDS}."


def in_words(seeds: int) -> str:
    """Such as ``1 seed`` or ``10 seeds``."""
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def _advice(judged: Mapping[str, Verdict], reference: str, controls: Sequence[str], sensitive: bool | None) -> str:
    """Which precision to use."""
    if sensitive is False:
        return (
            f"No advice: {' and '.join(controls)}, wrong on purpose, should have come out worse and did not, so this "
            "task cannot tell good precisions from bad."
        )
    candidates = [
        verdict
        for verdict in judged.values()
        if verdict.kind in ("reference", "equivalent", "better") and verdict.mode not in controls
    ]
    faster = max(candidates, key=lambda verdict: verdict.speed)
    smaller = min(candidates, key=lambda verdict: verdict.memory)
    caveat = "" if sensitive else " There was no negative control, so nothing shows that the task can tell."
    if faster.speed > 1.05 and faster.mode != reference:
        return f"Use {faster.mode}: {faster.words}, and {faster.speed:.2g}× as fast.{caveat}"
    if smaller.memory < 0.95 and smaller.mode != reference:
        return (
            f"Use {reference} for speed: no precision that keeps its return is faster here. {smaller.mode} is "
            f"{smaller.words} and takes {smaller.memory:.2g}× the memory.{caveat}"
        )
    if len(candidates) == 1:
        return f"Use {reference}: no other precision is shown to keep its return.{caveat}"
    kept = [verdict.mode for verdict in candidates if verdict.mode != reference]
    verb = "keeps" if len(kept) == 1 else "keep"
    keeping = f"{', '.join(kept)} {verb} its return"
    return f"Use {reference}: {keeping}, but by the medians none is faster or smaller here.{caveat}"
