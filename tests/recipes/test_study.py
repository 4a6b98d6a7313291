"""Shared studies in one process: how many trials, which ones, which are given up, and what is refused."""

import functools
import math
from collections import Counter

import optuna
import pytest
from studies import SPACE, distance, open_study, states

from fp8rl_torchrl.recipes import ActorCriticConfig
from fp8rl_torchrl.recipes.search import read_space
from fp8rl_torchrl.recipes.study import SharedStudy, StudyError, make_sampler, require_optuna

RANDOM = functools.partial(make_sampler, "random", SPACE)


def test_a_study_has_its_number_of_trials_and_goes_on_from_there(tmp_path):
    shared = open_study(tmp_path)
    ended = []
    shared.work(distance, 4, ended.append)
    assert [trial.number for trial in ended] == [0, 1, 2, 3]
    assert states(shared) == {"COMPLETE": 4}
    again = open_study(tmp_path)
    again.work(distance, 4, ended.append)
    assert len(ended) == 4
    again.work(distance, 6, ended.append)
    assert [trial.number for trial in ended] == list(range(6))
    assert again.best.value == min(trial.value for trial in ended)


def test_tpe_leaves_a_bad_start_behind(tmp_path):
    first = SPACE.encode({"lr": 1e-2, "hidden": (64, 32)})
    shared = open_study(tmp_path, sampler="tpe", first=first)
    shared.work(distance, 30)
    assert shared.study.trials[0].params == first
    assert shared.study.trials[0].value == pytest.approx(8e-3 + 2e-4)
    assert shared.best.value < 4e-4
    assert shared.best.params["hidden"] == "64"


def test_a_start_may_leave_options_open(tmp_path):
    shared = open_study(tmp_path, first={"lr": 1e-4})
    shared.work(distance, 2)
    assert shared.study.trials[0].params["lr"] == 1e-4
    assert shared.study.trials[1].params["lr"] != 1e-4


def test_a_grid_is_tried_once_point_by_point(tmp_path):
    space = read_space(ActorCriticConfig(), ["lr=1e-3,1e-2,1e-1", "hidden=64,64x32", "shared=true,false"])
    shared = open_study(tmp_path, sampler="grid", space=space)
    shared.work(lambda trial: space.suggest(trial)["lr"], 5)
    shared.work(lambda trial: space.suggest(trial)["lr"], 12)
    points = Counter(tuple(trial.params.values()) for trial in shared.study.trials)
    expected = {(lr, hidden, sharing) for lr in (1e-3, 1e-2, 1e-1) for hidden in ("64", "64x32") for sharing in (0, 1)}
    assert points == dict.fromkeys(expected, 1)


@pytest.mark.parametrize("minimize", [True, False], ids=["minimize", "maximize"])
@pytest.mark.parametrize("prune_after", [2, None])
def test_only_what_is_worse_than_the_median_is_given_up(tmp_path, prune_after, minimize):
    # Trials 0 to 4 are worth 0, 10, ..., 40 at every step; then come one beyond them and one that is nothing special.
    worth = [0.0, 10.0, 20.0, 30.0, 40.0, 21.0, 19.0]
    steps = {}

    def objective(trial):
        value = worth[trial.number]
        steps[trial.number] = []
        for step in (1, 2, 3):
            steps[trial.number].append(step)
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    shared = open_study(tmp_path, prune_after=prune_after, minimize=minimize)
    shared.work(objective, 7)
    pruned = [trial.number for trial in shared.trials("PRUNED")]
    # The median of five is 20. If less is better, 21 is given up, and 19 is not; else the other way round, where 21,
    # once complete, makes the median 20.5.
    assert pruned == ([] if prune_after is None else [5] if minimize else [6])
    for number, done in steps.items():
        assert done == ([1, 2] if number in pruned else [1, 2, 3])
    assert len(shared.ended) == 7
    assert shared.best.value == (0.0 if minimize else 40.0)


def test_ctrl_c_puts_the_trial_back(tmp_path):
    def interrupted(trial):
        if trial.number == 2:
            distance(trial)
            raise KeyboardInterrupt
        return distance(trial)

    with pytest.raises(KeyboardInterrupt):
        open_study(tmp_path).work(interrupted, 4)
    shared = open_study(tmp_path, seed=5)
    assert states(shared) == {"COMPLETE": 2, "FAIL": 1}
    shared.work(distance, 4)
    assert states(shared) == {"COMPLETE": 4, "FAIL": 1}
    assert shared.study.trials[3].params == shared.study.trials[2].params
    assert [trial.user_attrs.get("repeats") for trial in shared.study.trials] == [None, None, None, 2, None]


def test_an_error_of_the_objective_is_told_and_its_trial_does_not_count(tmp_path):
    def broken(trial):
        raise TypeError("a mistake in the code")

    shared = open_study(tmp_path)
    with pytest.raises(TypeError, match="a mistake in the code"):
        shared.work(broken, 2)
    shared.work(distance, 2)
    assert states(shared) == {"FAIL": 1, "COMPLETE": 2}


def test_no_number_is_no_value(tmp_path):
    shared = open_study(tmp_path)
    with pytest.raises(ValueError, match="must be a number; got nan"):
        shared.work(lambda trial: math.nan, 1)
    assert states(shared) == {"FAIL": 1}


def test_a_study_that_goes_on_does_not_draw_again_what_it_drew(tmp_path):
    begun = open_study(tmp_path, seed=0)
    begun.work(distance, 3)
    open_study(tmp_path, seed=0).work(distance, 6)
    drawn = [trial.params["lr"] for trial in begun.study.get_trials()]
    assert len(set(drawn)) == len(drawn) == 6
    # From its beginning, it is repeated by the seed.
    again = open_study(tmp_path, name="again", seed=0)
    again.work(distance, 3)
    assert [trial.params["lr"] for trial in again.study.trials] == drawn[:3]
    other = open_study(tmp_path, name="other", seed=1)
    other.work(distance, 3)
    assert not set(drawn) & {trial.params["lr"] for trial in other.study.trials}


# --- what is refused ---


def test_a_study_of_another_search_is_refused(tmp_path):
    options = {"minimize": True, "sampler": RANDOM, "prune_after": None, "first": {}}
    url = f"sqlite:///{tmp_path}/study.db"
    SharedStudy(url, "study", {"seeds": 3, "space": {"lr": [1]}}, **options)
    SharedStudy(url, "study", {"seeds": 3, "space": {"lr": [1]}}, **options)
    SharedStudy(url, "another", {"seeds": 4}, **options)
    with pytest.raises(StudyError, match="'study' was started with other values of seeds, lr_final, so"):
        SharedStudy(url, "study", {"seeds": 4, "lr_final": 0.1, "space": {"lr": [1]}}, **options)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "--storage takes a database URL, such as sqlite:///study.db; got 'study.db'"),
        ("sqlite:////nowhere/at/all/study.db", "the database sqlite:////nowhere/at/all/study.db cannot be opened"),
        ("nosuchbase://host/db", "the database nosuchbase://host/db cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_opened_is_told(url, message):
    options = {"minimize": True, "sampler": RANDOM, "prune_after": None, "first": {}}
    with pytest.raises(StudyError) as caught:
        SharedStudy(url, "study", {}, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_is_not_shown():
    options = {"minimize": True, "sampler": RANDOM, "prune_after": None, "first": {}}
    with pytest.raises(StudyError) as caught:
        SharedStudy("nosuchbase://me:secret@host/db", "study", {}, **options)
    assert "secret" not in str(caught.value)


def test_optuna_may_be_missing(monkeypatch):
    require_optuna()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StudyError, match="pip install optuna"):
        require_optuna()
