"""`SharedStudy`: an Optuna study that goes on after a kill, and that several processes can work on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from fp8rl_torchrl.recipes.search import SearchSpace

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SamplerName: TypeAlias = Literal["tpe", "random", "grid"]

SILENT = 3
"""A running trial that gave no sign of life for this many heartbeats is taken to have been killed."""

# Attributes of the study and of its trials.
_DESCRIPTION, _BEGUN, _DROPPED, _REPEATS = "search", "begun", "dropped", "repeats"
_WAIT_FOR_DESCRIPTION = 5.0


class StudyError(ValueError):
    """A study cannot be opened, or is another one."""


def require_optuna() -> None:
    """Make sure that Optuna can be used, before anything is written.

    Raises:
        StudyError: If it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise StudyError("Optuna is not installed; run: pip install optuna")


def make_sampler(
    name: SamplerName, space: SearchSpace, seed: int | None = None, begun: int = 0
) -> optuna.samplers.BaseSampler:
    """What chooses the parameters of the next trial.

    Args:
        name: ``"tpe"`` learns from earlier trials (the first ten are random), ``"random"`` does not, ``"grid"`` takes
            every combination of choices once.
        space: What is searched.
        seed: Seed of the random choices; processes that share a study need different ones, so None draws one.
        begun: Trials that the study has already: going on with it does not draw again what was drawn at its start.

    Raises:
        ValueError: If the space has no grid.
    """
    from optuna import samplers

    if seed is not None:
        seed = int(np.random.SeedSequence([seed, begun]).generate_state(1)[0])
    if name == "grid":
        return samplers.GridSampler(space.grid(), seed=seed)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    with quiet():  # Optuna 4 calls multivariate experimental; parameters of learning depend on each other
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


class SharedStudy:
    """An Optuna study in a database.

    A trial counts from the moment it is begun. While it runs, its process gives signs of life. A trial whose process
    was killed stops giving them; it is then marked as failed, does not count any more, and its parameters are tried
    again in a new trial, by whichever process comes next.

    Args:
        url: The database, such as ``sqlite:///study.db``.
        name: The study; it is made if the database has none of this name.
        description: What decides the value of a trial, as JSON-compatible values: only trials of the same description
            can be compared.
        minimize: Whether less is better.
        sampler: Makes what chooses parameters (see `make_sampler`), given the number of trials that there are already.
        prune_after: A trial is given up at a step from this one on, if its best estimate so far is worse than the
            median of what at least five finished trials had at the same step. None gives up none.
        first: Parameters of the first trial of a new study; empty leaves them to the sampler.
        heartbeat: Seconds between two signs of life.

    Attributes:
        study: The ``optuna.Study``.

    Raises:
        StudyError: If the database cannot be opened, or has a study of this name and another description.
    """

    def __init__(
        self,
        url: str,
        name: str,
        description: Mapping[str, Any],
        *,
        minimize: bool,
        sampler: Callable[[int], optuna.samplers.BaseSampler],
        prune_after: int | None,
        first: Mapping[str, Any],
        heartbeat: int = 10,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # it logs a traceback for each trial that is given up
        self.heartbeat = heartbeat
        self._storage = _open_storage(url, heartbeat)
        pruner = optuna.pruners.NopPruner()
        if prune_after is not None:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=prune_after)
        parts: dict[str, Any] = {"storage": self._storage, "pruner": pruner}
        with quiet():
            try:
                direction = "minimize" if minimize else "maximize"
                self.study = optuna.create_study(study_name=name, direction=direction, **parts)
                created = True
            except optuna.exceptions.DuplicatedStudyError:
                self.study = optuna.load_study(study_name=name, **parts)
                created = False
        self.study.sampler = sampler(len(self.study.get_trials(deepcopy=False)))
        self._agree(dict(description), dict(first), created)

    def _agree(self, description: dict[str, Any], first: dict[str, Any], created: bool) -> None:
        # Whoever made the study says what it is; one that was killed before it could is stood in for.
        patience = time.monotonic() + (0 if created else _WAIT_FOR_DESCRIPTION)
        while (known := self.study.user_attrs.get(_DESCRIPTION)) is None and time.monotonic() < patience:
            time.sleep(0.1)
        if known is None:
            if first:
                self.study.enqueue_trial(first, skip_if_exists=True)
            self.study.set_user_attr(_DESCRIPTION, description)
        elif other := [key for key in description | known if description.get(key) != known.get(key)]:
            raise StudyError(
                f"the study {self.study.study_name!r} was started with other values of {', '.join(other)}, so its "
                "trials cannot be compared: give the same ones, or another --study and --out"
            )

    def trials(self, *states: str) -> list[FrozenTrial]:
        """The trials in some states: ``"COMPLETE"``, ``"PRUNED"``, ``"RUNNING"``, ``"WAITING"`` or ``"FAIL"``."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name in states]

    @property
    def ended(self) -> list[FrozenTrial]:
        """The trials that have a result: complete ones, and those that were given up or refused."""
        return self.trials("COMPLETE", "PRUNED")

    @property
    def best(self) -> FrozenTrial | None:
        """The best complete trial, the earliest of equal ones; None if there is none."""
        return self.study.best_trial if self.trials("COMPLETE") else None

    def work(
        self,
        objective: Callable[[optuna.Trial], float],
        trials: int,
        on_end: Callable[[FrozenTrial], None] = lambda trial: None,
        on_wait: Callable[[int], None] = lambda running: None,
    ) -> None:
        """Take part until the study has a number of trials, those of other processes included.

        Args:
            objective: Evaluates one trial. ``optuna.TrialPruned`` gives the trial up. Another exception ends the work,
                and the trial does not count; after Ctrl-C it is repeated.
            trials: How many trials the study is to have.
            on_end: Called with each trial that was ended here.
            on_wait: Called with the number of trials that others still run, once in a while: if they are killed, their
                trials are done here.
        """
        while True:
            self._put_back_unfinished()
            running = self.trials("RUNNING")
            if len(self.ended) >= trials:
                return
            if len(self.ended) + len(running) >= trials:
                on_wait(len(running))
                time.sleep(self.heartbeat)
                continue
            mine = _Claim()

            def claimed(trial: optuna.Trial, mine: _Claim = mine) -> float:
                return self._run_claimed(trial, objective, trials, mine)

            try:
                with quiet():
                    self.study.optimize(claimed, n_trials=1)
            except _SurplusTrial:
                continue
            except Exception:
                if not mine.lost:
                    raise
            else:
                on_end(self._trial(mine.number))

    def _run_claimed(
        self, trial: optuna.Trial, objective: Callable[[optuna.Trial], float], trials: int, mine: _Claim
    ) -> float:
        from optuna import TrialPruned

        mine.number = trial.number
        self._storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr(_BEGUN, True)
        if self._is_second_repeat(trial):
            trial.set_user_attr(_DROPPED, True)
            raise _SurplusTrial
        earlier = [each for each in self.trials("RUNNING") if each.number < trial.number]
        if len(self.ended) + len(earlier) >= trials:
            raise _SurplusTrial
        try:
            value = objective(trial)
            if math.isnan(value):
                raise ValueError("the value of a trial must be a number; got nan")
            return value
        except Exception as error:
            if not isinstance(error, TrialPruned):
                with contextlib.suppress(Exception):
                    trial.set_user_attr(_DROPPED, True)
            raise
        finally:
            mine.lost = self._trial(trial.number).state.is_finished()

    def _is_second_repeat(self, trial: optuna.Trial) -> bool:
        repeats = trial.user_attrs.get(_REPEATS)
        others = self.study.get_trials(deepcopy=False)[: trial.number]
        return repeats is not None and any(each.user_attrs.get(_REPEATS) == repeats for each in others)

    def _put_back_unfinished(self) -> None:
        """Mark trials whose process was killed as failed, and queue the parameters of every failed one again.

        What is queued follows from the table of trials alone, so a process that is killed here leaves nothing undone.
        Two at once may queue a trial twice; the second one is then dropped when it is begun.
        """
        import optuna

        with quiet():
            optuna.storages.fail_stale_trials(self.study)
        # One that was killed before its first sign of life would count as running for ever.
        latest = datetime.datetime.now() - datetime.timedelta(seconds=SILENT * self.heartbeat)
        for trial in self.trials("RUNNING"):
            begun_at = trial.datetime_start
            if _BEGUN not in trial.user_attrs and begun_at is not None and begun_at < latest:
                with contextlib.suppress(ValueError, RuntimeError):  # another process was faster
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        repeated = {trial.user_attrs.get(_REPEATS) for trial in self.study.get_trials(deepcopy=False)}
        for trial in self.trials("FAIL"):
            if trial.number not in repeated and _DROPPED not in trial.user_attrs:
                again = optuna.create_trial(
                    state=optuna.trial.TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    system_attrs=trial.system_attrs,
                    user_attrs={_REPEATS: trial.number},
                )
                self.study.add_trial(again)

    def _trial(self, number: int | None) -> FrozenTrial:
        assert number is not None
        return self.study.get_trials(deepcopy=False)[number]


class _SurplusTrial(Exception):  # noqa: N818 (not an error: another process has it)
    """A trial that another process has begun at the same moment."""


@dataclass
class _Claim:
    """The trial that this process has begun."""

    number: int | None = None
    lost: bool = False
    """Whether it gave no sign of life for too long, as on a suspended machine, and was given to another process."""


def _open_storage(url: str, heartbeat: int) -> optuna.storages.RDBStorage:
    import optuna
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        raise StudyError(f"--storage takes a database URL, such as sqlite:///study.db; got {url!r}") from None
    shown = parsed.render_as_string(hide_password=True)
    sqlite = parsed.get_backend_name() == "sqlite"
    for attempt in range(5):
        try:
            with quiet():
                return optuna.storages.RDBStorage(
                    url,
                    # Seconds that a process waits while others write.
                    engine_kwargs={"connect_args": {"timeout": 100}} if sqlite else None,
                    heartbeat_interval=heartbeat,
                    grace_period=SILENT * heartbeat,
                )
        except SQLAlchemyError as error:
            made_at_once = any(words in str(error) for words in ("already exists", "UNIQUE constraint"))
            if (
                isinstance(error, DBAPIError) and made_at_once and attempt < 4
            ):  # another process has made the same tables at the same moment
                time.sleep(0.2 * (attempt + 1))
                continue
            raise StudyError(f"the database {shown} cannot be opened: {str(error).splitlines()[0]}") from error
        except (ImportError, RuntimeError) as error:
            raise StudyError(f"the database {shown} cannot be used: {str(error).splitlines()[0]}") from error
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes on what it calls experimental."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
