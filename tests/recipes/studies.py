"""What the tests of studies share: a space, an objective that takes no time, and studies in a folder."""

import functools
from collections import Counter

from fp8rl_torchrl.recipes import ActorCriticConfig
from fp8rl_torchrl.recipes.search import read_space
from fp8rl_torchrl.recipes.study import SharedStudy, make_sampler

SPACE = read_space(ActorCriticConfig(), ["lr=log:1e-4:1e-2", "hidden=64,64x32"])


def open_study(folder, name="study", sampler="random", space=SPACE, seed=0, **options):
    options = {"minimize": True, "prune_after": None, "first": {}, "heartbeat": 1, **options}
    url = f"sqlite:///{folder}/study.db"
    make = functools.partial(make_sampler, sampler, space, seed)
    return SharedStudy(url, name, {"seeds": 3}, sampler=make, **options)


def distance(trial):
    """A valley at lr 2e-3, better with one layer."""
    options = SPACE.suggest(trial)
    return abs(options["lr"] - 2e-3) + 1e-4 * len(options["hidden"])


def states(shared):
    return Counter(trial.state.name for trial in shared.study.trials)
