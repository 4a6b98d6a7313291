"""Studies that are killed, and studies that several processes share: no trial is lost, and none counts twice.

Processes are forked; what waits in earnest for a sign of life is marked slow.
"""

import multiprocessing
import os
import random
import sqlite3
import time
from pathlib import Path

import optuna
import pytest
from studies import distance, open_study, states

CONTEXT = multiprocessing.get_context("fork")


def in_a_process(work, *arguments):
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    return process


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def let_heartbeats_grow_old(folder):
    with sqlite3.connect(f"{folder}/study.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')")
    database.close()


def hang(folder, at, started):
    """Work on a study until its trial `at`, which never ends."""

    def objective(trial):
        value = distance(trial)
        if trial.number == at:
            Path(started).touch()
            time.sleep(1000)
        return value

    open_study(folder, seed=1).work(objective, 6)


def test_a_killed_trial_is_repeated_with_its_parameters(tmp_path):
    process = in_a_process(hang, tmp_path, 3, tmp_path / "started")
    wait_for(tmp_path / "started", process)
    process.kill()
    process.join()
    let_heartbeats_grow_old(tmp_path)

    shared = open_study(tmp_path, seed=2)
    assert states(shared) == {"COMPLETE": 3, "RUNNING": 1}
    shared.work(distance, 6)
    assert states(shared) == {"COMPLETE": 6, "FAIL": 1}
    killed = shared.study.trials[3]
    (repeated,) = (trial for trial in shared.study.trials if trial.user_attrs.get("repeats") == 3)
    assert killed.state.name == "FAIL"
    assert repeated.params == killed.params
    assert repeated.value == distance(optuna.trial.FixedTrial(repeated.params))


@pytest.mark.slow
def test_a_study_killed_at_random_moments_loses_nothing(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"moments of death drawn with seed {seed}")
    moments = random.Random(seed)

    def work(seed):
        def objective(trial):
            value = distance(trial)
            (tmp_path / f"started {seed}").touch()
            time.sleep(0.1)
            return value

        open_study(tmp_path, seed=seed).work(objective, 15)

    for place in range(6):
        process = in_a_process(work, place)
        wait_for(tmp_path / f"started {place}", process)
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        process.join()
    shared = open_study(tmp_path, seed=99)
    print(f"killed with {states(shared)}")
    shared.work(distance, 15)
    assert len(shared.trials("COMPLETE")) == 15
    assert not shared.trials("RUNNING", "WAITING", "PRUNED")
    repeated = {trial.user_attrs.get("repeats"): trial.params for trial in shared.study.trials}
    for trial in shared.trials("FAIL"):
        assert repeated[trial.number].items() >= trial.params.items()


def test_a_trial_killed_before_its_first_sign_of_life_is_repeated(tmp_path):
    first = {"lr": 3e-4, "hidden": "64x32"}
    shared = open_study(tmp_path, first=first)
    with pytest.warns(UserWarning, match="Heartbeat"):
        shared.study.ask()  # begun, and nothing more
    waits = []
    shared.work(distance, 1, on_wait=waits.append)
    assert set(waits) == {1}
    assert states(shared) == {"FAIL": 1, "COMPLETE": 1}
    assert shared.best.params == first


@pytest.mark.slow
def test_a_living_process_keeps_its_trial(tmp_path):
    """The negative twin: what gives signs of life is waited for, not repeated."""

    def slow(folder):
        def objective(trial):
            (folder / "started").touch()
            time.sleep(4.5)  # longer than three heartbeats
            return distance(trial)

        open_study(folder).work(objective, 1)

    process = in_a_process(slow, tmp_path)
    wait_for(tmp_path / "started", process)
    shared, here, waits = open_study(tmp_path), [], []
    shared.work(distance, 1, here.append, waits.append)
    process.join()
    assert (process.exitcode, here) == (0, [])
    assert set(waits) == {1}
    assert states(shared) == {"COMPLETE": 1}


def test_a_trial_that_others_have_taken_over_is_let_go(tmp_path):
    shared, other = open_study(tmp_path), open_study(tmp_path)
    ended = []

    def suspended(trial):
        if trial.number == 0:  # while it sleeps, another process gives it up
            distance(trial)
            let_heartbeats_grow_old(tmp_path)
            other._put_back_unfinished()
        return distance(trial)

    shared.work(suspended, 2, ended.append)
    assert states(shared) == {"COMPLETE": 2, "FAIL": 1}
    assert 0 not in [trial.number for trial in ended]
    assert shared.study.trials[1].params == shared.study.trials[0].params


# --- several processes ---


def test_processes_that_start_at_once_share_a_study(tmp_path):
    first = {"lr": 3e-4, "hidden": "64x32"}

    def work(seed):
        def objective(trial):
            trial.set_user_attr("process", os.getpid())
            time.sleep(0.05)
            return distance(trial)

        open_study(tmp_path, seed=seed, first=first).work(objective, 9)

    processes = [in_a_process(work, seed) for seed in (1, 2, 3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    shared = open_study(tmp_path)
    complete = shared.trials("COMPLETE")
    assert len(complete) == 9
    assert not shared.trials("RUNNING", "PRUNED")
    assert len({trial.user_attrs["process"] for trial in complete}) > 1
    assert len({trial.params["lr"] for trial in complete}) == 9, "nothing is tried twice"
    assert [trial.params for trial in complete].count(first) == 1


def test_of_two_that_begin_the_last_trial_at_once_one_gives_it_back(tmp_path, monkeypatch):
    shared, other = open_study(tmp_path, seed=1), open_study(tmp_path, seed=2)
    ended, waits = [], []

    def first(trial):
        # The other one looked before this trial had begun, and sees it only after it has begun one itself.
        blind, see = iter([True, True]), other.trials
        monkeypatch.setattr(
            other, "trials", lambda *states: [] if states == ("RUNNING",) and next(blind, False) else see(*states)
        )

        def wait(running):
            waits.append(running)
            raise StopIteration

        with pytest.raises(StopIteration):
            other.work(pytest.fail, 1, ended.append, wait)
        return distance(trial)

    # Optuna refuses studies inside of studies only within one `Study`.
    shared.work(first, 1, ended.append)
    assert [trial.number for trial in ended] == [0]
    assert waits == [1]
    assert states(shared) == {"COMPLETE": 1, "FAIL": 1, "WAITING": 1}, "it is kept for when the study is extended"
    shared.work(distance, 2, ended.append)
    assert states(shared) == {"COMPLETE": 2, "FAIL": 1}


def test_a_trial_that_two_processes_put_back_is_repeated_once(tmp_path, monkeypatch):
    shared, other = open_study(tmp_path, seed=1), open_study(tmp_path, seed=2)

    def interrupted(trial):
        distance(trial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.work(interrupted, 3)
    add = shared.study.add_trial

    def add_after_the_other(trial):
        other._put_back_unfinished()
        add(trial)

    monkeypatch.setattr(shared.study, "add_trial", add_after_the_other)
    shared._put_back_unfinished()
    monkeypatch.undo()
    assert [trial.user_attrs.get("repeats") for trial in shared.study.trials] == [None, 0, 0]
    shared.work(distance, 3)
    assert states(shared) == {"COMPLETE": 3, "FAIL": 2}
    assert [trial.params for trial in shared.trials("COMPLETE")].count(shared.study.trials[0].params) == 1
