"""Pictures of studies: what is drawn, read from the axes, and that the files are pictures."""

import imageio.v3 as imageio
import optuna
import pytest

from fp8rl_torchrl.recipes import study_plots
from fp8rl_torchrl.recipes.study_plots import plot_history, plot_importance


@pytest.fixture
def axes(monkeypatch):
    """The axes of every picture that is drawn."""
    drawn = []
    make = study_plots._figure

    def make_and_note():
        figure, axes = make()
        drawn.append(axes)
        return figure, axes

    monkeypatch.setattr(study_plots, "_figure", make_and_note)
    return drawn


def study_of(values, direction="maximize"):
    """Trials with these values; one in a tuple is pruned there, None is refused. Only `lr` decides."""
    study = optuna.create_study(study_name="a study", direction=direction)
    spread = {
        "lr": optuna.distributions.FloatDistribution(0, 100),
        "gamma": optuna.distributions.FloatDistribution(0, 1),
    }
    for place, value in enumerate(values):
        params = {"lr": float(place), "gamma": (place * 7 % 10) / 10}
        pruned = isinstance(value, tuple) or value is None
        state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
        estimate = {1: value[0]} if isinstance(value, tuple) else {}
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=value[0] if isinstance(value, tuple) else value,
                params=params,
                distributions=spread,
                intermediate_values=estimate,
            )
        )
    return study


@pytest.mark.parametrize(
    ("direction", "best", "scale"), [("maximize", [1, 3, 3, 5], "linear"), ("minimize", [1, 1, 1, 1], "log")]
)
def test_history_shows_values_and_the_best_so_far(direction, best, scale, axes, tmp_path):
    plot_history(study_of([1.0, 3.0, (9.0,), None, 2.0, 5.0], direction), "mean return", tmp_path / "history.png")
    (drawn,) = axes
    pruned, complete, so_far = drawn.get_lines()
    assert (list(pruned.get_xdata()), list(pruned.get_ydata())) == ([2], [9])
    assert (list(complete.get_xdata()), list(complete.get_ydata())) == ([0, 1, 4, 5], [1, 3, 2, 5])
    assert (list(so_far.get_xdata()), list(so_far.get_ydata())) == ([0, 1, 4, 5], best)
    assert (drawn.get_xlabel(), drawn.get_ylabel(), drawn.get_title()) == ("trial", "mean return", "a study")
    assert drawn.get_yscale() == scale
    assert imageio.imread(tmp_path / "history.png").shape[:2] == (600, 1050)


def test_history_of_no_complete_trial_can_be_drawn(axes, tmp_path):
    plot_history(study_of([None]), "mean return", tmp_path / "history.png")
    assert not axes[0].get_lines()


def test_importance_is_that_of_the_option_that_decides(axes, tmp_path):
    plot_importance(study_of([float(place) for place in range(40)]), tmp_path / "importance.png")
    (drawn,) = axes
    names = [label.get_text() for label in drawn.get_yticklabels()]
    shares = dict(zip(names, [bar.get_width() for bar in drawn.patches], strict=True))
    assert shares["lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert names[-1] == "lr", "the most important one is on top"
    assert drawn.get_xlabel() == "share of the importance"
    assert drawn.get_title() == "a study, 40 complete trials"
    assert imageio.imread(tmp_path / "importance.png").shape[:2] == (600, 1050)


def test_importance_needs_two_trials(axes, tmp_path):
    plot_importance(study_of([1.0, 1.0]), tmp_path / "importance.png")
    with pytest.raises(ValueError, match="importance compares complete trials, and there are 1"):
        plot_importance(study_of([1.0, None]), tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
