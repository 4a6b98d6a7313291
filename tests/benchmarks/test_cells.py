"""Cells: their order, the limits they run under, how a whole is split, and what a process of its own measures."""

import json
from dataclasses import asdict, replace

import cells
import pytest
import torch
from cells import PARTS, Cell, Runner, broken, read_records, run_all, split
from parts import fill, parts_of, pipeline_of, resident, resident_bytes

TINY = Cell(num_envs=4, steps=5, compile=False)


class Fake:
    """A runner whose cells above some width fail."""

    def __init__(self, failures):
        self.failures, self.ran = failures, []

    def run(self, cell):
        self.ran.append(cell)
        return {"failure": self.failures.get(cell.width)}


def test_a_split_adds_up_and_may_be_negative():
    seconds = {"env": [3e-9, 1e-9, 2e-9], "policy": [4e-9], "replay": [0.0], "update": [6e-9], "collect": [5e-9]}
    assert split(seconds | {"total": [20e-9]}, 2) == pytest.approx(
        {"env": 1, "policy": 2, "replay": 0, "update": 3, "collect": 2.5, "total": 10, "rest": 4}
    )
    assert split(seconds | {"total": [10e-9]}, 2)["rest"] == pytest.approx(-1)


@pytest.mark.parametrize("failure", ["out of memory", "out of time"])
def test_what_is_larger_than_what_was_too_large_is_not_begun(failure):
    given = [replace(TINY, width=width, num_envs=n) for width in (4096, 256, 64) for n in (64, 1)]
    fake = Fake({256: failure})
    records = list(run_all(given, fake, lambda: 1.0))
    ran = [(cell.width, cell.num_envs) for cell in fake.ran]
    assert ran == [(64, 1), (256, 1), (64, 64)] or ran == [(64, 1), (64, 64), (256, 1)]
    not_begun = {(r["cell"]["width"], r["cell"]["num_envs"]) for r in records if "smaller one" in (r["failure"] or "")}
    assert not_begun == {(256, 64), (4096, 1), (4096, 64)}
    assert len(records) == len(given)
    assert not broken(records)


def test_a_failure_of_another_kind_stops_nothing_else_and_is_told():
    fake = Fake({64: "RuntimeError: wrong"})
    records = list(run_all([replace(TINY, width=w) for w in (64, 256)], fake, lambda: 1.0))
    assert [cell.width for cell in fake.ran] == [64, 256]
    assert broken(records) == {"RuntimeError: wrong"}


def test_other_precisions_are_not_held_back():
    small = replace(TINY, precision="bf16")
    assert replace(small, width=256, num_envs=8).at_least(small)
    assert not replace(small, width=256, num_envs=2).at_least(small)
    assert not replace(small, width=256, precision="fp32").at_least(small)


def test_when_the_budget_is_spent_the_largest_are_not_begun():
    left = iter([1.0, -1.0])
    records = list(run_all([replace(TINY, width=w) for w in (256, 64)], Fake({}), lambda: next(left)))
    assert [(r["cell"]["width"], r["failure"]) for r in records] == [
        (64, None),
        (256, "not begun: the budget is spent"),
    ]
    assert cells.budget(None)() == float("inf")
    assert 0 < cells.budget(1)() <= 60


@pytest.mark.parametrize(
    ("told", "failure"),
    [
        ("not done after 3 s", "out of time"),
        ("ended with code -9: without a word", "out of memory"),
        ("ended with code 1: KeyError", "ended with code 1: KeyError"),
        (None, None),
    ],
)
def test_a_runner_says_what_became_of_a_process(told, failure, monkeypatch):
    monkeypatch.setattr(cells, "take_turn", lambda *_: {"failure": told})
    assert Runner(core=None).run(TINY) == {"failure": failure}


@pytest.mark.parametrize("algo", cells.ALGORITHMS)
def test_the_parts_are_those_of_an_iteration(algo):
    cell = replace(TINY, algo=algo, steps=11, replay_size=200 if algo == "actor-critic" else 0)
    pipeline = pipeline_of(cell)
    parts = parts_of(pipeline, cell)
    assert set(parts) == {"env", "policy", "update", "collect", "total"} | ({"replay"} if cell.replay_size else set())
    frames, updates = pipeline.frames, int(pipeline.step.updates)
    parts["total"]()
    assert pipeline.frames == frames + cell.frames
    once = int(pipeline.step.updates) - updates
    parts["update"]()
    assert int(pipeline.step.updates) == updates + 2 * once, "an update part is the updates of one iteration"
    assert parts["collect"]().batch_size == (4, 11)
    parts["env"]()
    parts["policy"]()
    if cell.replay_size:
        assert len(pipeline.replay) == 200
        assert len(parts["replay"]()) == once


def test_the_dynamics_of_a_part_do_as_many_steps_as_a_collection(monkeypatch):
    stepped = []

    class Counting:
        def __init__(self, env, block, compiled, *, blocks=1, fixed=False):
            self.steps = block * blocks
            assert fixed

        def __call__(self):
            stepped.append(self.steps)

    monkeypatch.setattr("parts.Dynamics", Counting)
    for steps in (3, 8, 21):
        cell = replace(TINY, steps=steps)
        parts_of(pipeline_of(cell), cell)["env"]()
        assert sum(stepped) == steps
        stepped.clear()


def test_a_buffer_is_filled_with_what_it_is_given():
    cell = replace(TINY, algo="actor-critic", replay_size=70_000)
    pipeline = pipeline_of(cell)
    rollout = pipeline.collector.rollout().select(*pipeline.loss.in_keys).reshape(-1)
    fill(pipeline.replay, rollout, 70_000)
    assert len(pipeline.replay) == 70_000
    stored = pipeline.replay[torch.tensor([0, 19, 20, 69_999])]
    assert (stored["observation"] == rollout["observation"][torch.tensor([0, 19, 0, (69_999 - 65_536) % 20])]).all()


def test_a_process_of_its_own_measures_a_cell():
    result = Runner(core=None, repeats=2, seconds=0.001).run(TINY)
    assert result["failure"] is None
    assert {len(taken) for taken in result["seconds"].values()} == {2}
    ns = result["ns_per_frame"]
    assert sum(ns[part] for part in PARTS) == pytest.approx(ns["total"])
    assert result["frames_per_second"] == pytest.approx(1e9 / ns["total"])
    assert result["memory_peak_bytes"] >= result["memory_start_bytes"] > 2**26


def test_memory_is_looked_at_after_a_warm_up():
    result = resident(TINY, 0.02)
    assert 2 <= len(result["samples"]) <= 91, "at most a hundred looks, less the first tenth"
    assert result["frames"] % TINY.frames == 0
    assert all(0.5 * resident_bytes() < sample < 2 * resident_bytes() for sample in result["samples"])


def test_resident_memory_is_that_in_use():
    before = resident_bytes()
    held = torch.ones(2**24)
    assert resident_bytes() - before > 0.9 * 2**26
    del held


def test_records_that_failed_are_not_read(tmp_path):
    path = tmp_path / "r.jsonl"
    assert read_records(path) == {}
    records = [
        {"cell": asdict(TINY), "failure": None, "n": 1},
        {"cell": asdict(TINY), "failure": None, "n": 2},
        {"cell": asdict(TINY), "failure": "out of memory", "n": 3},
        {"flat": {}, "failure": None},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert {cell: record["n"] for cell, record in read_records(path).items()} == {TINY: 2}


@pytest.mark.slow
def test_a_cell_that_needs_more_memory_than_it_may_have_fails_alone():
    result = Runner(core=None, max_memory_gib=1.0).run(replace(TINY, num_envs=65536, width=1024))
    assert result == {"failure": "out of memory"}


@pytest.mark.slow
def test_a_compiled_cell_is_measured():
    result = Runner(core=None, repeats=2, seconds=0.001).run(replace(TINY, compile=True))
    assert result["failure"] is None
    assert result["compile_seconds"] > 0
