"""Planted cases: a mode that is worse, one that is the same, one with too few seeds, at a ceiling and below zero."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scores import Paired, normalized
from verdicts import MIN_SEEDS, ModeRuns, judge, paired

CONTROLS = ("fp16-naive", "fp8-unscaled")


def runs(final, areas=None, speed=100.0, memory=1000.0, diverged=0):
    final = tuple(map(float, final))
    return ModeRuns(
        seeds=tuple(range(len(final))),
        final=final,
        areas=tuple(map(float, areas)) if areas is not None else final,
        frames_per_second=(speed,) * len(final),
        memory=(memory,) * len(final),
        diverged=diverged,
    )


def noisy(mean, spread=0.02, seeds=10, seed=0):
    return mean + spread * np.random.default_rng(seed).normal(size=seeds)


def kinds(found):
    return {verdict.mode: verdict.kind for verdict in found.verdicts}


def test_worse_equivalent_better():
    found = judge(
        {
            "fp32": runs(noisy(0.9, seed=1)),
            "bf16": runs(noisy(0.9, seed=2), speed=160.0, memory=900.0),
            "fp16": runs(noisy(1.2, seed=3)),
            "fp16-naive": runs(noisy(0.1, seed=4), diverged=3),
        },
        "fp32",
        CONTROLS,
        0.05,
    )
    assert kinds(found) == {"fp32": "reference", "bf16": "equivalent", "fp16": "better", "fp16-naive": "worse"}
    words = {verdict.mode: verdict.words for verdict in found.verdicts}
    even = f"(even {found.verdicts[1].smallest_margin:.1%})"
    assert words["bf16"] == f"equivalent to FP32 within 5% {even}"
    assert words["fp16-naive"].startswith("worse than FP32, by 8")
    assert words["fp16-naive"].endswith("; 3 of 10 runs diverged")
    assert found.sensitive is True
    assert found.advice == f"Use bf16: equivalent to FP32 within 5% {even}, and 1.6× as fast."


def test_identical_runs_are_equivalent():
    same = noisy(0.7, spread=0.3)
    found = judge({"fp32": runs(same), "bf16": runs(same)}, "fp32", CONTROLS, 0.01)
    assert kinds(found)["bf16"] == "equivalent"


def test_what_is_shown_beyond_the_margin_is_said():
    """Differences of ±0.003: a standard error of 0.001; the t quantile with nine degrees of freedom is 1.833."""
    reference = noisy(0.7)
    near = reference + 0.003 * np.array([1, -1] * 5)
    found = judge({"fp32": runs(reference), "bf16": runs(near)}, "fp32", (), 0.05)
    assert found.verdicts[1].words == "equivalent to FP32 within 5% (even 0.2%)"
    assert found.verdicts[1].smallest_margin == pytest.approx(1.833 * 0.001, rel=1e-3)


def test_at_the_ceiling():
    ceiling = np.ones(10)
    spoiled = ceiling.copy()
    spoiled[:7] = [0.2, 0.9, 0.5, 0.1, 0.8, 0.3, 0.6]
    found = judge({"fp32": runs(ceiling), "bf16": runs(ceiling), "fp8": runs(spoiled)}, "fp32", CONTROLS, 0.05)
    assert kinds(found) == {"fp32": "reference", "bf16": "equivalent", "fp8": "worse"}


def test_negative_returns():
    def of(mean, seed):
        return runs(normalized("Pendulum-v1", mean + 10 * np.random.default_rng(seed).normal(size=10)))

    found = judge({"fp32": of(-180, 0), "bf16": of(-182, 1), "fp8-unscaled": of(-900, 2)}, "fp32", CONTROLS, 0.05)
    assert kinds(found) == {"fp32": "reference", "bf16": "equivalent", "fp8-unscaled": "worse"}


def test_slower_learning_is_seen_though_the_end_is_the_same():
    end = noisy(1.0, 0.001)
    found = judge({"fp32": runs(end, noisy(0.8, seed=5)), "fp8": runs(end, noisy(0.5, seed=6))}, "fp32", CONTROLS, 0.05)
    assert kinds(found)["fp8"] == "worse"
    assert found.verdicts[1].words.endswith(" of the way from random to solved over training")


def test_too_few_seeds_tell_nothing():
    found = judge(
        {"fp32": runs([1.0] * 9), "bf16": runs([1.0] * 9), "fp16-naive": runs([0.0] * 9)}, "fp32", CONTROLS, 0.05
    )
    assert set(kinds(found).values()) == {"reference", "cannot tell"}
    assert found.verdicts[1].words == f"cannot tell: 9 seeds, and a claim needs {MIN_SEEDS}"
    assert found.sensitive is None
    assert found.advice == "No advice: 9 seeds, and a claim needs 10."
    assert judge({"fp32": runs([1.0]), "bf16": runs([1.0])}, "fp32", (), 0.05).advice.startswith("No advice: 1 seed,")


def test_noise_tells_nothing_and_says_what_it_could_resolve():
    found = judge(
        {"fp32": runs(noisy(0.5, 0.4, seed=1)), "bf16": runs(noisy(0.5, 0.4, seed=2))}, "fp32", CONTROLS, 0.05
    )
    (verdict,) = found.verdicts[1:]
    assert verdict.kind == "cannot tell"
    assert verdict.smallest_margin > 0.05
    assert verdict.words == f"cannot tell: 10 seeds leave room for a difference of up to {verdict.smallest_margin:.1%}"


@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
    spread=st.sampled_from([0.0, 0.01, 0.05]),
    margin=st.floats(0.01, 0.1),
)
@settings(deadline=None, max_examples=10)
def test_the_smallest_margin_is_where_the_verdict_turns(seeds, spread, margin):
    reference = noisy(0.9, spread, seed=11)
    modes = {f"mode{place}": runs(noisy(0.9 + 0.01 * place, spread, seed=each)) for place, each in enumerate(seeds)}
    found = {
        each: judge({"fp32": runs(reference), **modes}, "fp32", CONTROLS, at)
        for each, at in (("given", margin), ("double", 2 * margin))
    }
    for first, second in zip(found["given"].verdicts[1:], found["double"].verdicts[1:], strict=True):
        assert first.smallest_margin == second.smallest_margin
        if abs(first.smallest_margin - margin) > 1e-9:
            assert (first.kind == "equivalent") == (first.smallest_margin < margin)
        # What the figure draws of an equivalent mode lies inside the band.
        pairs = paired(modes[first.mode], runs(reference))
        drawn = max(abs(pair.mean) + pair.reach(first.tests) for pair in pairs)
        assert drawn <= first.smallest_margin + 1e-12
        assert 1 <= first.tests <= len(modes)


def test_the_smallest_margin_is_corrected_for_the_other_modes():
    """Alone, a mode resolves more than beside one that does not come through."""
    own, reference, broken = noisy(0.9, seed=1), noisy(0.9, seed=2), noisy(0.5, 0.4, seed=3)
    alone = judge({"fp32": runs(reference), "bf16": runs(own)}, "fp32", CONTROLS, 0.05).verdicts[1]
    beside = judge({"fp32": runs(reference), "bf16": runs(own), "fp8": runs(broken)}, "fp32", CONTROLS, 0.05)
    pair = Paired(differences=tuple(own - reference))
    assert alone.smallest_margin == pytest.approx(pair.smallest_margin(), abs=1e-9)
    assert beside.verdicts[1].smallest_margin == pytest.approx(pair.smallest_margin(2), abs=1e-9)
    assert pair.smallest_margin(2) > pair.smallest_margin()


def test_a_task_that_cannot_tell_gives_no_advice():
    same = noisy(1.0)
    found = judge(
        {"fp32": runs(same), "bf16": runs(same, speed=300.0), "fp16-naive": runs(same)}, "fp32", CONTROLS, 0.05
    )
    assert found.sensitive is False
    assert found.advice.startswith("No advice: fp16-naive, wrong on purpose, should have come out worse and did not")


def test_without_a_control_the_advice_says_so():
    same = noisy(1.0)
    found = judge({"fp32": runs(same), "bf16": runs(same, speed=300.0)}, "fp32", CONTROLS, 0.05)
    assert found.sensitive is None
    assert found.advice.endswith("There was no negative control, so nothing shows that the task can tell.")


def test_a_slower_mode_is_not_advised_for_speed():
    found = judge(
        {
            "fp32": runs(noisy(1.0, seed=1)),
            "fp8": runs(noisy(1.0, seed=2), speed=20.0, memory=500.0),
            "fp16-naive": runs(noisy(0.0, seed=3), speed=400.0),
        },
        "fp32",
        CONTROLS,
        0.05,
    )
    assert found.advice == (
        "Use fp32 for speed: no precision that keeps its return is faster here. fp8 is equivalent to FP32 within 5% "
        f"(even {found.verdicts[1].smallest_margin:.1%}) and takes 0.5× the memory."
    )


def test_what_keeps_its_return_is_told_from_what_may_not():
    reference, broken = runs(noisy(0.9, seed=1)), runs(noisy(0.0, seed=3))
    slower = {mode: runs(noisy(0.9, seed=place), speed=50.0) for place, mode in ((4, "bf16"), (5, "fp16"))}
    modes = {"fp32": reference, **slower, "fp8": broken, "fp16-naive": broken}
    assert judge(modes, "fp32", CONTROLS, 0.05).advice == (
        "Use fp32: bf16, fp16 keep its return, but by the medians none is faster or smaller here."
    )
    del modes["bf16"], modes["fp16"]
    assert judge(modes, "fp32", CONTROLS, 0.05).advice == ("Use fp32: no other precision is shown to keep its return.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"bf16": runs([1.0])}, "fp32", (), 0.05), "no runs of the reference fp32, only of bf16"),
        (({"fp32": runs([1.0])}, "fp32", (), 0.0), "margin must be > 0"),
        (({"fp32": runs([1.0]), "bf16": runs([1.0, 2.0])}, "fp32", (), 0.05), "must have the same seeds"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        judge(*arguments)
